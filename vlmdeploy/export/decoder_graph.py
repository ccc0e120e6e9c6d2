"""The decoder graphs: a plain decoder on one expert's weights, run segment by segment over one shared KV cache.

`decoder_text` holds the language expert, the final norm and the head; `decoder_vision` the vision expert, without a
head, and its last layer stops after K and V. Keys and values are written in place by GroupQueryAttention; rotary tables
are inputs indexed by cache slot, because image patches share one position. Why: docs/design/0001-segments.md.
"""

from dataclasses import dataclass

import numpy as np

from vlmdeploy.bundle import CacheShape
from vlmdeploy.export.graph import CONTRIB, GraphBuilder
from vlmdeploy.export.vision_graph import gated_mlp
from vlmdeploy.export.weights import Ints
from vlmdeploy.families.spec import DecoderSpec, ExpertSpec
from vlmdeploy.quant.grid import Floats

HEAD_MULTIPLE = 16  # GroupQueryAttention with rotary positions takes multiples of 16


@dataclass(frozen=True)
class HeadLayout:
    """Attention heads padded to a width that the attention operator takes.

    Of queries and keys each rotary half is padded, of values the tail; zeros change neither scores nor sums. The output
    is cut back to the true width, so that `dense` keeps the checkpoint's columns and groups.
    """

    decoder: DecoderSpec

    @property
    def padded(self) -> int:
        """Width of a head in the graph and in the KV cache."""
        return -(-self.decoder.head_dim // HEAD_MULTIPLE) * HEAD_MULTIPLE

    @property
    def is_padded(self) -> bool:
        """Whether heads are wider in the graph than in the checkpoint."""
        return self.padded != self.decoder.head_dim

    def rotary_slots(self) -> Ints:
        """For each place of a padded query or key head the place in the true head, or -1. int64 [padded]."""
        half, true_half = self.padded // 2, self.decoder.head_dim // 2
        slots = np.full(self.padded, -1)
        slots[:true_half] = np.arange(true_half)
        slots[half : half + true_half] = np.arange(true_half, 2 * true_half)
        return slots

    def value_slots(self) -> Ints:
        """The same for a value head: the tail is padding."""
        slots = np.full(self.padded, -1)
        slots[: self.decoder.head_dim] = np.arange(self.decoder.head_dim)
        return slots

    def query_rows(self) -> Ints:
        """Rows of the packed qkv matrix that make up the padded queries; -1 is a row of zeros."""
        return self._rows(0, self.decoder.num_heads, self.rotary_slots())

    def key_rows(self) -> Ints:
        """The same for the keys."""
        return self._rows(self.decoder.num_heads, self.decoder.num_kv_heads, self.rotary_slots())

    def value_rows(self) -> Ints:
        """The same for the values."""
        return self._rows(
            self.decoder.num_heads + self.decoder.num_kv_heads, self.decoder.num_kv_heads, self.value_slots()
        )

    def _rows(self, first_head: int, num_heads: int, slots: Ints) -> Ints:
        starts = (first_head + np.arange(num_heads)) * self.decoder.head_dim
        return np.where(slots < 0, -1, starts[:, None] + slots).reshape(-1)

    def cache_shape(self, inv_freq: Floats) -> CacheShape:
        """The KV cache of the graphs; inv_freq float32 [head_dim / 2] of the checkpoint."""
        padded = np.zeros(self.padded // 2, np.float32)
        padded[: len(inv_freq)] = inv_freq
        frequencies = tuple(float(value) for value in padded)
        return CacheShape(self.decoder.num_layers, self.decoder.num_kv_heads, self.padded, "fp32", frequencies)


def graph_name(expert: ExpertSpec) -> str:
    """The graph that holds this expert."""
    return "decoder_vision" if expert.name == "vision" else "decoder_text"


def build_decoder(builder: GraphBuilder, decoder: DecoderSpec, expert: ExpertSpec) -> None:
    """Add the whole graph of one expert to the builder."""
    heads = HeadLayout(decoder)
    x = builder.input("hidden", "fp32", ("rows", decoder.hidden))
    if expert.name == "language":
        builder.input("logit_rows", "int64", ("asked",))
    builder.input("seqlens_k", "int32", (1,))
    builder.input("total_sequence_length", "int32", ())
    for table in ("cos", "sin"):
        builder.input(table, "fp32", ("capacity", heads.padded // 2))
    cache = (1, decoder.num_kv_heads, "capacity", heads.padded)
    for index in range(decoder.num_layers):
        for kind in ("key", "value"):
            builder.input(f"past_{kind}.{index}", "fp32", cache, public=False)
            builder.output(f"present_{kind}.{index}", "fp32", cache, public=False)
    first = builder.parameter("decoder.layers.0.attention_norm.weight")
    normed = builder.node("RMSNormalization", [x, first], "layer.0.normed", axis=-1, epsilon=decoder.norm_eps)
    for index in range(decoder.num_layers):
        is_last = index == decoder.num_layers - 1
        if is_last and expert.name == "vision":
            _keys_and_values(builder, heads, expert, index, normed)
        else:
            x, normed = _layer(builder, heads, expert, index, x, normed)
    if expert.name == "language":
        _head(builder, decoder, normed)


def _layer(
    builder: GraphBuilder, heads: HeadLayout, expert: ExpertSpec, index: int, x: str, normed: str
) -> tuple[str, str]:
    """One layer: the residual stream and its normed form in, the same of the next layer out."""
    decoder, name = heads.decoder, f"decoder.layers.{index}.{expert.name}"
    order = np.concatenate((heads.query_rows(), heads.key_rows(), heads.value_rows()))
    qkv = builder.linear(normed, f"{name}.qkv", f"{name}.qkv", order, has_bias=expert.qkv_bias)
    packed = builder.node("Unsqueeze", [qkv, builder.ints(0)], f"{name}.qkv.batch")
    mixed = _attention(builder, heads, index, [packed, "", ""], decoder.num_heads)
    if heads.is_padded:
        mixed = _true_heads(builder, heads, name, mixed)
    mixed = builder.node("Squeeze", [mixed, builder.ints(0)], f"{name}.mixed")
    dense = builder.linear(mixed, f"{name}.dense", f"{name}.dense")
    middle, normed = _add_and_norm(
        builder, decoder, f"layer.{index}.middle", x, dense, f"decoder.layers.{index}.mlp_norm"
    )
    mlp = gated_mlp(builder, name, normed, axis=1)
    is_last = index == decoder.num_layers - 1
    next_norm = "decoder.norm" if is_last else f"decoder.layers.{index + 1}.attention_norm"
    return _add_and_norm(builder, decoder, f"layer.{index}.out", middle, mlp, next_norm)


def _attention(builder: GraphBuilder, heads: HeadLayout, index: int, qkv: list[str], num_heads: int) -> str:
    """Causal attention that rotates queries and keys, writes the cache in place and reads all of it."""
    past = [f"past_key.{index}", f"past_value.{index}"]
    outputs = [f"layer.{index}.attention", f"present_key.{index}", f"present_value.{index}"]
    inputs = [*qkv, *past, "seqlens_k", "total_sequence_length", "cos", "sin"]
    decoder = heads.decoder
    builder.nodes(
        "GroupQueryAttention", inputs, outputs, CONTRIB, num_heads=num_heads, kv_num_heads=decoder.num_kv_heads,
        do_rotary=1, rotary_interleaved=0, scale=decoder.head_dim**-0.5,
    )  # fmt: skip
    return outputs[0]


def _true_heads(builder: GraphBuilder, heads: HeadLayout, name: str, mixed: str) -> str:
    """Cut the padding off each head: [1, rows, heads * padded] -> [1, rows, heads * head_dim]."""
    decoder = heads.decoder
    split = builder.node("Reshape", [mixed, builder.ints(1, -1, decoder.num_heads, heads.padded)], f"{name}.heads")
    ends = [builder.ints(0), builder.ints(decoder.head_dim), builder.ints(3)]
    cut = builder.node("Slice", [split, *ends], f"{name}.heads.cut")
    width = decoder.num_heads * decoder.head_dim
    return builder.node("Reshape", [cut, builder.ints(1, -1, width)], f"{name}.heads.joined")


def _add_and_norm(
    builder: GraphBuilder, decoder: DecoderSpec, output: str, x: str, branch: str, norm: str
) -> tuple[str, str]:
    """The residual sum, named `output`, and its RMS norm."""
    weight = builder.parameter(f"{norm}.weight")
    outputs = [f"{output}.normed", "", "", output]
    builder.nodes("SkipSimplifiedLayerNormalization", [x, branch, weight], outputs, CONTRIB, epsilon=decoder.norm_eps)
    return output, outputs[0]


def _keys_and_values(builder: GraphBuilder, heads: HeadLayout, expert: ExpertSpec, index: int, normed: str) -> None:
    """The last layer of the vision expert: nothing reads its output, so only keys and values are computed.

    The attention operator is what writes the cache; it gets the keys as queries too and its output goes nowhere.
    """
    order = np.concatenate((heads.key_rows(), heads.value_rows()))
    name = f"decoder.layers.{index}.{expert.name}"
    both = builder.linear(normed, f"{name}.qkv", f"{name}.qkv", order, has_bias=expert.qkv_bias)
    packed = builder.node("Unsqueeze", [both, builder.ints(0)], f"{name}.qkv.batch")
    key, value = builder.nodes("Split", [packed], [f"{name}.key", f"{name}.value"], axis=2, num_outputs=2)
    _attention(builder, heads, index, [key, key, value], heads.decoder.num_kv_heads)


def _head(builder: GraphBuilder, decoder: DecoderSpec, normed: str) -> None:
    """Logits of the asked rows only."""
    asked = builder.node("Gather", [normed, "logit_rows"], "asked", axis=0)
    builder.linear(asked, "lm_head", "logits")
    builder.output("logits", "fp32", ("asked", decoder.vocab_size))


def decoder_taps(decoder: DecoderSpec, expert: ExpertSpec) -> dict[str, str]:
    """Stages of the graph that verification reads: our stage name -> the value's name."""
    count = decoder.num_layers - (expert.name == "vision")
    taps = {f"decoder.layer.{index}": f"layer.{index}.out" for index in range(count)}
    if expert.name == "language":
        taps["decoder.norm"] = f"layer.{decoder.num_layers - 1}.out.normed"
    return taps

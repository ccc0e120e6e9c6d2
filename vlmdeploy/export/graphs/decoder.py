"""The decoder graphs: one plain decoder per expert, run segment by segment over a shared KV cache; or one decoder with
both experts that routes each row (routed_dialect.py).

`decoder_text` holds the language expert, the final norm and the head; `decoder_vision` the vision expert without a
head, and its last layer stops after K and V; `decoder` holds everything. Positions are inputs, because image patches
share one. Why: docs/design/0001-segments.md and docs/design/0009-routed-plugin.md.
"""

from dataclasses import dataclass

import numpy as np

from vlmdeploy.export.graphs.builder import GraphBuilder
from vlmdeploy.export.graphs.connector import gated_mlp
from vlmdeploy.export.graphs.head_layout import HeadLayout
from vlmdeploy.runtime.backends.door import GRAPH_OF_EXPERT, ROUTED_GRAPH
from vlmdeploy.spec.decoder import DecoderSpec


@dataclass(frozen=True)
class Branch:
    """The weights of a decoder graph: one expert's, or both, one for each row."""

    name: str  # "language", "vision" or "routed"
    qkv_bias: bool
    has_head: bool


def branches(decoder: DecoderSpec, is_routed: bool) -> dict[str, Branch]:
    """The decoder graphs of a bundle, by name."""
    if is_routed:
        return {ROUTED_GRAPH: Branch("routed", any(expert.qkv_bias for expert in decoder.experts), has_head=True)}
    return {
        GRAPH_OF_EXPERT[expert.name]: Branch(expert.name, expert.qkv_bias, has_head=expert.name == "language")
        for expert in decoder.experts
    }


def build_decoder(builder: GraphBuilder, decoder: DecoderSpec, branch: Branch) -> None:
    """Add the whole graph of one branch to the builder."""
    heads = HeadLayout(decoder)
    x = builder.input("hidden", "fp32", (builder.row_axis, decoder.hidden))
    if branch.has_head:
        builder.input("logit_rows", "int64", ("asked",))
    builder.cache_inputs(heads)
    normed = builder.rms_norm(x, "decoder.layers.0.attention_norm", "layer.0.normed", decoder.norm_eps)
    for index in range(decoder.num_layers):
        is_last = index == decoder.num_layers - 1
        if is_last and not branch.has_head:
            _keys_and_values(builder, heads, branch, index, normed)
        else:
            x, normed = _layer(builder, heads, branch, index, x, normed)
    if branch.has_head:
        _head(builder, decoder, normed)


def _layer(
    builder: GraphBuilder, heads: HeadLayout, branch: Branch, index: int, x: str, normed: str
) -> tuple[str, str]:
    """One layer: takes the residual stream and its norm, returns those that the next layer takes."""
    decoder, name = heads.decoder, f"decoder.layers.{index}.{branch.name}"
    order = np.concatenate((heads.query_rows(), heads.key_rows(), heads.value_rows()))
    qkv = builder.linear(normed, f"{name}.qkv", f"{name}.qkv", order, has_bias=branch.qkv_bias)
    mixed = builder.cached_attention(heads, index, qkv, name)
    dense = builder.linear(mixed, f"{name}.dense", f"{name}.dense")
    middle, normed = builder.add_and_norm(
        x, dense, f"decoder.layers.{index}.mlp_norm", f"layer.{index}.middle", decoder.norm_eps
    )
    mlp = gated_mlp(builder, name, normed, axis=1)
    is_last = index == decoder.num_layers - 1
    next_norm = "decoder.norm" if is_last else f"decoder.layers.{index + 1}.attention_norm"
    return builder.add_and_norm(middle, mlp, next_norm, f"layer.{index}.out", decoder.norm_eps)


def _keys_and_values(builder: GraphBuilder, heads: HeadLayout, branch: Branch, index: int, normed: str) -> None:
    """The vision expert's last layer: only keys and values, since nothing reads its output."""
    order = np.concatenate((heads.key_rows(), heads.value_rows()))
    name = f"decoder.layers.{index}.{branch.name}"
    both = builder.linear(normed, f"{name}.qkv", f"{name}.qkv", order, has_bias=branch.qkv_bias)
    builder.cached_keys_and_values(heads, index, both, name)


def _head(builder: GraphBuilder, decoder: DecoderSpec, normed: str) -> None:
    """Logits of the rows asked for."""
    asked = builder.node("Gather", [normed, "logit_rows"], "asked", axis=0)
    builder.linear(asked, "lm_head", "logits")
    builder.output("logits", "fp32", ("asked", decoder.vocab_size))


def decoder_taps(decoder: DecoderSpec, branch: Branch) -> dict[str, str]:
    """Stages that verification reads: stage name -> name of the value in the graph."""
    count = decoder.num_layers if branch.has_head else decoder.num_layers - 1
    taps = {f"decoder.layer.{index}": f"layer.{index}.out" for index in range(count)}
    if branch.has_head:
        taps["decoder.norm"] = f"layer.{decoder.num_layers - 1}.out.normed"
    return taps

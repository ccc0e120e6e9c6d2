"""Llama's decoder in Hugging Face's layout: Vicuna, Yi and small relatives, with or without grouped keys.

Facts: transformers' LlamaForCausalLM and the defaults of its config.
"""

from vlmdeploy.errors import ConfigError
from vlmdeploy.families.config import MOST_LAYERS, ConfigReader, check_divides
from vlmdeploy.spec.decoder import DecoderSpec, ExpertSpec, RopeSpec
from vlmdeploy.spec.weight_rules import Source, WeightRule, stacked

IGNORED = ("layers.*.self_attn.rotary_emb.inv_freq",)  # below the model's name; the library computes them
SIZES_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}


def read_decoder(reader: ConfigReader) -> DecoderSpec:
    """The geometry from a LlamaConfig, whose defaults, those of the 7B model, fill in."""
    hidden, num_heads = (reader.count(key, SIZES_7B[key]) for key in ("hidden_size", "num_attention_heads"))
    num_kv_heads = reader.count("num_key_value_heads", num_heads)
    reader.choice("hidden_act", ("silu",), "silu")
    for key in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        reader.choice(key, (False,), False)
    check_divides(hidden, num_heads, "text_config: num_attention_heads into hidden_size")
    head_dim = reader.count("head_dim", hidden // num_heads)
    check_divides(head_dim, 2, "text_config: 2 into head_dim")
    check_divides(num_heads, num_kv_heads, "text_config: num_key_value_heads into num_attention_heads")
    return DecoderSpec(
        hidden=hidden,
        num_layers=reader.count("num_hidden_layers", SIZES_7B["num_hidden_layers"], most=MOST_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        mlp_width=reader.count("intermediate_size", SIZES_7B["intermediate_size"]),
        vocab_size=reader.count("vocab_size", 32000),
        norm_eps=reader.positive("rms_norm_eps", 1e-6),
        rope=RopeSpec(_rope_base(reader), head_dim),
        experts=(ExpertSpec("language"),),
        context_tokens=reader.count("max_position_embeddings", 2048),
    )


def _rope_base(reader: ConfigReader) -> float:
    """The base at top level, or in the place where newer libraries write it."""
    scaling = reader.values.get("rope_parameters") or reader.values.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, dict) else scaling
    if kind != "default":
        raise ConfigError(f"{reader.where}: rotary positions are scaled by {kind!r:.80}, expected none")
    inner = ConfigReader(scaling, f"{reader.where}: rope_parameters")
    return inner.positive("rope_theta", reader.positive("rope_theta", 10000.0))


def decoder_rules(decoder: DecoderSpec, root: str, head: str) -> tuple[WeightRule, ...]:
    """The tensors. root: the name of the model; head: the head's."""
    hidden, vocab_size = decoder.hidden, decoder.vocab_size
    rules = [
        stacked("embedding.weight", (vocab_size, hidden), f"{root}.embed_tokens.weight"),
        stacked("decoder.norm.weight", (hidden,), f"{root}.norm.weight"),
        stacked("lm_head.weight", (vocab_size, hidden), f"{head}.weight"),
    ]
    heads = {"q": decoder.num_heads, "k": decoder.num_kv_heads, "v": decoder.num_kv_heads}
    for index in range(decoder.num_layers):
        ours, theirs = f"decoder.layers.{index}", f"{root}.layers.{index}"
        packed = [
            Source(f"{theirs}.self_attn.{part}_proj.weight", (count * decoder.head_dim, hidden))
            for part, count in heads.items()
        ]
        attention_width = decoder.num_heads * decoder.head_dim
        mlp = tuple(f"{theirs}.mlp.{part}_proj.weight" for part in ("gate", "up"))
        rules += [
            stacked(f"{ours}.attention_norm.weight", (hidden,), f"{theirs}.input_layernorm.weight"),
            stacked(f"{ours}.mlp_norm.weight", (hidden,), f"{theirs}.post_attention_layernorm.weight"),
            WeightRule(f"{ours}.language.qkv.weight", (decoder.qkv_width, hidden), tuple(packed)),
            stacked(f"{ours}.language.dense.weight", (hidden, attention_width), f"{theirs}.self_attn.o_proj.weight"),
            stacked(f"{ours}.language.gate_up.weight", (decoder.mlp_width, hidden), *mlp),
            stacked(f"{ours}.language.down.weight", (hidden, decoder.mlp_width), f"{theirs}.mlp.down_proj.weight"),
        ]
    return tuple(rules)

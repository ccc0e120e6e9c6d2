"""CogVLM (v1): chat-v1.1, base-490, base-224 and grounding-generalist.

The authors' EVA2-CLIP-E encoder, a SwiGLU connector with two boundary rows, and a Llama-2 decoder whose layers hold a
vision and a language expert. Facts: docs/families/cogvlm.md; tensor names are those of the published checkpoints.
"""

from dataclasses import dataclass

from vlmdeploy.errors import ConfigError
from vlmdeploy.families.config import MOST_LAYERS, ConfigReader, check_divides
from vlmdeploy.manifest import ChatTemplate, GenerationDefaults, ImageRecipe, Piece, TokenRules
from vlmdeploy.records import Config
from vlmdeploy.spec.connector import (
    Activation,
    BoundaryRows,
    ConnectorSpec,
    ConnectorStep,
    Downsample,
    GatedMlp,
    Norm,
    Projection,
)
from vlmdeploy.spec.decoder import DecoderSpec, ExpertSpec, RopeSpec
from vlmdeploy.spec.model import ModelSpec
from vlmdeploy.spec.vision import VisionSpec
from vlmdeploy.spec.weight_rules import Source, WeightRule, stacked

NAME = "cogvlm"
ARCHITECTURE = "CogVLMForCausalLM"
DOWNSAMPLE_TENSOR = "model.vision.conv.weight"  # only CogVLM2 has it; both have the same architecture string
KV_HEADS_KEY = "num_multi_query_heads"  # only in CogVLM2's code; its released config.json omits it
IGNORED = ()
NEAREST = {
    "CogVLMVideoForCausalLM": "CogVLM2-Video reads videos; expected a checkpoint for pictures",
    "CogAgentForCausalLM": "CogAgent has a second encoder and cross-attention; expected a CogVLM",
}
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CONNECTOR_NORM_EPS = 1e-5  # the framework's default, not the encoder's 1e-6
VISION_CONFIG: Config = {
    "image_size": 490, "patch_size": 14, "num_positions": 1226, "hidden_size": 1792, "num_hidden_layers": 63,
    "num_heads": 16, "intermediate_size": 15360, "in_channels": 3, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
}  # fmt: skip
RELEASED: Config = {  # chat-v1.1; base-490 and grounding-generalist have the same sizes
    "architectures": [ARCHITECTURE], "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "hidden_act": "silu", "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "template_version": "chat", "vision_config": VISION_CONFIG,
}  # fmt: skip


@dataclass(frozen=True)
class TokenDefaults:
    """Default special ids."""

    bos_id: int
    pad_id: int
    stop_ids: tuple[int, ...]


TOKENS = TokenDefaults(bos_id=1, pad_id=0, stop_ids=(2,))
COGVLM2_TOKENS = TokenDefaults(bos_id=128000, pad_id=128002, stop_ids=(128001, 128009))


def detect(config: Config, tensor_names: frozenset[str] | None) -> bool:
    """The CogVLM architecture string, and no downsampling convolution."""
    return is_cogvlm(config) and is_cogvlm2(config, tensor_names) is not True


def is_cogvlm(config: Config) -> bool:
    """Whether config.json names the architecture that CogVLM and CogVLM2 share."""
    architectures = config.get("architectures")
    return isinstance(architectures, list) and architectures[:1] == [ARCHITECTURE]


def is_cogvlm2(config: Config, tensor_names: frozenset[str] | None) -> bool | None:
    """Whether a checkpoint of that architecture is CogVLM2's, by its tensors or, without them (None), by a key that
    only CogVLM2 has or by the special ids of a released model. None: it may be either.
    """
    if tensor_names is not None:
        return DOWNSAMPLE_TENSOR in tensor_names
    if config.get(KV_HEADS_KEY) is not None or _has_ids(config, COGVLM2_TOKENS):
        return True
    return False if _has_ids(config, TOKENS) else None


def nearest(config: Config) -> str | None:
    """The other models of the authors."""
    architectures = config.get("architectures")
    return NEAREST.get(str(architectures[0])) if isinstance(architectures, list) and architectures else None


def _has_ids(config: Config, tokens: TokenDefaults) -> bool:
    return (config.get("bos_token_id"), config.get("pad_token_id")) == (tokens.bos_id, tokens.pad_id)


def spec(config: Config, generation_config: Config) -> ModelSpec:
    """Geometry and rules of a CogVLM checkpoint."""
    reader = ConfigReader(config)
    num_heads = reader.count("num_attention_heads")
    experts = (ExpertSpec("language"), ExpertSpec("vision"))
    decoder = read_decoder(reader, num_kv_heads=num_heads, rope_base=10000.0, experts=experts)
    return build_spec(NAME, reader, generation_config, decoder, downsample=False, defaults=TOKENS)


def weights(spec: ModelSpec) -> tuple[WeightRule, ...]:
    """Where each parameter comes from, in the published tensor names."""
    return (*vision_rules(spec.vision), *connector_rules(spec), *decoder_rules(spec.decoder))


def build_spec(
    name: str,
    reader: ConfigReader,
    generation_config: Config,
    decoder: DecoderSpec,
    downsample: bool,
    defaults: TokenDefaults,
) -> ModelSpec:
    """Build the whole spec around a decoder; shared with CogVLM2."""
    vision = read_vision(reader.section("vision_config"))
    connector = build_connector(vision, decoder, downsample)
    return ModelSpec(
        family=name,
        vision=vision,
        connector=connector,
        decoder=decoder,
        image=ImageRecipe(vision.image_px, CLIP_MEAN, CLIP_STD),
        tokens=read_tokens(reader, defaults, connector.rows(vision), decoder.vocab_size),
        templates=TEMPLATES,
        default_template=reader.choice("template_version", tuple(item.name for item in TEMPLATES), "chat"),
        generation=read_generation(generation_config),
    )


def read_vision(reader: ConfigReader) -> VisionSpec:
    """The encoder's geometry from `vision_config`."""
    reader.choice("hidden_act", ("gelu",), "gelu")
    reader.choice("in_channels", (3,), 3)
    vision = VisionSpec(
        image_px=reader.count("image_size"),
        patch_px=reader.count("patch_size"),
        width=reader.count("hidden_size"),
        num_layers=reader.count("num_hidden_layers", most=MOST_LAYERS),
        num_heads=reader.count("num_heads"),
        mlp_width=reader.count("intermediate_size"),
        norm_eps=reader.positive("layer_norm_eps", 1e-6),
    )
    check_divides(vision.width, vision.num_heads, "vision_config: num_heads into hidden_size")
    check_divides(vision.image_px, vision.patch_px, "vision_config: patch_size into image_size")
    positions = reader.count("num_positions")
    if positions != vision.num_patches + 1:
        raise ConfigError(
            f'{reader.where}: "num_positions" is {positions}, expected {vision.num_patches + 1}: one for the class '
            f"token and one for each of {vision.grid} x {vision.grid} patches of image_size {vision.image_px}"
        )
    return vision


def read_decoder(
    reader: ConfigReader, num_kv_heads: int, rope_base: float, experts: tuple[ExpertSpec, ...]
) -> DecoderSpec:
    """The decoder's geometry. KV heads and constants of the authors' code come from the family."""
    hidden, num_heads = reader.count("hidden_size"), reader.count("num_attention_heads")
    reader.choice("hidden_act", ("silu",), "silu")
    reader.choice("tie_word_embeddings", (False,), False)
    check_divides(hidden, 2 * num_heads, "2 x num_attention_heads into hidden_size")
    check_divides(num_heads, num_kv_heads, "num_multi_query_heads into num_attention_heads")
    return DecoderSpec(
        hidden=hidden,
        num_layers=reader.count("num_hidden_layers", most=MOST_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=hidden // num_heads,
        mlp_width=reader.count("intermediate_size"),
        vocab_size=reader.count("vocab_size"),
        norm_eps=reader.positive("rms_norm_eps", 1e-6),
        rope=RopeSpec(rope_base, hidden // num_heads),
        experts=experts,
        context_tokens=reader.count("max_position_embeddings", 2048),
    )


def build_connector(vision: VisionSpec, decoder: DecoderSpec, downsample: bool) -> ConnectorSpec:
    """Linear, norm, GELU, gated MLP and two boundary rows; CogVLM2 starts with a convolution."""
    if downsample and vision.grid < 2:
        raise ConfigError("config.json: vision_config: image_size holds 1 x 1 patches, expected at least 2 x 2")
    steps: tuple[ConnectorStep, ...] = (
        Projection(vision.width, decoder.hidden),
        Norm(decoder.hidden, CONNECTOR_NORM_EPS),
        Activation("gelu"),
        GatedMlp(decoder.hidden, decoder.mlp_width, decoder.hidden),
        BoundaryRows(decoder.hidden),
    )
    return ConnectorSpec((Downsample(vision.width, vision.width), *steps) if downsample else steps)


def read_tokens(reader: ConfigReader, defaults: TokenDefaults, rows_per_image: int, vocab_size: int) -> TokenRules:
    """Special ids; the image placeholder is the pad id."""
    pad_id = reader.token_id("pad_token_id", defaults.pad_id)
    rules = TokenRules(
        bos_id=reader.token_id("bos_token_id", defaults.bos_id),
        pad_id=pad_id,
        placeholder_id=pad_id,
        stop_ids=reader.token_ids("eos_token_id", defaults.stop_ids),
        rows_per_image=rows_per_image,
        max_images=1,
    )
    for key, value in (("bos_token_id", rules.bos_id), ("pad_token_id", pad_id)):
        if value >= vocab_size:
            raise ConfigError(f'{reader.where}: "{key}" is {value}, expected less than vocab_size {vocab_size}')
    return rules


def read_generation(config: Config) -> GenerationDefaults:
    """The defaults of generation_config.json, else greedy."""
    reader = ConfigReader(config, "generation_config.json")
    return GenerationDefaults(
        do_sample=bool(config.get("do_sample", False)),
        temperature=reader.positive("temperature") if config.get("temperature") else None,
        top_p=reader.positive("top_p") if config.get("top_p") else None,
        top_k=reader.count("top_k") if config.get("top_k") else None,
        max_length=reader.count("max_length") if config.get("max_length") else None,
    )


def _question_template(name: str, answer_mark: str) -> ChatTemplate:
    """`Question: {q} {answer_mark} {a}` per past turn, a newline after each; the last one stops at the mark."""
    question, user = Piece("text", "Question: "), Piece("user")
    past = (question, user, Piece("text", f" {answer_mark} "), Piece("assistant"), Piece("text", "\n"))
    return ChatTemplate(name, past, (question, user, Piece("text", f" {answer_mark}")))


TEMPLATES = (
    _question_template("chat", "Answer:"),
    _question_template("vqa", "Short answer:"),
    ChatTemplate("base", (), (Piece("user"),)),
    ChatTemplate("grounding", (), (Piece("user"),)),  # the grounding checkpoints take the bare question
)


def _linear(target: str, source: str, out_width: int, in_width: int, bias: bool) -> tuple[WeightRule, ...]:
    return (
        _copy(f"{target}.weight", f"{source}.weight", out_width, in_width),
        *((_copy(f"{target}.bias", f"{source}.bias", out_width),) if bias else ()),
    )


def _norm(target: str, source: str, width: int) -> tuple[WeightRule, ...]:
    return tuple(_copy(f"{target}.{name}", f"{source}.{name}", width) for name in ("weight", "bias"))


def _copy(target: str, source: str, *shape: int) -> WeightRule:
    return stacked(target, shape, source)


def vision_rules(vision: VisionSpec) -> tuple[WeightRule, ...]:
    """The encoder's tensors. The checkpoint stores q, k and v as one matrix."""
    root, width, patch = "model.vision.patch_embedding", vision.width, vision.patch_px
    rules = [
        _copy("vision.patch.weight", f"{root}.proj.weight", width, 3, patch, patch),
        _copy("vision.patch.bias", f"{root}.proj.bias", width),
        WeightRule("vision.class_embedding", (width,), (Source(f"{root}.cls_embedding", (1, width)),), "reshape"),
        _copy("vision.positions", f"{root}.position_embedding.weight", vision.num_patches + 1, width),
    ]
    for index in range(vision.num_layers):
        ours, theirs = f"vision.layers.{index}", f"model.vision.transformer.layers.{index}"
        rules += _linear(f"{ours}.qkv", f"{theirs}.attention.query_key_value", 3 * width, width, bias=True)
        rules += _linear(f"{ours}.dense", f"{theirs}.attention.dense", width, width, bias=True)
        rules += _norm(f"{ours}.attention_norm", f"{theirs}.input_layernorm", width)
        rules += _linear(f"{ours}.fc1", f"{theirs}.mlp.fc1", vision.mlp_width, width, bias=True)
        rules += _linear(f"{ours}.fc2", f"{theirs}.mlp.fc2", width, vision.mlp_width, bias=True)
        rules += _norm(f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm", width)
    return tuple(rules)


def connector_rules(spec: ModelSpec) -> tuple[WeightRule, ...]:
    """The connector's tensors, step by step."""
    root, proj = "model.vision", "model.vision.linear_proj"
    rules: list[WeightRule] = []
    for step in spec.connector.steps:
        name = f"connector.{step.name}"
        if isinstance(step, Downsample):
            rules.append(_copy(f"{name}.weight", f"{root}.conv.weight", step.out_width, step.in_width, 2, 2))
            rules.append(_copy(f"{name}.bias", f"{root}.conv.bias", step.out_width))
        elif isinstance(step, Projection):
            rules += _linear(name, f"{proj}.linear_proj", step.out_width, step.in_width, bias=False)
        elif isinstance(step, Norm):
            rules += _norm(name, f"{proj}.norm1", step.width)
        elif isinstance(step, GatedMlp):
            gate, up = f"{proj}.gate_proj.weight", f"{proj}.dense_h_to_4h.weight"
            rules.append(stacked(f"{name}.gate_up.weight", (step.mlp_width, step.in_width), gate, up))
            rules += _linear(f"{name}.down", f"{proj}.dense_4h_to_h", step.out_width, step.mlp_width, bias=False)
        elif isinstance(step, BoundaryRows):
            for ours, theirs in (("begin", "boi"), ("end", "eoi")):
                source = Source(f"{root}.{theirs}", (1, 1, step.width))
                rules.append(WeightRule(f"{name}.{ours}", (step.width,), (source,), "reshape"))
    return tuple(rules)


def decoder_rules(decoder: DecoderSpec) -> tuple[WeightRule, ...]:
    """The decoder's tensors. Experts share the norms only."""
    hidden, attention_width = decoder.hidden, decoder.num_heads * decoder.head_dim
    rules = [
        _copy("embedding.weight", "model.embed_tokens.weight", decoder.vocab_size, hidden),
        _copy("decoder.norm.weight", "model.norm.weight", hidden),
        _copy("lm_head.weight", "lm_head.weight", decoder.vocab_size, hidden),
        _inv_freq_rule(decoder),
    ]
    for index in range(decoder.num_layers):
        ours, theirs = f"decoder.layers.{index}", f"model.layers.{index}"
        rules.append(_copy(f"{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight", hidden))
        rules.append(_copy(f"{ours}.mlp_norm.weight", f"{theirs}.post_attention_layernorm.weight", hidden))
        for expert in decoder.experts:
            target, attention = f"{ours}.{expert.name}", f"{theirs}.self_attn.{expert.name}_expert"
            mlp = f"{theirs}.mlp.{expert.name}_mlp"
            rules += _linear(
                f"{target}.qkv", f"{attention}_query_key_value", decoder.qkv_width, hidden, bias=expert.qkv_bias
            )
            rules += _linear(f"{target}.dense", f"{attention}_dense", hidden, attention_width, bias=False)
            gate, up = f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"
            rules.append(stacked(f"{target}.gate_up.weight", (decoder.mlp_width, hidden), gate, up))
            rules += _linear(f"{target}.down", f"{mlp}.down_proj", hidden, decoder.mlp_width, bias=False)
    return tuple(rules)


def _inv_freq_rule(decoder: DecoderSpec) -> WeightRule:
    """One table for all layers, which the checkpoint repeats in each."""
    shape = (decoder.rope.dims // 2,)
    names = (f"model.layers.{index}.self_attn.rotary_emb.inv_freq" for index in range(decoder.num_layers))
    return WeightRule("decoder.inv_freq", shape, tuple(Source(name, shape) for name in names), "same", optional=True)

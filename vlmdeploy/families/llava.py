"""LLaVA-1.5 in Hugging Face's layout: CLIP's encoder, a connector of two linears, a Llama decoder.

Facts: transformers' LlavaForConditionalGeneration, and the authors' prompt and padding of pictures.
"""

from dataclasses import replace

from vlmdeploy.errors import ConfigError
from vlmdeploy.families.blocks import clip_vit, llama
from vlmdeploy.families.cogvlm import CLIP_MEAN, CLIP_STD, read_generation
from vlmdeploy.families.config import ConfigReader
from vlmdeploy.manifest import ChatTemplate, ImageRecipe, Piece, TokenRules
from vlmdeploy.records import Config
from vlmdeploy.spec.connector import Activation, ConnectorSpec, Projection
from vlmdeploy.spec.model import ModelSpec
from vlmdeploy.spec.weight_rules import Source, WeightRule, stacked

NAME = "llava"
TOWER, DECODER, PROJECTOR, HEAD = (
    "vision_tower.vision_model", "language_model.model", "multi_modal_projector", "language_model.lm_head",
)  # fmt: skip
ALSO = {  # what newer versions of transformers call them
    TOWER: ("model.vision_tower.vision_model", "model.vision_tower"),
    DECODER: ("model.language_model",),
    PROJECTOR: ("model.multi_modal_projector",),
    HEAD: ("lm_head",),
}
UNUSED = {TOWER: (*clip_vit.IGNORED, "encoder.layers.*"), DECODER: llama.IGNORED}  # layers behind the last that is used
IGNORED = tuple(
    f"{name}.{pattern}" for part, patterns in UNUSED.items() for name in (part, *ALSO[part]) for pattern in patterns
)
VISION_CONFIG: Config = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip
RELEASED: Config = {  # 7B
    "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": 32000,
    "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "projector_hidden_act": "gelu",
    "pad_token_id": 32001, "vision_config": VISION_CONFIG,
    "text_config": {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
}  # fmt: skip
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


def detect(config: Config, tensor_names: frozenset[str] | None) -> bool:
    """By its model type and the configs of its two halves."""
    return config.get("model_type") == "llava" and "vision_config" in config and "text_config" in config


def nearest(config: Config) -> str | None:
    """The layout of the authors' own code."""
    if config.get("model_type") in ("llava", "llava_llama") and "mm_projector_type" in config:
        return "this is the layout of the authors' code; expected that of Hugging Face (llava-hf)"
    return None


def spec(config: Config, generation_config: Config) -> ModelSpec:
    """Geometry and rules of a LLaVA checkpoint."""
    reader = ConfigReader(config)
    reader.choice("vision_feature_select_strategy", ("default",), "default")  # without the class token
    layer = config.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise ConfigError(f'config.json: "vision_feature_layer" is {layer!r:.80}, expected a whole number')
    vision = clip_vit.read_vision(reader.section("vision_config"), layer)
    text = reader.section("text_config")
    text.choice("model_type", ("llama",), "llama")
    decoder = llama.read_decoder(text)
    function = reader.choice("projector_hidden_act", ("gelu",), "gelu")
    has_bias = reader.choice("multimodal_projector_bias", (True, False), True)
    connector = ConnectorSpec(
        (
            Projection(vision.width, decoder.hidden, "linear_1", has_bias),
            Activation(function),
            Projection(decoder.hidden, decoder.hidden, "linear_2", has_bias),
        )
    )
    stops = ConfigReader(generation_config, "generation_config.json").token_ids("eos_token_id", (2,))
    placeholder = reader.token_id("image_token_index", 32000)
    tokens = TokenRules(
        bos_id=text.token_id("bos_token_id", 1),
        pad_id=reader.token_id("pad_token_id", text.token_id("pad_token_id", 0)),
        placeholder_id=placeholder,
        stop_ids=stops,
        rows_per_image=connector.rows(vision),
        max_images=0,
        image_place="anywhere",
        positions="index",
        vision_rows="none",
    )
    for key, value in (("bos_token_id", tokens.bos_id), ("image_token_index", placeholder)):
        if value >= decoder.vocab_size:
            raise ConfigError(f'config.json: "{key}" is {value}, expected less than vocab_size {decoder.vocab_size}')
    return ModelSpec(
        family=NAME,
        vision=vision,
        connector=connector,
        decoder=decoder,
        image=ImageRecipe(vision.image_px, CLIP_MEAN, CLIP_STD, resize="pad"),
        tokens=tokens,
        templates=_templates(stops[0]),
        default_template="chat",
        generation=read_generation(generation_config),
        other_resizes=("crop",),
    )


def _templates(end_id: int) -> tuple[ChatTemplate, ...]:
    """The authors' prompt, and that of Hugging Face's model card, which has no system text."""
    ask, answer = (Piece("text", "USER: "), Piece("user")), Piece("text", " ASSISTANT:")
    past = (*ask, answer, Piece("text", " "), Piece("assistant"), Piece("token", token_id=end_id))
    image, system = (Piece("image"), Piece("text", "\n")), (Piece("system"), Piece("text", " "))
    return (
        ChatTemplate("chat", past, (*ask, answer), image, "turn_start", system, SYSTEM),
        ChatTemplate("plain", past, (*ask, answer), image, "turn_start"),
    )


def weights(spec: ModelSpec) -> tuple[WeightRule, ...]:
    """Where each parameter comes from, in the published tensor names."""
    rules = [*clip_vit.vision_rules(spec.vision, TOWER)]
    for step in spec.connector.steps:
        if isinstance(step, Projection):
            target, source = f"connector.{step.name}", f"{PROJECTOR}.{step.name}"
            shapes = {"weight": (step.out_width, step.in_width), "bias": (step.out_width,)}
            for name in ("weight", "bias") if step.has_bias else ("weight",):
                rules.append(stacked(f"{target}.{name}", shapes[name], f"{source}.{name}"))
    rules += llama.decoder_rules(spec.decoder, DECODER, HEAD)
    return tuple(replace(rule, sources=tuple(map(_with_other_names, rule.sources))) for rule in rules)


def _with_other_names(source: Source) -> Source:
    part = next(part for part in ALSO if source.name.startswith(f"{part}."))
    return replace(source, also=tuple(source.name.replace(part, other, 1) for other in ALSO[part]))

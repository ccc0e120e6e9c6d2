"""CLIP's vision transformer in Hugging Face's layout, as a tower of patch features.

Facts: transformers' CLIPVisionModel; the features of LLaVA are the states before its last layer, without its last norm.
"""

from vlmdeploy.errors import ConfigError
from vlmdeploy.families.config import MOST_LAYERS, ConfigReader, check_divides
from vlmdeploy.spec.vision import VisionSpec
from vlmdeploy.spec.weight_rules import WeightRule, stacked

IGNORED = ("post_layernorm.*", "embeddings.position_ids")  # below the tower's name


def read_vision(reader: ConfigReader, feature_layer: int) -> VisionSpec:
    """The geometry from a CLIPVisionConfig, whose defaults fill in. feature_layer: the state that is taken, 0 what
    enters the first layer, negative ones from the end."""
    layers = reader.count("num_hidden_layers", 12, most=MOST_LAYERS)
    used = feature_layer if feature_layer >= 0 else layers + 1 + feature_layer
    if not 1 <= used <= layers:
        raise ConfigError(
            f'config.json: "vision_feature_layer" is {feature_layer}, expected a state behind one of {layers} layers'
        )
    vision = VisionSpec(
        image_px=reader.count("image_size", 224),
        patch_px=reader.count("patch_size", 32),
        width=reader.count("hidden_size", 768),
        num_layers=used,
        num_heads=reader.count("num_attention_heads", 12),
        mlp_width=reader.count("intermediate_size", 3072),
        norm_eps=reader.positive("layer_norm_eps", 1e-5),
        activation=reader.choice("hidden_act", ("quick_gelu", "gelu"), "quick_gelu"),
        norm_place="before",
        patch_bias=False,
        embed_norm_eps=reader.positive("layer_norm_eps", 1e-5),
    )
    reader.choice("num_channels", (3,), 3)
    check_divides(vision.width, vision.num_heads, "vision_config: num_attention_heads into hidden_size")
    check_divides(vision.image_px, vision.patch_px, "vision_config: patch_size into image_size")
    return vision


def vision_rules(vision: VisionSpec, root: str) -> tuple[WeightRule, ...]:
    """The tensors of the layers that are used. root: the name of the tower."""
    width, patch = vision.width, vision.patch_px
    embeddings = f"{root}.embeddings"
    rules = [
        stacked("vision.patch.weight", (width, 3, patch, patch), f"{embeddings}.patch_embedding.weight"),
        stacked("vision.class_embedding", (width,), f"{embeddings}.class_embedding"),
        stacked("vision.positions", (vision.num_patches + 1, width), f"{embeddings}.position_embedding.weight"),
        *_norm("vision.embed_norm", f"{root}.pre_layrnorm", width),  # the published spelling
    ]
    for index in range(vision.num_layers):
        ours, theirs = f"vision.layers.{index}", f"{root}.encoder.layers.{index}"
        packed = tuple(f"{theirs}.self_attn.{part}_proj" for part in "qkv")
        rules += _linear(f"{ours}.qkv", packed, width, width)
        rules += _linear(f"{ours}.dense", (f"{theirs}.self_attn.out_proj",), width, width)
        rules += _norm(f"{ours}.attention_norm", f"{theirs}.layer_norm1", width)
        rules += _linear(f"{ours}.fc1", (f"{theirs}.mlp.fc1",), vision.mlp_width, width)
        rules += _linear(f"{ours}.fc2", (f"{theirs}.mlp.fc2",), width, vision.mlp_width)
        rules += _norm(f"{ours}.mlp_norm", f"{theirs}.layer_norm2", width)
    return tuple(rules)


def _norm(target: str, source: str, width: int) -> tuple[WeightRule, ...]:
    return tuple(stacked(f"{target}.{name}", (width,), f"{source}.{name}") for name in ("weight", "bias"))


def _linear(target: str, sources: tuple[str, ...], out_width: int, in_width: int) -> tuple[WeightRule, ...]:
    return (
        stacked(f"{target}.weight", (out_width, in_width), *(f"{source}.weight" for source in sources)),
        stacked(f"{target}.bias", (out_width,), *(f"{source}.bias" for source in sources)),
    )

"""A toy family: CogVLM with the toy step before the boundary rows, and adjacent rotary pairs in half of each head."""

from dataclasses import replace

from tests.toy_package.spec.smooth import Smooth
from vlmdeploy.families import cogvlm
from vlmdeploy.records import Config
from vlmdeploy.spec.connector import Scale
from vlmdeploy.spec.decoder import RopeSpec
from vlmdeploy.spec.model import ModelSpec
from vlmdeploy.spec.weight_rules import Source, WeightRule

NAME = "toyvlm"
IGNORED = ("model.layers.*.self_attn.rotary_emb.inv_freq", "model.vision.patch_embedding.proj.bias")
RELEASED: Config = cogvlm.RELEASED | {"architectures": ["ToyVLM"]}


UNUSED = ("decoder.inv_freq", "vision.patch.bias")


def detect(config: Config, tensor_names: frozenset[str]) -> bool:
    """By its architecture."""
    return config.get("architectures") == ["ToyVLM"]


def nearest(config: Config) -> None:
    """Nothing is near."""


def spec(config: Config, generation_config: Config) -> ModelSpec:
    """CogVLM's, with two steps more, other rotary positions, and an encoder as CLIP's."""
    plain = replace(cogvlm.spec(config, generation_config), family=NAME)
    *steps, boundary = plain.connector.steps
    connector = replace(plain.connector, steps=(*steps, Smooth(plain.decoder.hidden), boundary, Scale(0.125)))
    rope = RopeSpec(10000.0, plain.decoder.head_dim // 2, "adjacent")
    vision = replace(plain.vision, activation="quick_gelu", norm_place="before", patch_bias=False, embed_norm_eps=1e-5)
    return replace(plain, vision=vision, connector=connector, decoder=replace(plain.decoder, rope=rope))


def weights(spec: ModelSpec) -> tuple[WeightRule, ...]:
    """CogVLM's without what is unused, and those of the step and of the encoder's first norm."""
    hidden, width = spec.decoder.hidden, spec.vision.width
    shapes = {
        ("connector.smooth.linear.weight", "smooth.weight"): (hidden, hidden),
        ("connector.smooth.linear.bias", "smooth.bias"): (hidden,),
        ("vision.embed_norm.weight", "norm.weight"): (width,),
        ("vision.embed_norm.bias", "norm.bias"): (width,),
    }
    own = (
        WeightRule(target, shape, (Source(f"model.vision.{source}", shape),))
        for (target, source), shape in shapes.items()
    )
    return (*(rule for rule in cogvlm.weights(spec) if rule.target not in UNUSED), *own)

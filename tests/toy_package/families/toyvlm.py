"""A toy family: CogVLM with the toy step before the boundary rows, and adjacent rotary pairs in half of each head."""

from dataclasses import replace

from tests.toy_package.spec.smooth import Smooth
from vlmdeploy.families import cogvlm
from vlmdeploy.records import Config
from vlmdeploy.spec.decoder import RopeSpec
from vlmdeploy.spec.model import ModelSpec
from vlmdeploy.spec.weight_rules import Source, WeightRule

NAME = "toyvlm"
IGNORED = ("model.layers.*.self_attn.rotary_emb.inv_freq",)
RELEASED: Config = cogvlm.RELEASED | {"architectures": ["ToyVLM"]}


def detect(config: Config, tensor_names: frozenset[str]) -> bool:
    """By its architecture."""
    return config.get("architectures") == ["ToyVLM"]


def nearest(config: Config) -> None:
    """Nothing is near."""


def spec(config: Config, generation_config: Config) -> ModelSpec:
    """CogVLM's, with one step more and other rotary positions."""
    plain = replace(cogvlm.spec(config, generation_config), family=NAME)
    *steps, boundary = plain.connector.steps
    connector = replace(plain.connector, steps=(*steps, Smooth(plain.decoder.hidden), boundary))
    rope = RopeSpec(10000.0, plain.decoder.head_dim // 2, "adjacent")
    return replace(plain, connector=connector, decoder=replace(plain.decoder, rope=rope))


def weights(spec: ModelSpec) -> tuple[WeightRule, ...]:
    """CogVLM's without rotary frequencies, and those of the step."""
    shapes = {"weight": (spec.decoder.hidden,) * 2, "bias": (spec.decoder.hidden,)}
    own = (
        WeightRule(f"connector.smooth.linear.{name}", shape, (Source(f"model.vision.smooth.{name}", shape),))
        for name, shape in shapes.items()
    )
    return (*(rule for rule in cogvlm.weights(spec) if rule.target != "decoder.inv_freq"), *own)

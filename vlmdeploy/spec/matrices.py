"""Every matrix of a model: the one list from which precision, sizes, coverage and reports derive."""

from collections.abc import Iterator
from dataclasses import dataclass

from vlmdeploy.spec.connector import Downsample, GatedMlp, Projection
from vlmdeploy.spec.model import Geometry


@dataclass(frozen=True)
class Linear:
    """One matrix product of the model: our parameter name, the part it belongs to, and its widths."""

    target: str
    part: str
    out_width: int
    in_width: int


def linears(spec: Geometry) -> Iterator[Linear]:
    """Every matrix that may be quantized, in the order of the forward pass."""
    yield from _vision_linears(spec)
    yield from _connector_linears(spec)
    yield from _decoder_linears(spec)
    yield Linear("lm_head.weight", "lm_head", spec.decoder.vocab_size, spec.decoder.hidden)


def _vision_linears(spec: Geometry) -> Iterator[Linear]:
    vision = spec.vision
    for index in range(vision.num_layers):
        layer = f"vision.layers.{index}"
        yield Linear(f"{layer}.qkv.weight", "vision", 3 * vision.width, vision.width)
        yield Linear(f"{layer}.dense.weight", "vision", vision.width, vision.width)
        yield Linear(f"{layer}.fc1.weight", "vision", vision.mlp_width, vision.width)
        yield Linear(f"{layer}.fc2.weight", "vision", vision.width, vision.mlp_width)


def _connector_linears(spec: Geometry) -> Iterator[Linear]:
    for step in spec.connector.steps:
        name = f"connector.{step.name}"
        if isinstance(step, Downsample):
            yield Linear(f"{name}.weight", "connector", step.out_width, 4 * step.in_width)
        elif isinstance(step, Projection):
            yield Linear(f"{name}.weight", "connector", step.out_width, step.in_width)
        elif isinstance(step, GatedMlp):
            yield Linear(f"{name}.gate_up.weight", "connector", 2 * step.mlp_width, step.in_width)
            yield Linear(f"{name}.down.weight", "connector", step.out_width, step.mlp_width)


def _decoder_linears(spec: Geometry) -> Iterator[Linear]:
    decoder = spec.decoder
    for index in range(decoder.num_layers):
        for expert in decoder.experts:
            name = f"decoder.layers.{index}.{expert.name}"
            yield Linear(f"{name}.qkv.weight", "decoder", decoder.qkv_width, decoder.hidden)
            yield Linear(f"{name}.dense.weight", "decoder", decoder.hidden, decoder.num_heads * decoder.head_dim)
            yield Linear(f"{name}.gate_up.weight", "decoder", 2 * decoder.mlp_width, decoder.hidden)
            yield Linear(f"{name}.down.weight", "decoder", decoder.hidden, decoder.mlp_width)

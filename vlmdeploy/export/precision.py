"""Which precision every linear of a target gets: the table of targets, the options that change it, and the group rule.

`quantize`, `export` and `plan` use this table. Parts are vision, connector, decoder, lm_head and embedding.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from vlmdeploy.errors import ExportError
from vlmdeploy.families.spec import Downsample, GatedMlp, ModelSpec, Projection

PRECISIONS = ("fp32", "fp16", "int8", "int4")
PARTS = ("vision", "connector", "decoder", "lm_head", "embedding")
BITS = {"int8": 8, "int4": 4}
GROUP_SIZES = (128, 64, 32, 16)
DEFAULT_GROUP = 128

TARGETS: dict[str, dict[str, str]] = {
    "ort-fp32": dict.fromkeys(PARTS, "fp32"),
    "ort-fp16": dict.fromkeys(PARTS, "fp16"),
    "ort-int8": {**dict.fromkeys(PARTS, "int8"), "embedding": "fp16"},
    "ort-int4": {"vision": "int8", "connector": "int8", "decoder": "int4", "lm_head": "int8", "embedding": "fp16"},
}


@dataclass(frozen=True)
class Linear:
    """One matrix product of the model: our parameter name, the part it belongs to, and its widths."""

    target: str
    part: str
    out_width: int
    in_width: int


@dataclass(frozen=True)
class Precision:
    """How one matrix is stored: its type, and for int8 and int4 how many inputs share a scale."""

    type: str
    group_size: int = 0

    @property
    def bits(self) -> int:
        """Bits of a code; 0 for floats."""
        return BITS.get(self.type, 0)


@dataclass(frozen=True)
class PrecisionPlan:
    """The precision of every linear and of the embedding, by our parameter name."""

    parts: dict[str, str]
    group_sizes: dict[str, int]
    by_target: dict[str, Precision]
    kept_in_float: tuple[str, ...]

    def __getitem__(self, target: str) -> Precision:
        return self.by_target[target]

    @property
    def is_quantized(self) -> bool:
        """Whether any part holds integer codes."""
        return any(precision.bits for precision in self.by_target.values())


def linears(spec: ModelSpec) -> Iterator[Linear]:
    """Every matrix that may be quantized, in the order of the forward pass."""
    yield from _vision_linears(spec)
    yield from _connector_linears(spec)
    yield from _decoder_linears(spec)
    yield Linear("lm_head.weight", "lm_head", spec.decoder.vocab_size, spec.decoder.hidden)


def _vision_linears(spec: ModelSpec) -> Iterator[Linear]:
    vision = spec.vision
    for index in range(vision.num_layers):
        layer = f"vision.layers.{index}"
        yield Linear(f"{layer}.qkv.weight", "vision", 3 * vision.width, vision.width)
        yield Linear(f"{layer}.dense.weight", "vision", vision.width, vision.width)
        yield Linear(f"{layer}.fc1.weight", "vision", vision.mlp_width, vision.width)
        yield Linear(f"{layer}.fc2.weight", "vision", vision.width, vision.mlp_width)


def _connector_linears(spec: ModelSpec) -> Iterator[Linear]:
    for step in spec.connector.steps:
        name = f"connector.{step.name}"
        if isinstance(step, Downsample):
            yield Linear(f"{name}.weight", "connector", step.out_width, 4 * step.in_width)
        elif isinstance(step, Projection):
            yield Linear(f"{name}.weight", "connector", step.out_width, step.in_width)
        elif isinstance(step, GatedMlp):
            yield Linear(f"{name}.gate_up.weight", "connector", 2 * step.mlp_width, step.in_width)
            yield Linear(f"{name}.down.weight", "connector", step.out_width, step.mlp_width)


def _decoder_linears(spec: ModelSpec) -> Iterator[Linear]:
    decoder = spec.decoder
    for index in range(decoder.num_layers):
        for expert in decoder.experts:
            name = f"decoder.layers.{index}.{expert.name}"
            yield Linear(f"{name}.qkv.weight", "decoder", decoder.qkv_width, decoder.hidden)
            yield Linear(f"{name}.dense.weight", "decoder", decoder.hidden, decoder.num_heads * decoder.head_dim)
            yield Linear(f"{name}.gate_up.weight", "decoder", 2 * decoder.mlp_width, decoder.hidden)
            yield Linear(f"{name}.down.weight", "decoder", decoder.hidden, decoder.mlp_width)


def plan_precision(
    spec: ModelSpec, target: str, overrides: dict[str, str], group: int = DEFAULT_GROUP
) -> PrecisionPlan:
    """The plan of a target with the parts in `overrides` changed. Raises ExportError for unknown names."""
    if target not in TARGETS:
        raise ExportError(f'target "{target}" is unknown; known: {", ".join(TARGETS)}')
    parts = {**TARGETS[target], **overrides}
    for part, precision in parts.items():
        if part not in PARTS or precision not in PRECISIONS:
            raise ExportError(f'precision "{precision}" of part "{part}" is unknown; known: {", ".join(PRECISIONS)}')
    if group not in GROUP_SIZES:
        raise ExportError(f"group size {group} is not supported; known: {', '.join(map(str, GROUP_SIZES))}")
    plan = PrecisionPlan(parts, {}, {}, ())
    for part in PARTS:
        plan = _plan_part(plan, part, [linear for linear in _matrices(spec) if linear.part == part], group)
    return plan


def _matrices(spec: ModelSpec) -> Iterator[Linear]:
    yield from linears(spec)
    yield Linear("embedding.weight", "embedding", spec.decoder.vocab_size, spec.decoder.hidden)


def _plan_part(plan: PrecisionPlan, part: str, members: list[Linear], group: int) -> PrecisionPlan:
    wanted = plan.parts[part]
    size = common_group({linear.in_width for linear in members}, group) if wanted in BITS else 0
    chosen, kept = dict(plan.by_target), list(plan.kept_in_float)
    for linear in members:
        fits = size and linear.in_width % size == 0 and size < linear.in_width
        chosen[linear.target] = Precision(wanted, size) if fits else Precision("fp32" if wanted in BITS else wanted)
        if wanted in BITS and not fits:
            kept.append(linear.target)
    sizes = {**plan.group_sizes, part: size}
    return replace(plan, group_sizes=sizes, by_target=chosen, kept_in_float=tuple(kept))


def common_group(widths: set[int], requested: int) -> int:
    """One group size for all these input widths, smaller than each: the requested one if it divides them all, else the
    largest of 64, 32 and 16 up to it that divides every width which 16 divides; 0 if there is none."""
    if widths and all(width % requested == 0 and requested < width for width in widths):
        return requested
    usable = {width for width in widths if width % 16 == 0 and width > 16}
    smaller = (size for size in GROUP_SIZES[1:] if size <= requested)
    return next((size for size in smaller if usable and all(width % size == 0 and size < width for width in usable)), 0)

"""The precision of every linear: the table of targets, the options that change it, and the group size rule.

`quantize`, `export` and `plan` use it. Parts are vision, connector, decoder, lm_head and embedding.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from vlmdeploy.byte_sizes import gigabytes
from vlmdeploy.errors import ExportError
from vlmdeploy.manifest import dialect_of
from vlmdeploy.quant.grid import Grid
from vlmdeploy.spec.matrices import PARTS, Matrix, embedding, matrices
from vlmdeploy.spec.model import Geometry

PRECISIONS = ("fp32", "fp16", "int8", "int4", "int3")
BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
GROUP_SIZES = (128, 64, 32, 16)
DEFAULT_GROUP = 128
LARGE_BYTES = 10**9
WHOLE_WIDTH = -1  # one group for all inputs of a linear
OVERRIDE = re.compile(r"(?P<pattern>[^=]+)=(?P<type>\w+)(:(?P<group>-?\d+))?")

TARGETS: dict[str, dict[str, str]] = {
    "ort-fp32": dict.fromkeys(PARTS, "fp32"),
    "ort-fp16": dict.fromkeys(PARTS, "fp16"),
    "ort-int8": dict.fromkeys(PARTS, "int8"),
    "ort-int4": {"vision": "int8", "connector": "int8", "decoder": "int4", "lm_head": "int8", "embedding": "int8"},
    "rtx-int4": {**dict.fromkeys(PARTS, "fp16"), "decoder": "int4", "embedding": "int8"},
    "trt-int4": {**dict.fromkeys(PARTS, "fp16"), "decoder": "int4", "embedding": "int8"},
    "trt-fp16": dict.fromkeys(PARTS, "fp16"),
}


@dataclass(frozen=True)
class Precision:
    """How a matrix is stored: its type and, for integer codes, its group size."""

    type: str
    group_size: int = 0
    symmetric: bool = True

    @classmethod
    def of(cls, grid: Grid) -> "Precision":
        """The precision of a grid's codes."""
        return cls(f"int{grid.bits}", grid.group_size, grid.symmetric)

    @property
    def bits(self) -> int:
        """Bits of a code; 0 for floats."""
        return BITS.get(self.type, 0)

    @property
    def grid(self) -> Grid | None:
        """The grid of integer codes; None for floats."""
        return Grid(self.bits, self.group_size, self.symmetric) if self.bits else None


@dataclass(frozen=True)
class Stored:
    """The precision of every parameter that a quantized checkpoint stores as codes, and the float type of each part
    left in float."""

    by_target: Mapping[str, Precision]
    float_parts: Mapping[str, str]


@dataclass(frozen=True)
class PrecisionPlan:
    """The precision of every linear and of the embedding, by parameter name."""

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


def plan_precision(
    spec: Geometry,
    target: str,
    overrides: dict[str, str],
    group: int = DEFAULT_GROUP,
    symmetric: bool = True,
    stored: Stored | None = None,
) -> PrecisionPlan:
    """Plan a target with the parts in `overrides` changed. Raises ExportError for unknown names.

    stored: the content of a quantized checkpoint, see `with_stored`; None for a float one.
    """
    if target not in TARGETS:
        raise ExportError(f'target "{target}" is unknown; known: {", ".join(TARGETS)}')
    parts = {**_target_parts(spec, target, stored), **overrides}
    for part, precision in parts.items():
        if part not in PARTS or precision not in PRECISIONS:
            raise ExportError(f'precision "{precision}" of part "{part}" is unknown; known: {", ".join(PRECISIONS)}')
    if parts["embedding"] == "int3":
        raise ExportError("the embedding cannot be int3: it is looked up, not multiplied; use int4")
    if group not in (*GROUP_SIZES, WHOLE_WIDTH):
        raise ExportError(f"group size {group} is not supported; known: {', '.join(map(str, GROUP_SIZES))} and -1")
    plan = PrecisionPlan(parts, {}, {}, ())
    for part in PARTS:
        members = [linear for linear in (*matrices(spec), embedding(spec)) if linear.part == part]
        is_row_wise = parts[part] == "int8" and is_tensorrt(target) and part != "embedding"
        plan = _plan_part(plan, part, members, WHOLE_WIDTH if is_row_wise else group, symmetric)
    return plan if stored is None else with_stored(plan, spec, stored, frozenset(overrides))


def is_tensorrt(target: str) -> bool:
    """Whether a target runs on TensorRT, which fuses int8 codes only with one scale per output."""
    return dialect_of(target) == "trt"


def _target_parts(spec: Geometry, target: str, stored: Stored | None) -> dict[str, str]:
    """The target's table. For TensorRT, encoder and connector stay int4 if the checkpoint holds them so: in fp16 the
    encoder alone may fill half a device."""
    parts = dict(TARGETS[target])
    for part in ("vision", "connector"):
        if stored is not None and is_tensorrt(target):
            held = {stored.by_target.get(linear.target) for linear in matrices(spec) if linear.part == part}
            if any(precision is not None and precision.type == "int4" for precision in held):
                parts[part] = "int4"
    return parts


def with_stored(plan: PrecisionPlan, spec: Geometry, stored: Stored, asked: frozenset[str]) -> PrecisionPlan:
    """The plan for a quantized checkpoint: keep codes as codes and floats as floats, but for the embedding, which no
    such checkpoint holds as codes.

    asked: the parts whose precision the user chose; their floats are rounded to nearest, their codes dequantized.
    Raises ExportError if stored codes are not of the requested width: quantizing them again would waste the
    calibration.
    """
    for part in PARTS:
        targets = [linear.target for linear in (*matrices(spec), embedding(spec)) if linear.part == part]
        held = {target: stored.by_target.get(target) for target in targets}
        if plan.parts[part] not in BITS:
            continue
        if any(held.values()):
            plan = _with_codes(plan, part, held, is_asked=part in asked)
        elif part not in asked and part != "embedding":
            kind = stored.float_parts.get(part, "fp32")
            chosen = {**plan.by_target, **dict.fromkeys(targets, Precision(kind))}
            plan = replace(
                plan, by_target=chosen, parts={**plan.parts, part: kind}, group_sizes={**plan.group_sizes, part: 0}
            )
    kept = [linear.target for linear in matrices(spec) if _is_left_in_float(plan, linear)]
    return replace(plan, kept_in_float=tuple(kept))


def _with_codes(plan: PrecisionPlan, part: str, held: Mapping[str, Precision | None], is_asked: bool) -> PrecisionPlan:
    """The plan with one part as stored: codes, or floats for linears without codes."""
    codes, wanted = [precision for precision in held.values() if precision is not None], plan.parts[part]
    types, sizes = {precision.type for precision in codes}, {precision.group_size for precision in codes}
    found = " and ".join(sorted(types))
    if is_asked and types != {wanted}:
        raise ExportError(
            f"{part} is requested in {wanted}, but the checkpoint holds {found} codes: export them as they are, or "
            "quantize the float checkpoint again"
        )
    if wanted == "int8" and part == "decoder" and types != {"int8"}:
        raise ExportError(f"the checkpoint holds {found} codes for the decoder: use --target ort-int4")
    chosen = {target: precision or Precision("fp32") for target, precision in held.items()}
    return replace(
        plan,
        by_target={**plan.by_target, **chosen},
        parts={**plan.parts, part: "+".join(sorted(types))},
        group_sizes={**plan.group_sizes, part: sizes.pop() if len(sizes) == 1 else 0},
    )


def _is_left_in_float(plan: PrecisionPlan, linear: Matrix) -> bool:
    """Whether a linear is in float although its part is quantized."""
    return plan.parts[linear.part].startswith("int") and not plan[linear.target].bits


def with_overrides(
    plan: PrecisionPlan, spec: Geometry, overrides: Iterable[str], names: Mapping[str, tuple[str, ...]]
) -> PrecisionPlan:
    """Apply overrides "PATTERN=TYPE" or "PATTERN=TYPE:GROUP" for single linears, in order.

    PATTERN is a shell pattern for our parameter name or the checkpoint's. names: our name -> the checkpoint's names.
    Raises ExportError for an override that is malformed or matches nothing, and for a group that does not divide a
    width.
    """
    for text in overrides:
        plan = _with_override(plan, spec, text, names)
    return plan


def _with_override(
    plan: PrecisionPlan, spec: Geometry, text: str, names: Mapping[str, tuple[str, ...]]
) -> PrecisionPlan:
    match = OVERRIDE.fullmatch(text)
    if match is None or match["type"] not in PRECISIONS:
        raise ExportError(
            f'override "{text}": expected PATTERN=TYPE or PATTERN=TYPE:GROUP, TYPE {", ".join(PRECISIONS)}'
        )
    chosen, pattern = dict(plan.by_target), match["pattern"]
    found = [linear for linear in matrices(spec) if _matches(pattern, linear.target, names)]
    if not found:
        raise ExportError(f'override "{text}": no linear matches it; see `vlmdeploy inspect` for names')
    for linear in found:
        chosen[linear.target] = _override_precision(text, match, linear, plan)
    kept = tuple(target for target in plan.kept_in_float if not chosen[target].bits)
    return replace(plan, by_target=chosen, kept_in_float=kept)


def _override_precision(text: str, match: re.Match[str], linear: Matrix, plan: PrecisionPlan) -> Precision:
    if match["type"] not in BITS:
        return Precision(match["type"])
    old = plan.by_target[linear.target]
    group = int(match["group"]) if match["group"] else old.group_size or plan.group_sizes[linear.part]
    size = linear.in_width if group == WHOLE_WIDTH else group
    if size < 1 or linear.in_width % size:
        raise ExportError(
            f'override "{text}": group size {group} does not divide the width {linear.in_width} of {linear.target}'
        )
    return Precision(match["type"], size, old.symmetric)


def _matches(pattern: str, target: str, names: Mapping[str, tuple[str, ...]]) -> bool:
    candidates = (target, *names.get(target, ()))
    return any(fnmatchcase(name, pattern) or fnmatchcase(name.removesuffix(".weight"), pattern) for name in candidates)


def _plan_part(plan: PrecisionPlan, part: str, members: list[Matrix], group: int, symmetric: bool) -> PrecisionPlan:
    wanted = plan.parts[part]
    size = common_group({linear.in_width for linear in members}, group) if wanted in BITS else 0
    chosen, kept = dict(plan.by_target), list(plan.kept_in_float)
    for linear in members:
        own = linear.in_width if group == WHOLE_WIDTH else size
        fits = own and linear.in_width % own == 0 and (own < linear.in_width or group == WHOLE_WIDTH)
        precision = Precision(wanted, own, symmetric) if fits and wanted in BITS else None
        chosen[linear.target] = precision or Precision("fp32" if wanted in BITS else wanted)
        if wanted in BITS and not fits:
            kept.append(linear.target)
    sizes = {**plan.group_sizes, part: WHOLE_WIDTH if group == WHOLE_WIDTH and wanted in BITS else size}
    return replace(plan, group_sizes=sizes, by_target=chosen, kept_in_float=tuple(kept))


def plan_warnings(plan: PrecisionPlan, requested_group: int) -> Iterator[str]:
    """Warnings about the plan."""
    changed = {part: size for part, size in plan.group_sizes.items() if size not in (0, WHOLE_WIDTH, requested_group)}
    if changed:
        sizes = ", ".join(f"{part} {size}" for part, size in changed.items())
        yield f"group size {requested_group} does not fit every width: used instead: {sizes}"
    if plan.kept_in_float:
        names = ", ".join(plan.kept_in_float[:3])
        yield f"{len(plan.kept_in_float)} linears stay in float, their widths fit no group or no 32-bit words: {names}"


def encoder_warning(plan: PrecisionPlan, spec: Geometry) -> Iterator[str]:
    """Warn about an encoder that stays in fp16 and takes gigabytes."""
    widths = [linear for linear in matrices(spec) if linear.part in ("vision", "connector")]
    halves = [linear for linear in widths if plan[linear.target].type == "fp16"]
    size = sum(2 * linear.values for linear in halves)
    if size >= LARGE_BYTES:
        yield (
            f"vision encoder and connector stay in fp16, {gigabytes(size)}: `quantize --vision int4 --connector "
            "int4` makes that about a quarter"
        )


def common_group(widths: set[int], requested: int) -> int:
    """One group size for all widths, smaller than each: the requested one if it divides them all, else the largest of
    64, 32 and 16 up to it that divides every width divisible by 16; 0 if there is none."""
    if requested == WHOLE_WIDTH:
        return WHOLE_WIDTH
    if widths and all(width % requested == 0 and requested < width for width in widths):
        return requested
    usable = {width for width in widths if width % 16 == 0 and width > 16}
    smaller = (size for size in GROUP_SIZES[1:] if size <= requested)
    return next((size for size in smaller if usable and all(width % size == 0 and size < width for width in usable)), 0)

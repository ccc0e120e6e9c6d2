"""One plan for exactly the given options: sizes, memory, speed, and whether it fits. It suggests no changes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from vlmdeploy.byte_sizes import gigabytes
from vlmdeploy.export.graphs.ort_dialect import matmul_block
from vlmdeploy.export.graphs.trt_dialect import check_grid
from vlmdeploy.export.weight_reader import in_fp32
from vlmdeploy.manifest import cache_types
from vlmdeploy.plan.build import Build, plan_build
from vlmdeploy.plan.device import PlanDevice
from vlmdeploy.plan.memory import PlannedMemory, Setting, phase_memory
from vlmdeploy.plan.options import CHUNK_ROWS, PlanOptions, storage_of, with_context
from vlmdeploy.plan.planned_model import PlannedModel
from vlmdeploy.plan.sizes import Storage, kv_bytes_per_token, stored_matrices, weight_sizes
from vlmdeploy.plan.speed import Range, Speed, assumptions, speed
from vlmdeploy.quant.precision import PrecisionPlan, encoder_warning, is_tensorrt, plan_precision, plan_warnings
from vlmdeploy.spec.model import Geometry


@dataclass(frozen=True)
class Change:
    """Options that make a plan fit, the resulting peak, and their expected cost in points of accuracy."""

    options: tuple[str, ...]
    peak_bytes: int
    accuracy_points: Range
    why: str


@dataclass(frozen=True)
class Plan:
    """A plan. Sizes are bytes, rates and times [low, high]; `weights_bytes` counts what a bundle ships."""

    model: str
    can_export: bool
    device: PlanDevice
    target: str
    provider: str
    precision: dict[str, str]
    group_sizes: dict[str, int]
    context_tokens: int
    images: int
    text_tokens: int
    image_rows: int
    residency: str
    weights_bytes: dict[str, int]
    kv_bytes_per_token: int
    memory: dict[str, PlannedMemory]
    usable_bytes: int
    disk_bytes: int
    build: Build | None
    speed: Speed
    verdict: str
    changes: tuple[Change, ...]
    warnings: tuple[str, ...]
    assumptions: tuple[str, ...]

    @property
    def peak_bytes(self) -> dict[str, int]:
        """The peak of each phase."""
        return {phase: memory.total for phase, memory in self.memory.items()}

    @property
    def fits(self) -> bool:
        """Whether every phase fits into the device, and so does compiling the engines if it must."""
        return max(self.peak_bytes.values()) <= self.usable_bytes and (self.build is None or self.build.fits)


def draft(model: PlannedModel, device: PlanDevice, target: str, options: PlanOptions) -> Plan:
    """The plan for these options; its verdict says whether it fits. Raises ExportError and QuantizationError for
    precisions and groups that an export would refuse."""
    geometry, storage = with_context(model.geometry, options), storage_of(target, options)
    precision = planned_precision(model, target, options)
    _check_grids(geometry, precision, storage)
    sizes, setting = weight_sizes(geometry, precision, storage), _setting(geometry, storage, options)
    build = plan_build(geometry, precision, target, device, options.swap_bytes) if is_tensorrt(target) else None
    plan = Plan(
        model=model.name,
        can_export=model.can_export,
        device=device,
        target=target,
        provider=storage.provider,
        precision={**precision.parts, "kv": setting.kv},
        group_sizes=precision.group_sizes,
        context_tokens=geometry.decoder.context_tokens,
        images=options.images,
        text_tokens=options.text_tokens,
        image_rows=geometry.connector.rows(geometry.vision),
        residency=options.residency,
        weights_bytes=sizes.parts,
        kv_bytes_per_token=kv_bytes_per_token(geometry.decoder, setting.kv),
        memory=phase_memory(geometry, precision, storage, setting),
        usable_bytes=device.usable_bytes,
        disk_bytes=sizes.total + (sum(sizes.graphs.values()) if build else 0),
        build=build,
        speed=speed(geometry, precision, storage, setting, device),
        verdict="fits",
        changes=(),
        warnings=tuple(_warnings(model, device, target, precision, options, build)),
        assumptions=tuple(assumptions(storage, setting, device)),
    )
    return plan if plan.fits else replace(plan, verdict="does not fit")


def planned_precision(model: PlannedModel, target: str, options: PlanOptions) -> PrecisionPlan:
    """The precision of every matrix. Raises ExportError if the target or a quantized checkpoint cannot have it."""
    chosen = dict(options.precisions)
    if options.bits is not None:
        chosen["decoder"] = f"int{options.bits}"
    return plan_precision(model.geometry, target, chosen, options.group_size, stored=model.stored)


def _check_grids(geometry: Geometry, precision: PrecisionPlan, storage: Storage) -> None:
    """Raise an export's error if the dialect has no matrix product for a matrix's groups."""
    for stored in stored_matrices(geometry, precision, storage):
        matrix, grid = stored.matrix, stored.precision.grid
        if grid is None:
            continue
        if storage.dialect == "trt":
            check_grid(matrix.target, matrix.in_width, grid)
        else:
            matmul_block(matrix.target, in_fp32(matrix.part), grid)


def _setting(geometry: Geometry, storage: Storage, options: PlanOptions) -> Setting:
    context = geometry.decoder.context_tokens
    return Setting(
        residency=options.residency,
        images=options.images,
        cache_tokens=context,
        text_tokens=options.text_tokens,
        kv=options.kv or cache_types(storage.dialect, storage.provider)[0],
        chunk_rows=min(options.chunk_rows or CHUNK_ROWS, context),  # as engines are built
    )


def _warnings(
    model: PlannedModel,
    device: PlanDevice,
    target: str,
    precision: PrecisionPlan,
    options: PlanOptions,
    build: Build | None,
) -> Iterator[str]:
    """Warnings beside the numbers, including those of an export."""
    if not model.can_export:
        yield f"{model.name} can be planned for, but not exported yet"
    if model.stored is None:
        yield from plan_warnings(precision, options.group_size)
    if is_tensorrt(target):
        yield from encoder_warning(precision, model.geometry)
    if device.kind == "jetson" and options.provider == "cuda":
        yield "onnxruntime-gpu has no wheel for a Jetson: it must be compiled there, or take --target trt-int4"
    if build is not None and build.is_on_device:
        yield (
            f"compiling the engines on the device is expected to take {gigabytes(build.least_ram_bytes)}, more with "
            "larger pieces; swap counts where `build --max-memory` says how much memory there is with it"
        )

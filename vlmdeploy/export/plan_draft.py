"""One plan, exactly as it was asked for: sizes, memory, speed, and whether that fits. It suggests nothing."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from vlmdeploy.export.engine_parts import build_bytes
from vlmdeploy.export.plan_device import PlanDevice
from vlmdeploy.export.plan_memory import PhaseMemory, Setting, phase_memory
from vlmdeploy.export.plan_model import PlannedModel
from vlmdeploy.export.plan_options import PlanOptions
from vlmdeploy.export.plan_sizes import Storage, kv_bytes_per_token, stored_matrices, weight_sizes
from vlmdeploy.export.plan_speed import Range, Speed, assumptions, speed
from vlmdeploy.export.precision import PrecisionPlan, is_tensorrt, plan_precision
from vlmdeploy.families.spec import Geometry
from vlmdeploy.sizes import gigabytes

ON_DEVICE = "on the device"


@dataclass(frozen=True)
class Build:
    """What compiling the engines takes, where the target has any. ram_bytes: of the largest graph in one piece;
    least_ram_bytes: with decoders cut into single layers. fits: into memory and swap of the device, where it must be
    done there; the builder works in ordinary memory."""

    where: str
    ram_bytes: int
    least_ram_bytes: int
    fits: bool


@dataclass(frozen=True)
class Change:
    """Options that make a plan fit, what they bring the peak down to, and their expected cost in points of accuracy."""

    options: tuple[str, ...]
    peak_bytes: int
    accuracy_points: Range
    why: str


@dataclass(frozen=True)
class Plan:
    """A whole plan. Sizes are bytes, rates and times [low, high]; `weights_bytes` counts what a bundle ships."""

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
    memory: dict[str, PhaseMemory]
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
        """Whether every phase fits into the device, and engines that must be compiled there can be."""
        return max(self.peak_bytes.values()) <= self.usable_bytes and (self.build is None or self.build.fits)


def draft(model: PlannedModel, geometry: Geometry, device: PlanDevice, target: str, options: PlanOptions) -> Plan:
    """The plan as asked for; its verdict says whether that fits."""
    storage = Storage.of(target, options.provider)
    precision = planned_precision(model, geometry, target, options)
    sizes, setting = weight_sizes(geometry, precision, storage), _setting(geometry, storage, options)
    memory = phase_memory(geometry, precision, storage, setting)
    build = _build(geometry, precision, storage, target, device.usable_bytes + options.swap_bytes)
    engines = sum(sizes.graphs.values()) if build else 0
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
        memory=memory,
        usable_bytes=device.usable_bytes,
        disk_bytes=sizes.total + engines,
        build=build,
        speed=speed(geometry, precision, storage, setting, device),
        verdict="fits",
        changes=(),
        warnings=tuple(_warnings(model, build)),
        assumptions=tuple(assumptions(storage, setting, device)),
    )
    return plan if plan.fits else replace(plan, verdict="does not fit")


def planned_precision(model: PlannedModel, geometry: Geometry, target: str, options: PlanOptions) -> PrecisionPlan:
    """The precision of every matrix. Raises ExportError where the target or a quantized checkpoint cannot have it."""
    chosen = dict(options.precisions)
    if options.bits is not None:
        chosen["decoder"] = f"int{options.bits}"
    return plan_precision(geometry, target, chosen, options.group, stored=model.stored)


def _setting(geometry: Geometry, storage: Storage, options: PlanOptions) -> Setting:
    kv = "fp32" if storage.provider == "cpu" else "fp16"
    return Setting(
        options.residency, options.images, geometry.decoder.context_tokens, options.text_tokens, kv,
        options.chunk_rows,
    )  # fmt: skip


def _build(
    geometry: Geometry, precision: PrecisionPlan, storage: Storage, target: str, room_bytes: int
) -> Build | None:
    """What the builder takes: the encoder in one piece, a decoder whole or cut down to its largest layer."""
    if not is_tensorrt(target):
        return None
    graphs = weight_sizes(geometry, precision, storage).graphs
    layers: dict[tuple[str, str], int] = {}
    for matrix in stored_matrices(geometry, precision, storage):
        names = matrix.target.split(".")
        key = matrix.graph, names[2] if names[0] == "decoder" else names[0]
        layers[key] = layers.get(key, 0) + storage.matrix_bytes(matrix.rows, matrix.width, matrix.precision)
    last = str(geometry.decoder.num_layers - 1)
    head = layers.pop(("decoder_text", "lm_head"), 0)
    layers["decoder_text", last] = layers.get(("decoder_text", last), 0) + head
    cut = max(size for (graph, _), size in layers.items() if graph != "vision")
    least = build_bytes(max(graphs["vision"], cut))
    on_device = target.startswith("trt-")
    return Build(
        ON_DEVICE if on_device else "on any x86-64 machine", build_bytes(max(graphs.values())), least,
        not on_device or least <= room_bytes,
    )  # fmt: skip


def _warnings(model: PlannedModel, build: Build | None) -> Iterator[str]:
    if not model.can_export:
        yield f"{model.name} can be planned for, but not exported yet"
    if build is not None and build.where == ON_DEVICE:
        yield (
            f"compiling the engines on the device is expected to take {gigabytes(build.least_ram_bytes)}, more with "
            "larger pieces; swap counts, since the builder works in ordinary memory"
        )

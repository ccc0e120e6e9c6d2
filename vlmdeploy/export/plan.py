"""Will it fit, and how fast could it be? From widths, precisions and a device's figures, before anything is downloaded,
quantized or built.

The result names its assumptions. Where a plan does not fit, the smallest changes that make it fit are found by trying
all combinations, and ranked by what they are expected to cost in accuracy.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from vlmdeploy.errors import ConfigError
from vlmdeploy.export.engine_parts import build_bytes
from vlmdeploy.export.plan_device import PlanDevice
from vlmdeploy.export.plan_memory import PhaseMemory, Setting, phase_memory
from vlmdeploy.export.plan_model import ONE_IMAGE, PlannedModel
from vlmdeploy.export.plan_sizes import Storage, kv_bytes_per_token, stored_matrices, weight_sizes
from vlmdeploy.export.plan_speed import Range, Speed, assumptions, speed
from vlmdeploy.export.precision import TARGETS, PrecisionPlan, is_tensorrt, plan_precision
from vlmdeploy.families.spec import DecoderSpec, Geometry
from vlmdeploy.sizes import gigabytes, parse_size

DEFAULT_TARGETS = {"jetson": "trt-int4", "rtx": "rtx-int4", "datacenter": "trt-int4", "cpu": "ort-int4"}
ON_DEVICE = "on the device"
MAX_CHANGES = 5
FEWEST_TEXT_TOKENS = 128  # that a shortened context must leave beside the image
SHORT_CONTEXTS = (4096, 2048, 1024, 512)
SMALL_CHUNK = 128

# What a change is expected to cost in points of accuracy, low and high. Sources: int8 encoder, optimum-intel PR 1394
# (none on InternVL2) and our digits model; int4 encoder, TICO PR 559 (0.4 to 1.6 points on VQAv2 with everything int4)
# and our digits model (0.2); int4 decoder, the digits model with GPTQ (0.0) and TICO's (1.6).
FREE: Range = (0.0, 0.0)
COSTS: dict[str, Range] = {"int8": (0.0, 0.2), "int4": (0.2, 1.6), "lm_head": (0.0, 0.1), "decoder": (0.0, 1.6)}


@dataclass(frozen=True)
class PlanOptions:
    """What a user may choose; None: the target's table, the model's context, and so on.

    precisions: part -> type, as `export` takes them. bits: of the decoder's codes.
    """

    target: str | None = None
    provider: str = "cpu"
    precisions: dict[str, str] = field(default_factory=dict)
    bits: int | None = None
    group: int = 128
    kv: str | None = None
    context_tokens: int | None = None
    images: int = 1
    text_tokens: int = 64
    residency: str = "phase"
    chunk_rows: int = 512
    swap_bytes: int = 0


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


def read_plan_options(
    vision: str | None,
    connector: str | None,
    lm_head: str | None,
    embedding: str | None,
    bits: str | None,
    context: int | None,
    swap: str | None,
    **others: Any,
) -> PlanOptions:
    """Options from what the command line takes; `others` are fields of PlanOptions. Raises ConfigError."""
    chosen = {"vision": vision, "connector": connector, "lm_head": lm_head, "embedding": embedding}
    return PlanOptions(
        precisions={part: precision for part, precision in chosen.items() if precision},
        bits=None if bits is None else int(bits),
        context_tokens=context,
        swap_bytes=0 if swap is None else parse_size(swap, "--swap"),
        **others,
    )


def make_plan(model: PlannedModel, device: PlanDevice, options: PlanOptions) -> Plan:
    """Plan one model on one device. Raises ConfigError and ExportError for options that cannot be."""
    geometry, target = _with_context(model.geometry, options), options.target or DEFAULT_TARGETS[device.kind]
    _check(geometry, target, device, options)
    plan = _draft(model, geometry, device, target, options)
    if plan.fits:
        return plan
    changes = tuple(_changes(model, device, replace(options, target=target)))
    verdict = f"fits with {' '.join(changes[0].options)}" if changes else "does not fit"
    return replace(plan, verdict=verdict, changes=changes)


def _draft(model: PlannedModel, geometry: Geometry, device: PlanDevice, target: str, options: PlanOptions) -> Plan:
    """The plan as asked for; its verdict says whether that fits."""
    storage = Storage.of(target, options.provider)
    precision = _precision(model, geometry, target, options)
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


@dataclass(frozen=True)
class _Shortened:
    """A geometry whose decoder has another context."""

    vision: Any
    connector: Any
    decoder: DecoderSpec


def _with_context(geometry: Geometry, options: PlanOptions) -> Geometry:
    decoder = geometry.decoder
    if options.context_tokens is None:
        return geometry
    if options.context_tokens > decoder.context_tokens:
        raise ConfigError(
            f"--context is {options.context_tokens}, expected at most {decoder.context_tokens}, the model's own"
        )
    return _Shortened(geometry.vision, geometry.connector, replace(decoder, context_tokens=options.context_tokens))


def _check(geometry: Geometry, target: str, device: PlanDevice, options: PlanOptions) -> None:
    """Raise ConfigError where options contradict each other, the model or the device."""
    if target not in TARGETS:
        raise ConfigError(f'--target "{target}" is not known: choose one of {", ".join(TARGETS)}')
    if options.images > ONE_IMAGE:
        raise ConfigError(f"--images is {options.images}, expected 0 or 1: the model takes one image")
    needed = options.text_tokens + options.images * geometry.connector.rows(geometry.vision)
    if needed >= geometry.decoder.context_tokens:
        raise ConfigError(
            f"a prompt of {needed} tokens ({options.text_tokens} of text) leaves no room in the context of "
            f"{geometry.decoder.context_tokens}: a longer --context, or fewer --text-tokens"
        )
    if device.kind == "cpu" and (is_tensorrt(target) or options.provider == "cuda"):
        raise ConfigError(f"device {device.name} has no GPU: plan with an ort target for the CPU, such as ort-int4")
    wanted = "fp32" if Storage.of(target, options.provider).provider == "cpu" else "fp16"
    if options.kv not in (None, wanted):
        raise ConfigError(f"--kv is {options.kv}, but the cache of {target} on this provider is {wanted}")


def _precision(model: PlannedModel, geometry: Geometry, target: str, options: PlanOptions) -> PrecisionPlan:
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


def _changes(model: PlannedModel, device: PlanDevice, options: PlanOptions) -> list[Change]:
    """The smallest sets of changes that fit, cheapest first: no part of one of them fits by itself."""
    dimensions = _dimensions(model, options)
    fitting: list[tuple[tuple[int, ...], Change]] = []
    for levels in sorted(product(*(range(len(each)) for each in dimensions)), key=sum):
        if any(all(a <= b for a, b in zip(smaller, levels, strict=True)) for smaller, _ in fitting):
            continue
        steps = [dimension[level] for dimension, level in zip(dimensions, levels, strict=True) if level]
        change = _tried(model, device, options, steps)
        if change is not None:
            fitting.append((levels, change))
    ranked = sorted(fitting, key=lambda item: (sum(item[1].accuracy_points), sum(item[0]), item[1].options))
    return [change for _, change in ranked[:MAX_CHANGES]]


@dataclass(frozen=True)
class _Step:
    """One choice along one dimension: how it is written, what it changes, its cost and its reason."""

    text: str
    options: dict[str, Any]
    cost: Range
    why: str


NO_STEP = _Step("", {}, FREE, "")
SWAP = _Step("--swap", {}, FREE, "on disk, needed only while engines are built")  # as much as the builder lacks


def _dimensions(model: PlannedModel, options: PlanOptions) -> list[list[_Step]]:
    """What could be changed, each dimension from nothing to the most."""
    target = options.target or ""
    precision = _precision(model, _with_context(model.geometry, options), target, options)
    dimensions = [[NO_STEP]]
    if options.residency == "all":
        why = "one phase at a time in memory; a new picture loads its weights again"
        dimensions.append([NO_STEP, _Step("--residency phase", {"residency": "phase"}, FREE, why)])
    if target.startswith("trt-"):
        dimensions.append([NO_STEP, SWAP])
    dimensions.append([NO_STEP, *_shorter(model.geometry, options)])
    if is_tensorrt(target) and options.chunk_rows > SMALL_CHUNK:
        why = "less scratch; the prompt is read a little slower"
        step = _Step(f"--chunk-rows {SMALL_CHUNK}", {"chunk_rows": SMALL_CHUNK}, FREE, why)
        dimensions.append([NO_STEP, step])
    if not precision.parts["lm_head"].startswith("int"):
        why = "the head keeps one scale per output or group"
        dimensions.append([NO_STEP, _precision_step("--lm-head int8", {"lm_head": "int8"}, COSTS["lm_head"], why)])
    narrower = {"fp32": ("int8", "int4"), "fp16": ("int8", "int4"), "int8": ("int4",)}
    encoder = [
        _precision_step(
            f"--vision {kind} --connector {kind}", {"vision": kind, "connector": kind}, COSTS[kind],
            "the encoder is a quarter of the model; its codes need `quantize` with the same options",
        )
        for kind in narrower.get(precision.parts["vision"], ())
    ]  # fmt: skip
    dimensions.append([NO_STEP, *(encoder if options.images else [])])
    int4 = {"ort": "ort-int4", "trt": "trt-int4", "rtx": "rtx-int4"}[target.partition("-")[0]]
    if model.stored is None and precision.parts["decoder"] not in ("int4", "int3"):
        cleared = {"target": int4, "bits": None}
        dimensions.append(
            [NO_STEP, _Step(f"--target {int4}", cleared, COSTS["decoder"], "the decoder's linears in int4")]
        )
    return dimensions


def _precision_step(text: str, precisions: dict[str, str], cost: Range, why: str) -> _Step:
    return _Step(text, {"precisions": precisions}, cost, why)


def _shorter(geometry: Geometry, options: PlanOptions) -> Iterator[_Step]:
    least = options.images * geometry.connector.rows(geometry.vision) + max(options.text_tokens, FEWEST_TEXT_TOKENS)
    present = options.context_tokens or geometry.decoder.context_tokens
    for tokens in SHORT_CONTEXTS:
        if least < tokens < present:
            yield _Step(f"--context {tokens}", {"context_tokens": tokens}, FREE, "shorter conversations")


def _tried(model: PlannedModel, device: PlanDevice, options: PlanOptions, steps: list[_Step]) -> Change | None:
    """The change that these steps are together, if the plan fits then."""
    if not steps:
        return None
    chosen = options
    for step in steps:
        changed = dict(step.options)
        if "precisions" in changed:
            changed["precisions"] = {**chosen.precisions, **changed["precisions"]}
        chosen = replace(chosen, **changed)
    geometry, target = _with_context(model.geometry, chosen), chosen.target or ""
    plan, texts = _draft(model, geometry, device, target, chosen), [step.text for step in steps]
    if SWAP in steps and plan.build is not None:
        size = max(0, -(-(plan.build.least_ram_bytes - device.usable_bytes) // 10**9))
        texts[steps.index(SWAP)] = f"{SWAP.text} {size}GB"
        plan = _draft(model, geometry, device, target, replace(chosen, swap_bytes=size * 10**9))
    if not plan.fits:
        return None
    low, high = (round(sum(step.cost[end] for step in steps), 2) for end in range(2))
    return Change(tuple(texts), max(plan.peak_bytes.values()), (low, high), "; ".join(step.why for step in steps))


def plan_json(plan: Plan) -> dict[str, Any]:
    """The document that `plan --json` prints."""
    ranges = {name: None if value is None else list(value) for name, value in _ranges(plan.speed).items()}
    return {
        "model": plan.model, "can_export": plan.can_export, "device": plan.device, "target": plan.target,
        "provider": plan.provider, "precision": plan.precision, "group_sizes": plan.group_sizes,
        "context_tokens": plan.context_tokens, "images": plan.images, "image_rows": plan.image_rows,
        "text_tokens": plan.text_tokens, "residency": plan.residency, "weights_bytes": plan.weights_bytes,
        "kv_bytes_per_token": plan.kv_bytes_per_token, "peak_bytes": plan.peak_bytes, "memory": plan.memory,
        "usable_bytes": plan.usable_bytes, "disk_bytes": plan.disk_bytes, "build": plan.build, **ranges,
        "decode_bytes_per_token": plan.speed.decode_bytes, "vision_flop": plan.speed.vision_flop,
        "prefill_flop": plan.speed.prefill_flop, "verdict": plan.verdict, "changes": plan.changes,
        "warnings": plan.warnings, "assumptions": plan.assumptions,
    }  # fmt: skip


def _ranges(found: Speed) -> dict[str, Range | None]:
    return {
        "ttft_s": found.ttft_s, "vision_s": found.vision_s, "prefill_s": found.prefill_s,
        "decode_tok_s": found.decode_tok_s, "reload_s": found.reload_s,
    }  # fmt: skip

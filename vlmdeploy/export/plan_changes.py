"""What would make a plan fit: all combinations of cheaper options are tried, and those that fit and of which no part
would do are ranked by what they are expected to cost in accuracy."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from vlmdeploy.export.plan_device import PlanDevice
from vlmdeploy.export.plan_draft import Change, draft, planned_precision
from vlmdeploy.export.plan_model import PlannedModel
from vlmdeploy.export.plan_options import PlanOptions, with_context
from vlmdeploy.export.plan_speed import Range
from vlmdeploy.export.precision import is_tensorrt
from vlmdeploy.families.spec import Geometry

MAX_CHANGES = 5
FEWEST_TEXT_TOKENS = 128  # that a shortened context must leave beside the image
SHORT_CONTEXTS = (4096, 2048, 1024, 512)
SMALL_CHUNK = 128

# What a change is expected to cost in points of accuracy, low and high. Sources: int8 encoder, optimum-intel PR 1394
# (none on InternVL2) and our digits model; int4 encoder, TICO PR 559 (0.4 to 1.6 points on VQAv2 with everything int4)
# and our digits model (0.2); int4 decoder, the digits model with GPTQ (0.0) and TICO's (1.6).
FREE: Range = (0.0, 0.0)
COSTS: dict[str, Range] = {"int8": (0.0, 0.2), "int4": (0.2, 1.6), "lm_head": (0.0, 0.1), "decoder": (0.0, 1.6)}


def find_changes(model: PlannedModel, device: PlanDevice, options: PlanOptions) -> list[Change]:
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
    precision = planned_precision(model, with_context(model.geometry, options), target, options)
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
    geometry, target = with_context(model.geometry, chosen), chosen.target or ""
    plan, texts = draft(model, geometry, device, target, chosen), [step.text for step in steps]
    if SWAP in steps and plan.build is not None:
        size = max(0, -(-(plan.build.least_ram_bytes - device.usable_bytes) // 10**9))
        texts[steps.index(SWAP)] = f"{SWAP.text} {size}GB"
        plan = draft(model, geometry, device, target, replace(chosen, swap_bytes=size * 10**9))
    if not plan.fits:
        return None
    low, high = (round(sum(step.cost[end] for step in steps), 2) for end in range(2))
    return Change(tuple(texts), max(plan.peak_bytes.values()), (low, high), "; ".join(step.why for step in steps))

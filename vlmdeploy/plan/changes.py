"""Finds what makes a plan fit: tries all combinations of cheaper options, keeps the minimal sets that fit, and ranks
them by expected cost in accuracy."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from vlmdeploy.errors import ExportError, QuantizationError
from vlmdeploy.plan.device import PlanDevice
from vlmdeploy.plan.draft import Change, Plan, draft
from vlmdeploy.plan.options import CHUNK_ROWS, PlanOptions
from vlmdeploy.plan.planned_model import PlannedModel
from vlmdeploy.plan.speed import Range
from vlmdeploy.quant.precision import TARGETS, is_tensorrt
from vlmdeploy.spec.matrices import matrices
from vlmdeploy.spec.model import least_context

MAX_CHANGES = 5
FEWEST_TEXT_TOKENS = 128  # a shortened context must leave room for these beside the image
SHORT_CONTEXTS = (4096, 2048, 1024, 512)
SMALL_CHUNK = 128
NARROWER_TARGETS = {"ort": ("ort-fp32", "ort-fp16", "ort-int8", "ort-int4"), "trt": ("trt-fp16", "trt-int4")}
WIDTHS = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4, "int3": 3}  # bits of a value

# Expected cost of a narrower type in points of accuracy, low and high. Sources: int8 encoder, optimum-intel PR 1394
# (none on InternVL2) and our digits model; int4 encoder, TICO PR 559 (0.4 to 1.6 points on VQAv2 with everything int4)
# and our digits model (0.2); int4 decoder, the digits model with GPTQ (0.0) and TICO's (1.6); int8 decoder, assumed
# equal to the int8 encoder.
FREE: Range = (0.0, 0.0)
COSTS: dict[tuple[str, ...], dict[str, Range]] = {
    ("vision", "connector"): {"int8": (0.0, 0.2), "int4": (0.2, 1.6)},
    ("decoder",): {"int8": (0.0, 0.2), "int4": (0.0, 1.6)},
    ("lm_head",): {"int8": (0.0, 0.1), "int4": (0.0, 1.6)},
}


@dataclass(frozen=True)
class _Step:
    """One choice along one dimension: its text, the options it changes and its reason."""

    text: str
    options: dict[str, Any]
    why: str


SWAP = _Step("--swap", {}, "on disk, needed only while engines are built, with `build --max-memory`")


def find_changes(model: PlannedModel, device: PlanDevice, options: PlanOptions) -> list[Change]:
    """The minimal sets of changes that fit, cheapest first: no subset of a set fits.

    options.target must be given.
    """
    base = draft(model, device, options.target or "", options)
    dimensions = [steps for steps in _dimensions(model, base, options) if steps]
    if model.stored is None and _tried(model, base, options, [steps[-1] for steps in dimensions]) is None:
        return []  # everything at once is not enough
    fitting: list[tuple[tuple[int, ...], Change]] = []
    for levels in sorted(product(*(range(len(steps) + 1) for steps in dimensions)), key=sum):
        if any(all(a <= b for a, b in zip(smaller, levels, strict=True)) for smaller, _ in fitting):
            continue
        chosen = [steps[level - 1] for steps, level in zip(dimensions, levels, strict=True) if level]
        change = _tried(model, base, options, chosen) if chosen else None
        if change is not None:
            fitting.append((levels, change))
    ranked = sorted(fitting, key=lambda item: (sum(item[1].accuracy_points), sum(item[0]), item[1].options))
    return [change for _, change in ranked[:MAX_CHANGES]]


def _dimensions(model: PlannedModel, base: Plan, options: PlanOptions) -> Iterator[list[_Step]]:
    """What could change: each dimension's steps, smallest first."""
    if options.residency == "all":
        why = "one phase at a time in memory; a new picture loads its weights again"
        yield [_Step("--residency phase", {"residency": "phase"}, why)]
    if base.build is not None and base.build.is_on_device:
        yield [SWAP]
    yield list(_shorter_contexts(base, options))
    if is_tensorrt(base.target) and (options.chunk_rows or CHUNK_ROWS) > SMALL_CHUNK:
        why = "less scratch; the prompt is read a little slower"
        yield [_Step(f"--chunk-rows {SMALL_CHUNK}", {"chunk_rows": SMALL_CHUNK}, why)]
    head = _narrowed(base, ("lm_head",), "int8", "the head keeps one scale per output or group")
    yield [head] if head.text else []
    if options.images or (base.build is not None and base.build.is_on_device):
        why = "the encoder is a quarter of the model; its codes need `quantize` with the same options"
        encoder = [_narrowed(base, ("vision", "connector"), kind, why) for kind in ("int8", "int4")]
        yield [step for step in encoder if step.text]
    yield list(_narrower_decoders(base, options))


def _shorter_contexts(base: Plan, options: PlanOptions) -> Iterator[_Step]:
    text = max(options.text_tokens, FEWEST_TEXT_TOKENS)
    least = max(options.images * base.image_rows + text + 1, least_context(base.image_rows))
    for tokens in SHORT_CONTEXTS:
        if least <= tokens < base.context_tokens:
            yield _Step(f"--context {tokens}", {"context_tokens": tokens}, "shorter conversations")


def _narrowed(base: Plan, parts: tuple[str, ...], kind: str, why: str) -> _Step:
    """The step that narrows wider parts to `kind`; its text is empty if none is wider."""
    wider = [part for part in parts if WIDTHS.get(base.precision[part], 0) > WIDTHS[kind]]
    text = " ".join(f"--{part.replace('_', '-')} {kind}" for part in wider)
    return _Step(text, {"precisions": dict.fromkeys(wider, kind)}, why)


def _narrower_decoders(base: Plan, options: PlanOptions) -> Iterator[_Step]:
    targets = NARROWER_TARGETS.get(base.target.partition("-")[0], (base.target,))
    for target in targets[targets.index(base.target) + 1 :]:
        kind, has_bits = TARGETS[target]["decoder"], options.bits is not None
        text = f"--target {target} --bits {kind[3:]}" if has_bits else f"--target {target}"
        bits = int(kind[3:]) if has_bits else None
        yield _Step(text, {"target": target, "bits": bits}, f"the decoder's linears in {kind}")
    if options.bits == 8 and TARGETS[base.target]["decoder"] == "int4":
        yield _Step("--bits 4", {"bits": 4}, "the decoder's linears in int4")


def _tried(model: PlannedModel, base: Plan, options: PlanOptions, steps: list[_Step]) -> Change | None:
    """These steps combined, if the result can be exported and fits."""
    chosen, texts = options, [step.text for step in steps]
    for step in steps:
        precisions = {**chosen.precisions, **step.options.get("precisions", {})}
        chosen = replace(chosen, **{**step.options, "precisions": precisions})
    try:
        plan = draft(model, base.device, chosen.target or "", chosen)
        if SWAP in steps and plan.build is not None:
            size = max(1, -(-(plan.build.least_ram_bytes - base.usable_bytes) // 10**9))
            texts[steps.index(SWAP)] = f"{SWAP.text} {size}GB"
            plan = draft(model, base.device, chosen.target or "", replace(chosen, swap=f"{size}GB"))
    except (ExportError, QuantizationError):  # such as codes that a quantized checkpoint lacks
        return None
    if not plan.fits:
        return None
    cost = _cost(model, base.precision, plan.precision)
    why = "; ".join(step.why for step in steps)
    return Change(tuple(texts), max(plan.peak_bytes.values()), cost, why)


def _cost(model: PlannedModel, before: dict[str, str], after: dict[str, str]) -> Range:
    """Expected loss in points; codes already in the checkpoint cost nothing."""
    held = {item.part for item in matrices(model.geometry) if model.stored and item.target in model.stored.by_target}
    low = high = 0.0
    for parts, costs in COSTS.items():
        changed = [after[part] for part in parts if after[part] != before[part] and part not in held]
        worst = max((costs.get(kind, FREE) for kind in changed), default=FREE)
        low, high = low + worst[0], high + worst[1]
    return round(low, 2), round(high, 2)

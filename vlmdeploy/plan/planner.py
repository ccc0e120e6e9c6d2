"""Will it fit, and how fast could it be? From widths, precisions and a device's figures, before anything is downloaded,
quantized or built. The result names its assumptions, and what would make it fit."""

from dataclasses import replace
from typing import Any

from vlmdeploy.plan.changes import find_changes
from vlmdeploy.plan.device import PlanDevice
from vlmdeploy.plan.draft import Plan, draft
from vlmdeploy.plan.options import DEFAULT_TARGETS, PlanOptions, check_options
from vlmdeploy.plan.planned_model import PlannedModel
from vlmdeploy.plan.speed import Range, Speed


def make_plan(model: PlannedModel, device: PlanDevice, options: PlanOptions) -> Plan:
    """Plan one model on one device. Raises ConfigError and ExportError for options that cannot be."""
    target = options.target or DEFAULT_TARGETS[device.kind]
    check_options(model.geometry, target, device, options)
    plan = draft(model, device, target, options)
    if plan.fits:
        return plan
    changes = tuple(find_changes(model, device, replace(options, target=target)))
    verdict = f"fits with {' '.join(changes[0].options)}" if changes else "does not fit"
    return replace(plan, verdict=verdict, changes=changes)


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

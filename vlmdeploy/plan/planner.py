"""Will it fit, and how fast could it be? Answers from widths, precisions and a device's figures before anything is
downloaded, quantized or built. The plan states its assumptions and what would make it fit."""

from dataclasses import replace
from typing import Any

from vlmdeploy.plan.changes import find_changes
from vlmdeploy.plan.device import PlanDevice
from vlmdeploy.plan.draft import Plan, draft
from vlmdeploy.plan.options import DEFAULT_TARGETS, PlanOptions, check_options
from vlmdeploy.plan.planned_model import PlannedModel

RANGES = ("ttft_s", "vision_s", "prefill_s", "decode_tok_s", "reload_s")  # fields of Speed


def make_plan(model: PlannedModel, device: PlanDevice, options: PlanOptions) -> Plan:
    """Plan one model on one device. Raises ConfigError and ExportError for impossible options."""
    target = options.target or DEFAULT_TARGETS[device.kind]
    check_options(model.geometry, target, device, options)
    plan = draft(model, device, target, options)
    if plan.fits:
        return plan
    changes = tuple(find_changes(model, device, replace(options, target=target)))
    verdict = f"fits with {' '.join(changes[0].options)}" if changes else "does not fit"
    return replace(plan, verdict=verdict, changes=changes)


def plan_json(plan: Plan) -> dict[str, Any]:
    """The document of `plan --json`."""
    ranges = {name: getattr(plan.speed, name) for name in RANGES}
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

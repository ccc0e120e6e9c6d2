"""A quantization report as tables: coverage of the experts, errors by kind of linear, chosen widths."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np

from vlmdeploy.spec.matrices import places

Rows = list[list[str]]
COVERAGE_COLUMNS = [
    "expert", "calibration tokens", "samples", "held-out tokens", "wanted tokens", "error with twice as many",
]  # fmt: skip
ERROR_COLUMNS = [
    "linears", "bits / group", "method", "tokens", "effective rank", "condition", "held-out error", "of RTN's",
]  # fmt: skip


def coverage_rows(report: dict[str, Any]) -> Rows:
    """One row per expert."""
    experts = report["calibration"]["experts"]
    keys = ("tokens", "samples", "held_out_tokens", "wanted_tokens")
    names = [expert["expert"] for expert in experts]
    gains: dict[str, list[float]] = defaultdict(list)
    for linear in report["linears"]:
        if linear["held_out_error"] and linear["calibration_error"] is not None:
            gains[_expert_of(linear["name"])].append(_gain_of_twice(linear))
    shown = {name: f"{-100 * np.mean(found):+.0f} %" for name, found in gains.items()}
    return [
        [name, *(f"{expert[key]:,}" for key in keys), shown.get(name, "")]
        for name, expert in zip(names, experts, strict=True)
    ]


def _expert_of(linear: str) -> str:
    """The name that the coverage has for those whose tokens reach a linear."""
    part, *rest = linear.split(".")
    return {"vision": "vision encoder", "lm_head": "language"}.get(part, rest[2] if part == "decoder" else part)


def _gain_of_twice(linear: dict[str, Any]) -> float:
    """The share of its held-out error that twice as many tokens would save. Codes fit some noise of n calibration
    tokens: their error there is e - c / n, on others e + c / n."""
    held_out = linear["held_out_error"]
    return max(0.0, held_out - linear["calibration_error"]) / (4 * held_out)  # type: ignore[no-any-return]


def error_rows(report: dict[str, Any], each: bool) -> Rows:
    """One row per linear, or per kind of linear with means over layers."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    place_of = places([linear["name"] for linear in report["linears"]])
    for linear in report["linears"]:
        groups[linear["name"].removesuffix(".weight") if each else place_of[linear["name"]].kind].append(linear)
    return [[name, *_cells(linears)] for name, linears in groups.items()]


def _cells(linears: list[dict[str, Any]]) -> list[str]:
    return [
        _counted(f"{linear['bits']} / {linear['group_size']}" for linear in linears),
        _counted(_method(linear) for linear in linears),
        _mean(linears, "tokens", "{:,.0f}"),
        _mean(linears, "effective_rank", "{:.0f}"),
        _mean(linears, "condition_number", "{:.1e}"),
        _mean(linears, "held_out_error", "{:.2e}"),
        _ratio(linears),
    ]


def _method(linear: dict[str, Any]) -> str:
    if linear["method"] != "gptq":
        return f"{linear['method']}: {linear['note']}" if linear["note"] else linear["method"]
    extra = f", {linear['sweeps']} sweeps" if linear["sweeps"] else ""
    damping = "" if linear["damping"] is None else f", damping {linear['damping']:g}"
    return f"gptq{damping}{extra}"


def _counted(values: Iterable[str]) -> str:
    counts = Counter(values)
    if len(counts) == 1:
        return next(iter(counts))
    return "; ".join(f"{count} x {value}" for value, count in counts.most_common(3))


def _mean(linears: list[dict[str, Any]], key: str, form: str) -> str:
    values = [linear[key] for linear in linears if linear[key] is not None]
    return form.format(np.mean(values)) if values else ""


def _ratio(linears: list[dict[str, Any]]) -> str:
    ratios = [
        linear["held_out_error"] / linear["held_out_error_rtn"]
        for linear in linears
        if linear["held_out_error"] is not None and linear["held_out_error_rtn"]
    ]
    return f"{np.mean(ratios):.3f}" if ratios else ""


def summary_rows(report: dict[str, Any]) -> Rows:
    """Summary of a run."""
    settings, calibration = report["settings"], report["calibration"]
    bits = Counter(f"{linear['bits']} bits, groups of {linear['group_size']}" for linear in report["linears"])
    rows = [
        ["data", calibration["data"]],
        ["samples", str(calibration["samples"])],
        ["left out as broken", str(calibration.get("skipped", 0))],
        ["hessians", settings["hessian"]],
        ["quality", settings["quality"]],
        ["linears", "; ".join(f"{count} with {kind}" for kind, count in bits.most_common())],
        ["weights on disk", f"{report['size_bytes'] / 1e6:,.1f} MB"],
    ]
    return [row for row in rows if row[1] not in ("0", "")]

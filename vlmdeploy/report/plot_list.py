"""Which plots a report has numbers for, with the title and the message of each; `plots` draws them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from vlmdeploy.report.document import Report
from vlmdeploy.report.numbers import Key, Phrase, Shown
from vlmdeploy.report.plots import (
    draw_differences,
    draw_divergence,
    draw_drift,
    draw_first_token,
    draw_frontier,
    draw_layer_errors,
    draw_memory,
)
from vlmdeploy.report.wording import differences_message, frontier_message, peak_key, range_message

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A plot's name, its title, the number that its message compares, and the words around that number.
COMPARED = (
    ("divergence", "KL divergence from the reference", ("agreement", "kl", "value"), "", " nats per token"),
    ("drift", "How far boxes moved", ("grounding", "drift_median"), "Medians. ", " thousandths"),
    ("first_token", "Time to first token, by phase", ("measurement", "first_token", "p50"), "", " ms"),
)
DRAWN_BY = {"divergence": draw_divergence, "drift": draw_drift, "first_token": draw_first_token}


@dataclass(frozen=True)
class Plot:
    """A plot to draw: `name` is its file's, `message` what it says."""

    name: str
    title: str
    message: tuple[Phrase, ...]
    draw: Callable[[], "Figure"]


def all_plots(report: Report) -> list[Plot]:
    """The plots that the report has numbers for, in the order of the page."""
    plots = []
    if report.frontier is not None and report.frontier.points:
        for other, word in (("latency_ms", "latency"), ("peak_bytes", "memory")):
            message, draw = tuple(frontier_message(report, other)), partial(draw_frontier, report, other)
            plots.append(Plot(f"accuracy_{word}", f"Accuracy against {word}", message, draw))
    if any(model.differences for model in report.models[1:]):
        message, draw = tuple(differences_message(report)), partial(draw_differences, report)
        plots.append(Plot("differences", "Accuracy beside the reference", message, draw))
    for name, title, path, opening, unit in COMPARED:
        if values := _values(report, path):
            message = (opening, *range_message(report, values, "amount", unit))
            plots.append(Plot(name, title, message, partial(DRAWN_BY[name], report)))
    if peaks := _peaks(report):
        message = ("Highest of all phases. ", *range_message(report, peaks, "size", ""))
        plots.append(Plot("memory", "Memory, by phase", message, partial(draw_memory, report)))
    return plots + [_layer_plot(report, place) for place in range(len(report.models)) if _has_errors(report, place)]


def _values(report: Report, path: tuple[str, ...]) -> dict[int, tuple[Key, float]]:
    """By place of the model: the key of a number, and the number; models without it are left out."""
    found: dict[int, tuple[Key, float]] = {}
    for place, model in enumerate(report.models):
        value: Any = model
        for name in path:
            value = None if value is None else getattr(value, name)
        if value is not None:
            found[place] = (("models", place, *path), float(value))
    return found


def _peaks(report: Report) -> dict[int, tuple[Key, float]]:
    found: dict[int, tuple[Key, float]] = {}
    for place, model in enumerate(report.models):
        key = peak_key(report, place)
        if key is not None and model.measurement is not None:
            found[place] = (key, float(model.measurement.memory.peak_bytes))
    return found


def _has_errors(report: Report, place: int) -> bool:
    errors = report.models[place].layer_errors
    return errors is not None and any(error is not None for row in errors.errors for error in row)


def _layer_plot(report: Report, place: int) -> Plot:
    errors, name = report.models[place].layer_errors, report.models[place].subject.name
    assert errors is not None, "called for models with layer errors only"
    _, row, column = max(
        (error, row, column)
        for row, line in enumerate(errors.errors)
        for column, error in enumerate(line)
        if error is not None
    )
    key = ("models", place, "layer_errors", "errors", row, column)
    message = (f"Largest error: {errors.rows[row]}, {errors.columns[column]}, ", Shown("amount", key), ".")
    return Plot(f"layer_errors_{place}", f"Errors by layer: {name}", message, partial(draw_layer_errors, errors))

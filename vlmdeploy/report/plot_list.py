"""Which plots a report has numbers for, with the title and the message of each; `plots` draws them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmdeploy.report.document import LayerErrors, Report
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


@dataclass(frozen=True)
class Plot:
    """A plot to be drawn: `name` is its file's, `message` what it says."""

    name: str
    title: str
    message: tuple[Phrase, ...]
    draw: Callable[[], "Figure"]


def all_plots(report: Report) -> list[Plot]:
    """The plots that the report has numbers for, in the order of the page."""
    plots = []
    if report.frontier is not None and report.frontier.points:
        plots += [_frontier_plot(report, other) for other in ("latency_ms", "peak_bytes")]
    if any(model.differences for model in report.models[1:]):
        message = tuple(differences_message(report))
        plots.append(Plot("differences", "Accuracy beside the reference", message, lambda: draw_differences(report)))
    plots += _agreement_plots(report) + _measured_plots(report)
    for place, model in enumerate(report.models):
        if model.layer_errors is not None and _is_measured(model.layer_errors):
            plots.append(_layer_plot(report, place))
    return plots


def _frontier_plot(report: Report, other: str) -> Plot:
    name, word = ("accuracy_latency", "latency") if other == "latency_ms" else ("accuracy_memory", "memory")
    message = tuple(frontier_message(report, other))
    return Plot(name, f"Accuracy against {word}", message, lambda: draw_frontier(report, other))


def _agreement_plots(report: Report) -> list[Plot]:
    agreements = {place: model.agreement for place, model in enumerate(report.models) if model.agreement is not None}
    groundings = {place: model.grounding for place, model in enumerate(report.models) if model.grounding is not None}
    plots = []
    if agreements:
        values = {place: (_key(place, "agreement", "kl", "value"), each.kl.value) for place, each in agreements.items()}
        message = range_message(report, values, "amount", " nats per token")
        title = "KL divergence from the reference"
        plots.append(Plot("divergence", title, tuple(message), lambda: draw_divergence(report)))
    if groundings:
        drifts = {
            place: (_key(place, "grounding", "drift_median"), each.drift_median) for place, each in groundings.items()
        }
        message = ["Medians. ", *range_message(report, drifts, "amount", " thousandths")]
        plots.append(Plot("drift", "How far boxes moved", tuple(message), lambda: draw_drift(report)))
    return plots


def _measured_plots(report: Report) -> list[Plot]:
    measured = {place: model.measurement for place, model in enumerate(report.models) if model.measurement is not None}
    if not measured:
        return []
    times = {
        place: (_key(place, "measurement", "first_token", "p50"), each.first_token.p50)
        for place, each in measured.items()
    }
    message = range_message(report, times, "amount", " ms")
    plots = [Plot("first_token", "Time to first token, by phase", tuple(message), lambda: draw_first_token(report))]
    keys = {place: peak_key(report, place) for place in measured}
    peaks = {place: (key, float(measured[place].memory.peak_bytes)) for place, key in keys.items() if key is not None}
    if peaks:
        message = ["Highest of all phases. ", *range_message(report, peaks, "size", "")]
        plots.append(Plot("memory", "Memory, by phase", tuple(message), lambda: draw_memory(report)))
    return plots


def _key(place: int, *rest: str) -> Key:
    return ("models", place, *rest)


def _layer_plot(report: Report, place: int) -> Plot:
    errors, name = report.models[place].layer_errors, report.models[place].subject.name
    assert errors is not None, "asked for models with layer errors only"
    _, row, column = max(
        (error, row, column)
        for row, line in enumerate(errors.errors)
        for column, error in enumerate(line)
        if error is not None
    )
    key = ("models", place, "layer_errors", "errors", row, column)
    message = (f"Largest error: {errors.rows[row]}, {errors.columns[column]}, ", Shown("amount", key), ".")
    return Plot(f"layer_errors_{place}", f"Errors by layer: {name}", message, lambda: draw_layer_errors(errors))


def _is_measured(errors: LayerErrors) -> bool:
    return any(error is not None for row in errors.errors for error in row)

"""The plots of a report, one function each, returning a matplotlib Figure.

Colour shows the kind of a thing, never the model: models are labelled with their names, so twenty stay distinct.
"""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmdeploy.report.document import LayerErrors, ModelResult, Report
from vlmdeploy.report.numbers import amount, short_label
from vlmdeploy.report.plot_style import (
    BLUE,
    FULL_IN,
    GREEN,
    GREY,
    HALF_IN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    ROW_IN,
    SKY,
    SURFACE,
    VERMILLION,
    new_figure,
    place_labels,
)
from vlmdeploy.report.wording import main_differences, memory_phases, metric_name, task_name, verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PHASE_COLOURS = {"open": GREY, "preprocess": SKY, "vision": ORANGE, "prefill": GREEN, "decode": BLUE}
VERDICT_COLOURS = {"a loss": VERMILLION, "a gain": BLUE}
MAX_PANELS_PER_ROW = 3


def _axes(figure: "Figure") -> "Axes":
    return figure.axes[0]


def draw_frontier(report: Report, other: str) -> "Figure":
    """Accuracy against "latency_ms" or "peak_bytes"; dominated models are grey and hollow."""
    frontier = report.frontier
    assert frontier is not None, "drawn only if there are points"
    unit, words = 1.0, f"first token and {frontier.new_tokens:,} more, ms"
    if other == "peak_bytes":
        unit, name = _memory_unit(point.peak_bytes for point in frontier.points)
        words = f"highest memory, {name}"
    places = [(getattr(point, other) / unit, 100 * point.accuracy) for point in frontier.points]
    figure = new_figure(HALF_IN, 3.5)
    axes = _axes(figure)
    for point, (x, y) in zip(frontier.points, places, strict=True):
        marker = "D" if point.name == report.reference else "o"
        face, edge = (SURFACE, GREY) if point.is_dominated else (BLUE, BLUE)
        axes.plot(x, y, marker, color=face, markeredgecolor=edge, markersize=6, zorder=3)
    axes.grid(True)
    _limits_around(axes, places)
    axes.set_ylabel("accuracy, %")
    axes.set_xlabel(words)
    _plain_ticks(axes)
    labels = [short_label(point.name) for point in frontier.points]
    place_labels(axes, places, labels, [MUTED if point.is_dominated else INK for point in frontier.points])
    return figure


def _memory_unit(sizes: Iterable[int]) -> tuple[float, str]:
    """Bytes per unit of an axis, and the unit's name."""
    return (1e9, "GB") if max(sizes, default=0) >= 2e9 else (1e6, "MB")


def _limits_around(axes: "Axes", places: Sequence[tuple[float, float]]) -> None:
    """Leave room for labels; widen the range if all points coincide."""
    xs, ys = zip(*places, strict=True)
    for low, high, set_limits in ((min(xs), max(xs), axes.set_xlim), (min(ys), max(ys), axes.set_ylim)):
        spread = (high - low) or max(abs(high) * 0.1, 1.0)
        set_limits(low - 0.22 * spread, high + 0.22 * spread)


def _plain_ticks(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _model_rows(axes: "Axes", models: Iterable[ModelResult]) -> None:
    """One row per model, the first on top."""
    names = [short_label(model.subject.name) for model in models]
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.spines["left"].set_visible(False)
    axes.grid(True, axis="x")


def draw_differences(report: Report) -> "Figure":
    """A forest plot: every model's paired difference and its interval, for the first metric of each task."""
    models = [model for model in report.models[1:] if model.differences]
    differences = [main_differences(model) for model in models]
    columns = list(dict.fromkeys(pair for each in differences for pair in each))
    figure = new_figure(FULL_IN, 1.15 + ROW_IN * len(models), columns=max(1, len(columns)), sharey=True)
    for axes, (task, metric) in zip(figure.axes, columns, strict=False):
        for row, each in enumerate(differences):
            difference = each.get((task, metric))
            if difference is not None:
                colour = VERDICT_COLOURS.get(verdict(difference), MUTED)
                marker = {VERMILLION: "<", BLUE: ">"}.get(colour, "o")
                low, high = 100 * difference.low, 100 * difference.high
                axes.plot([low, high], [row, row], color=colour, linewidth=1.6, solid_capstyle="butt")
                axes.plot(100 * difference.value, row, marker, color=colour, markersize=5)
        _model_rows(axes, models)
        axes.axvline(0, color=INK, linewidth=0.8, zorder=1)
        axes.set_title(f"{task_name(task)}\n{metric_name(metric)}", fontsize=8)
        _symmetric(axes)
    figure.supxlabel("difference to the reference, points (95 % interval)", fontsize=8.5, color=MUTED)
    return figure


def _symmetric(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter

    farthest = max((abs(value) for line in axes.lines for value in np.ravel(line.get_xdata())), default=0.0)
    limit = farthest * 1.15 or 0.1
    axes.set_xlim(-limit, limit)
    step = _round_step(limit * 0.72)
    axes.set_xticks([-step, 0, step])
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:+,g}".replace("-", "\N{MINUS SIGN}") if value else "0")
    )


def _round_step(limit: float) -> float:
    """The largest of 1, 2, 5 x 10^n up to the limit."""
    power = 10.0 ** math.floor(math.log10(limit))
    return max(factor * power for factor in (1, 2, 5) if factor * power <= limit * 1.0001)


def draw_divergence(report: Report) -> "Figure":
    """Mean KL divergence with its interval on a log axis, for questions about pictures and for text alone."""
    models = [model for model in report.models if model.agreement or model.text_only]
    found = [(model.agreement, model.text_only) for model in models]
    positive = [value for pair in found for each in pair if each for value in (each.kl.value, each.kl_p99) if value > 0]
    floor = min(positive, default=1e-3) / 3
    figure = new_figure(HALF_IN, 1.2 + ROW_IN * 1.3 * len(models))
    axes = _axes(figure)
    for row, pair in enumerate(found):
        for agreement, colour, marker, shift in zip(pair, (BLUE, ORANGE), ("o", "s"), (-0.17, 0.17), strict=True):
            if agreement is not None:
                kl, y = agreement.kl, row + shift * (pair[1] is not None and pair[0] is not None)
                axes.plot([max(kl.low, floor), max(kl.high, floor)], [y, y], color=colour, linewidth=1.6)
                axes.plot(max(kl.value, floor), y, marker, color=colour, markersize=5)
                axes.plot(max(agreement.kl_p99, floor), y, "|", color=colour, markersize=7)
    axes.set_xscale("log")
    _model_rows(axes, models)
    _log_ticks(axes, floor, max(positive, default=1e-2))
    axes.set_xlabel("KL divergence, nats per token (log)")
    has_text = any(pair[1] for pair in found)
    entries = [("o", BLUE, "pictures: mean, 95 %")] + ([("s", ORANGE, "text only")] if has_text else [])
    _legend(figure, [*entries, ("|", MUTED, "99th percentile")])
    return figure


def _log_ticks(axes: "Axes", low: float, high: float) -> None:
    """Label powers of ten as plain numbers; 0 is drawn at the left edge."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xlim(low / 1.3, high * 2)
    axes.xaxis.set_major_locator(LogLocator(10, numticks=6))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _legend(figure: "Figure", entries: Sequence[tuple[str, str, str]]) -> None:
    """(marker, colour, words) in a row above the axes; a marker "bar" is a filled patch."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Patch(color=colour, label=words) if marker == "bar"
        else Line2D([], [], marker=marker, color=colour, linestyle="none", markersize=5, label=words)
        for marker, colour, words in entries
    ]  # fmt: skip
    figure.legend(
        handles=handles, loc="outside upper left", ncols=len(handles), fontsize=8, labelcolor=MUTED, columnspacing=1.2,
        handletextpad=0.4, borderpad=0.1,
    )  # fmt: skip


def draw_drift(report: Report) -> "Figure":
    """A histogram per model of how far its boxes moved from the reference's, in percent of its boxes."""
    models = [model for model in report.models if model.grounding is not None]
    columns = min(MAX_PANELS_PER_ROW, len(models))
    rows = math.ceil(len(models) / columns)
    width = FULL_IN if columns > 1 else HALF_IN
    figure = new_figure(width, 0.5 + 1.75 * rows, rows, columns, sharey=True)
    for axes, model in zip(figure.axes, models, strict=False):
        grounding = model.grounding
        assert grounding is not None, "filtered above"
        total = max(1, sum(grounding.counts))
        heights = [100 * number / total for number in grounding.counts]
        axes.bar(range(len(heights)), heights, width=0.86, color=BLUE)
        axes.set_xticks(np.arange(len(grounding.edges)) - 0.5, [f"{edge:g}" for edge in grounding.edges])
        _thin_ticks(axes, len(grounding.edges))
        axes.set_title(short_label(model.subject.name))
        axes.tick_params(axis="x", labelsize=7)
        axes.grid(True, axis="y")
        axes.set_ylim(0, 105)
        axes.set_yticks([0, 50, 100])
    for axes in figure.axes[len(models) :]:
        axes.set_visible(False)
    figure.supxlabel("drift of the farthest edge, thousandths of the picture's side", fontsize=8.5, color=MUTED)
    figure.supylabel("boxes, %", fontsize=8.5, color=MUTED)
    return figure


def _thin_ticks(axes: "Axes", number: int) -> None:
    """Show at most eleven labels under a histogram."""
    step = max(1, math.ceil(number / 11))
    for place, label in enumerate(axes.get_xticklabels()):
        label.set_visible(place % step == 0)


def draw_first_token(report: Report) -> "Figure":
    """Stacked medians of preprocessing, vision and prefill; the label is the median of their sum."""
    figure = new_figure(HALF_IN, 1.0 + ROW_IN * 1.15 * len(report.measured))
    axes = _axes(figure)
    for row, (_, measurement) in enumerate(report.measured):
        left = 0.0
        for phase in ("preprocess", "vision", "prefill"):
            spread = getattr(measurement, phase)
            if spread is not None:
                axes.barh(row, spread.p50, left=left, height=0.62, color=PHASE_COLOURS[phase])
                left += spread.p50
        text, end = amount(measurement.first_token.p50), (left, row)
        axes.annotate(text, end, xytext=(4, 0), textcoords="offset points", va="center", fontsize=8, color=MUTED)
    _model_rows(axes, [model for model, _ in report.measured])
    axes.set_xlim(0, axes.get_xlim()[1] * 1.1)
    axes.set_xlabel("ms, medians")
    _legend(figure, [("bar", PHASE_COLOURS[phase], phase) for phase in ("preprocess", "vision", "prefill")])
    return figure


def draw_memory(report: Report) -> "Figure":
    """The peak of each phase; the dark line is the process's memory before it opened the bundle."""
    shown = [(model, each.memory) for model, each in report.measured if each.memory.phases]
    phases = memory_phases(report)
    figure = new_figure(HALF_IN, 1.0 + (0.16 + 0.085 * len(phases)) * len(shown))
    axes = _axes(figure)
    unit, unit_name = _memory_unit(memory.peak_bytes for _, memory in shown)
    height, colours = 0.78 / len(phases), [PHASE_COLOURS.get(phase, PURPLE) for phase in phases]
    for row, (_, memory) in enumerate(shown):
        for number, (phase, colour) in enumerate(zip(phases, colours, strict=True)):
            if phase in memory.phases:
                y, peak = row - 0.39 + height * (number + 0.5), memory.phases[phase].peak_bytes / unit
                axes.barh(y, peak, height=height * 0.9, color=colour)
        axes.plot([memory.baseline_bytes / unit] * 2, [row - 0.42, row + 0.42], color=INK, linewidth=1.2)
    _model_rows(axes, [model for model, _ in shown])
    axes.set_xlim(left=0)
    axes.set_xlabel(f"resident memory at the peak, {unit_name}")
    entries = [("bar", colour, phase) for phase, colour in zip(phases, colours, strict=True)]
    _legend(figure, [*entries, ("|", INK, "before opening")])
    return figure


def draw_layer_errors(errors: LayerErrors) -> "Figure":
    """Heat maps, layers by kinds of linear: held-out error (log colours), and its ratio to round-to-nearest's."""
    from matplotlib.colors import LogNorm

    tables = [_table(errors.errors), _table(errors.ratios)]
    height = 1.9 + 0.135 * len(errors.rows)
    figure = new_figure(FULL_IN, max(2.6, height), columns=2, sharey=True)
    positive = tables[0][tables[0] > 0]
    low, high = (positive.min(), positive.max()) if positive.size else (1e-6, 1.0)
    norms = [LogNorm(low, max(high, low * 1.01)), LogNorm(0.5, 2.0)]
    titles = ["error, relative to the output", "error by that of round-to-nearest"]
    panels = zip(figure.axes[:2], tables, norms, ("cividis", "PuOr_r"), titles, strict=True)
    for axes, table, norm, colours, title in panels:
        _heat_map(figure, axes, errors, table, norm, colours, title)
    figure.axes[1].tick_params(labelleft=False)
    return figure


def _table(rows: Sequence[Sequence[float | None]]) -> Any:
    """float64 [rows, columns]; NaN where nothing was measured."""
    return np.array([[math.nan if value is None else value for value in row] for row in rows], float)


def _heat_map(
    figure: "Figure", axes: "Axes", errors: LayerErrors, table: Any, norm: Any, colours: str, title: str
) -> None:
    import matplotlib
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    colour_map = matplotlib.colormaps[colours].with_extremes(bad=(0, 0, 0, 0))  # NaN is transparent
    shown = np.maximum(table, norm.vmin)  # a log axis has no 0; NaN stays
    image = axes.imshow(shown, norm=norm, cmap=colour_map, aspect="auto", interpolation="none")
    axes.set_xticks(range(len(errors.columns)), [short_label(name) for name in errors.columns], rotation=90)
    axes.set_yticks(range(len(errors.rows)), [short_label(name) for name in errors.rows])
    axes.tick_params(labelsize=7)
    axes.spines[:].set_visible(False)
    axes.set_title(title)
    bar = figure.colorbar(image, ax=axes, orientation="horizontal", shrink=0.9, aspect=40, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.xaxis.set_minor_locator(NullLocator())
    bar.ax.tick_params(labelsize=7)
    bar.ax.xaxis.set_major_locator(FixedLocator(_log_steps(norm.vmin, norm.vmax)))
    bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _log_steps(low: float, high: float) -> list[float]:
    """At most six round numbers within the range, evenly spread on a log axis if possible."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 1.4, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        steps = [factor * 10.0**power for power in powers for factor in factors]
        inside = [step for step in steps if low * 0.999 <= step <= high * 1.001]
        if len(inside) <= 6:
            return inside
    return inside[:: math.ceil(len(inside) / 6)]

"""The plot of a comparison: relative error and 1 - cosine of every stage on a log axis, drawn by matplotlib."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlmdeploy.artifact import check_file, write_file
from vlmdeploy.diff.verdict import ModelDiff, StageDifference
from vlmdeploy.errors import ConfigError

PLOT_TYPES = (".png", ".svg", ".pdf")
INCHES_PER_STAGE = 0.22


def check_plot(path: Path) -> None:
    """Check, before anything runs, that the plot can be written; raises ConfigError, or ModuleNotFoundError for
    matplotlib."""
    if path.suffix.lower() not in PLOT_TYPES:
        raise ConfigError(f"--plot is {path}, expected a file name that ends in {', '.join(PLOT_TYPES)}")
    check_file(path)
    if not path.parent.is_dir():
        raise ConfigError(f"--plot is {path}: its folder does not exist")
    import matplotlib  # noqa: F401


def write_plot(diff: ModelDiff, path: Path) -> None:
    """Draw the errors of all stages, one colour per expert. Raises ConfigError if the file cannot be written."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(item.stage for item in diff.stages))
    figure = Figure(figsize=(max(8.0, INCHES_PER_STAGE * len(names)), 5.5), layout="constrained")
    axes = figure.subplots()
    axes.set_yscale("log")
    for number, rows in enumerate(dict.fromkeys(item.rows for item in diff.stages)):
        chosen = [item for item in diff.stages if item.rows == rows]
        places = [names.index(item.stage) for item in chosen]
        _draw_rows(axes, places, chosen, "" if rows == "all" else f", {rows} rows", f"C{number}")
    if diff.tolerance.own > 0:
        axes.axhline(diff.tolerance.own, color="grey", lw=1, label=f"tolerance {diff.tolerance.own:g}")
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_title(f"A: {diff.a}\nB: {diff.b}", fontsize=9, parse_math=False)
    axes.legend(fontsize=8)
    try:
        write_file(path, lambda file: figure.savefig(file, dpi=120, format=path.suffix[1:].lower()))
    except OSError as error:
        raise ConfigError(f"--plot is {path}: cannot be written ({error.strerror or error})") from error


def _draw_rows(axes: Any, places: list[int], stages: list[StageDifference], label: str, color: str) -> None:
    """Draw one expert's rows on matplotlib's axes."""
    errors = _drawn(item.own.relative_error for item in stages)
    distances = _drawn(1 - item.own.cosine_mean for item in stages)
    axes.plot(places, errors, "o-", ms=3, color=color, label=f"relative error{label}")
    axes.plot(places, distances, ":", color=color, label=f"1 - cosine{label}")
    if stages[0].isolated is not None:
        alone = _drawn(item.isolated.relative_error for item in stages if item.isolated)
        axes.plot(places, alone, "x", color=color, label=f"isolated{label}")


def _drawn(values: Iterable[float]) -> list[float]:
    """Values for a log axis: NaN instead of 0 and Inf."""
    return [value if 0 < value < math.inf else math.nan for value in values]

"""A report as CSV files for other programs, with unrounded numbers.

An empty cell means that there is no such number: the reference has no difference, or nothing was measured. Text is
written verbatim, even if a spreadsheet would read it as a formula.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence

from vlmdeploy.report.document import Agreement, ModelResult, Report
from vlmdeploy.score.metrics import Score

Cell = str | int | float | None
Rows = list[Sequence[Cell]]

SCORE_COLUMNS = (
    "model", "task", "metric", "value", "low", "high", "count", "difference", "difference_low", "difference_high",
    "lost", "gained", "p_value",
)  # fmt: skip
AGREEMENT_COLUMNS = (
    "model", "part", "source", "questions", "tokens", "kl", "kl_low", "kl_high", "kl_median", "kl_p99", "kl_max",
    "top1", "top1_low", "top1_high", "perplexity", "perplexity_low", "perplexity_high", "reference_perplexity",
)  # fmt: skip
LATENCY_COLUMNS = ("model", "phase", "p50_ms", "p95_ms", "mean_ms", "minimum_ms", "count", "tokens_per_s")
MEMORY_COLUMNS = (
    "model", "phase", "peak_bytes", "end_bytes", "end_anonymous_bytes", "end_file_bytes", "device_peak_bytes",
    "baseline_bytes", "device_planned_bytes",
)  # fmt: skip
LAYER_COLUMNS = ("model", "layer", "linear", "bits", "error", "ratio_to_rtn")
REGRESSION_COLUMNS = (
    "model", "task", "kind", "metric", "before", "after", "picture", "question", "expected", "reference_answer",
    "answer",
)  # fmt: skip
PHASES = ("preprocess", "vision", "prefill", "first_token", "decode_per_token")


def all_tables(report: Report) -> dict[str, Rows]:
    """The rows of every table by file name, headings first."""
    tables = {
        "scores.csv": (SCORE_COLUMNS, score_rows),
        "agreement.csv": (AGREEMENT_COLUMNS, agreement_rows),
        "latency.csv": (LATENCY_COLUMNS, latency_rows),
        "memory.csv": (MEMORY_COLUMNS, memory_rows),
        "layer_errors.csv": (LAYER_COLUMNS, layer_rows),
        "regressions.csv": (REGRESSION_COLUMNS, regression_rows),
    }
    return {
        name: [columns, *([model.subject.name, *row] for model in report.models for row in rows(model))]
        for name, (columns, rows) in tables.items()
    }


def csv_text(rows: Iterable[Sequence[Cell]]) -> str:
    """RFC 4180 with CR LF line ends; floats as Python writes them, so they read back equal."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows(rows)
    return buffer.getvalue()


def score_rows(model: ModelResult) -> Iterator[Sequence[Cell]]:
    """One line per task and metric."""
    for task, metrics in model.tasks.items():
        for metric, score in metrics.items():
            difference = (model.differences or {}).get(task, {}).get(metric)
            flips = (model.flips or {}).get(task, {}).get(metric)
            flipped = (flips.lost, flips.gained, flips.p_value) if flips is not None else (None, None, None)
            yield task, metric, *_score(score), score.count, *_score(difference), *flipped


def _score(score: Score | None) -> tuple[float | None, float | None, float | None]:
    return (None, None, None) if score is None else (score.value, score.low, score.high)


def agreement_rows(model: ModelResult) -> Iterator[Sequence[Cell]]:
    """One line for pictures, and one for text alone."""
    parts: tuple[tuple[str, Agreement | None], ...] = (("pictures", model.agreement), ("text_only", model.text_only))
    for part, found in parts:
        if found is not None:
            divergence = (*_score(found.kl), found.kl_median, found.kl_p99, found.kl_max)
            perplexity = (*_score(found.perplexity), found.reference_perplexity)
            yield part, found.source, found.questions, found.tokens, *divergence, *_score(found.top1), *perplexity


def latency_rows(model: ModelResult) -> Iterator[Sequence[Cell]]:
    """One line per phase."""
    measurement = model.measurement
    if measurement is None:
        return
    rates = {"prefill": measurement.prefill_tok_s, "decode_per_token": measurement.decode_tok_s}
    for phase in PHASES:
        spread = getattr(measurement, phase)
        if spread is not None:
            yield phase, spread.p50, spread.p95, spread.mean, spread.minimum, spread.count, rates.get(phase)


def memory_rows(model: ModelResult) -> Iterator[Sequence[Cell]]:
    """One line per phase."""
    if model.measurement is None:
        return
    memory = model.measurement.memory
    for name, phase in memory.phases.items():
        ends = (phase.end_bytes, phase.end_anonymous_bytes, phase.end_file_bytes)
        whole = (memory.baseline_bytes, memory.device_planned_bytes)
        yield name, phase.peak_bytes, *ends, phase.device_peak_bytes, *whole


def layer_rows(model: ModelResult) -> Iterator[Sequence[Cell]]:
    """One line per linear that has bits or an error."""
    errors = model.layer_errors
    if errors is None:
        return
    for layer, row in zip(errors.rows, zip(errors.bits, errors.errors, errors.ratios, strict=True), strict=True):
        for linear, *cells in zip(errors.columns, *row, strict=True):
            if any(cell is not None for cell in cells):
                yield layer, linear, *cells


def regression_rows(model: ModelResult) -> Iterator[Sequence[Cell]]:
    """One line per shown regression."""
    for each in model.regressions:
        change = (each.metric, each.before, each.after, each.picture)
        yield each.task, each.kind, *change, each.question, each.expected, each.reference_answer, each.answer

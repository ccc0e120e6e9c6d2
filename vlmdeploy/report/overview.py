"""A report in one table, for the terminal."""

from vlmdeploy.byte_sizes import megabytes
from vlmdeploy.report.document import ModelResult, Report
from vlmdeploy.score.metrics import TASK_METRICS, Score

SUMMARY_COLUMNS = ["model", "accuracy, difference to the reference", "KL", "first token", "decoding", "peak", "on disk"]


def summary_rows(report: Report) -> list[list[str]]:
    """A line per model; accuracy by the first metric of each task."""
    return [_row(result) for result in report.models]


def _row(result: ModelResult) -> list[str]:
    measured = result.measurement
    return [
        result.subject.name,
        "; ".join(_accuracy(result, task) for task in result.tasks),
        "" if result.agreement is None else f"{result.agreement.kl.value:.2e}",
        "" if measured is None else f"{measured.first_token.p50:.0f} ms",
        "" if measured is None else f"{measured.decode_tok_s:.1f} tokens/s",
        "" if measured is None else megabytes(measured.memory.peak_bytes),
        megabytes(result.subject.size_bytes),
    ]


def _accuracy(result: ModelResult, task: str) -> str:
    metric = TASK_METRICS[task][0]
    value = f"{task} {100 * result.tasks[task][metric].value:.2f} %"
    return value if result.differences is None else f"{value} ({_points(result.differences[task][metric])})"


def _points(difference: Score) -> str:
    return f"{100 * difference.value:+.2f}, {100 * difference.low:+.2f} to {100 * difference.high:+.2f}"

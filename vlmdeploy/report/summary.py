"""The report in one screen of Markdown: a sentence on each model, and one table."""

import re
from collections.abc import Iterator

from vlmdeploy.report.document import Report
from vlmdeploy.report.numbers import Document, Piece, Shown
from vlmdeploy.report.wording import main_metrics, model_sentence, peak_key, task_name

SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~&$])")
MAX_NAME = 80
NOTHING = "\N{EN DASH}"


def render_summary(document: Document) -> str:
    """The whole summary.md."""
    report = document.report
    lines = [f"# {escaped(report.title)}", ""]
    lines += [
        f"Compared with **{escaped(report.reference)}**, the reference, on {escaped(report.data.description)}.",
        "",
    ]
    for place, model in enumerate(report.models):
        sentence = document.sentence(model_sentence(report, place))
        lines.append(f"- **{escaped(model.subject.name)}**: {sentence}.")
    lines += ["", *(_line(row) for row in table_rows(document))]
    lines += [
        "",
        "Differences to the reference are in points with 95 % intervals; one that holds 0 is no loss and no gain.",
    ]
    if report.failures:
        failures = (f"- **{escaped(each.name)}**: {escaped(each.error, 300)}" for each in report.failures)
        lines += ["", "Could not be made or scored:", "", *failures]
    return "\n".join(lines) + "\n"


def escaped(text: str, length: int = MAX_NAME) -> str:
    """Text on one line that Markdown takes for nothing but text."""
    words = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    shown = words if len(words) <= length else f"{words[:length]}\N{HORIZONTAL ELLIPSIS}"
    return SPECIAL.sub(r"\\\1", shown) or "(empty)"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table_rows(document: Document) -> Iterator[list[str]]:
    """Headings, the line below them, then a line for each model."""
    report = document.report
    columns = main_metrics(report.models[0])
    tasks = [name for task, _ in columns for name in (task_name(task), "difference")]
    headings = ["model", *map(escaped, tasks), "on disk", "first token, ms", "tokens/s", "memory"]
    yield headings
    yield ["---", *["---:"] * (len(headings) - 1)]
    for place, model in enumerate(report.models):
        scores = [cell for task, metric in columns for cell in _score_cells(report, place, task, metric)]
        shown = (document.sentence(cell) or NOTHING for cell in (*scores, *_cost_cells(report, place)))
        yield [escaped(model.subject.name), *shown]


def _score_cells(report: Report, place: int, task: str, metric: str) -> Iterator[list[Piece]]:
    model, key = report.models[place], ("models", place)
    is_scored = metric in model.tasks.get(task, {})
    yield [Shown("share", (*key, "tasks", task, metric, "value"))] if is_scored else []
    if metric not in (model.differences or {}).get(task, {}):
        yield []
        return
    value, low, high = (Shown("points", (*key, "differences", task, metric, end)) for end in ("value", "low", "high"))
    yield [value, " (", low, " to ", high, ")"]


def _cost_cells(report: Report, place: int) -> Iterator[list[Piece]]:
    yield [Shown("size", ("models", place, "subject", "size_bytes"))]
    key = ("models", place, "measurement")
    is_measured = report.models[place].measurement is not None
    yield [Shown("amount", (*key, "first_token", "p50"))] if is_measured else []
    yield [Shown("amount", (*key, "decode_tok_s"))] if is_measured else []
    peak = peak_key(report, place)
    yield [Shown("size", peak)] if peak is not None else []

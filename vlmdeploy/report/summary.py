"""The report as one screen of Markdown: a sentence per model, and one table."""

import re
from collections.abc import Iterator

from vlmdeploy.report.numbers import Document
from vlmdeploy.report.overview import text_table
from vlmdeploy.report.wording import model_sentence

SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~&$])")
MAX_NAME = 80


def render_summary(document: Document) -> str:
    """The whole summary.md."""
    report = document.report
    compared = f"Compared with **{escaped(report.reference)}**, the reference, on {escaped(report.data.description)}."
    lines = [f"# {escaped(report.title)}", "", compared, ""]
    for place, model in enumerate(report.models):
        sentence = document.sentence(model_sentence(report, place))
        lines.append(f"- **{escaped(model.subject.name)}**: {sentence}.")
    note = "Differences from the reference are in points with 95 % intervals; one that contains 0 is no loss or gain."
    lines += ["", *_table(document), "", note]
    if report.failures:
        failures = (f"- **{escaped(each.name)}**: {escaped(each.error, 300)}" for each in report.failures)
        lines += ["", "Could not be made or scored:", "", *failures]
    return "\n".join(lines) + "\n"


def escaped(text: str, length: int = MAX_NAME) -> str:
    """Text on one line, escaped for Markdown."""
    words = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    shown = words if len(words) <= length else f"{words[:length]}\N{HORIZONTAL ELLIPSIS}"
    return SPECIAL.sub(r"\\\1", shown) or "(empty)"


def _table(document: Document) -> Iterator[str]:
    """Headings, the rule below them, then one line per model."""
    headings, rows = text_table(document)
    yield _line(["model", *map(escaped, headings)])
    yield _line(["---", *["---:"] * len(headings)])
    for model, row in zip(document.report.models, rows, strict=True):
        yield _line([escaped(model.subject.name), *row])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"

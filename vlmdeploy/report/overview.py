"""The report in one table, one line per model: the page, summary.md and the terminal show the same cells."""

from dataclasses import dataclass

from vlmdeploy.report.document import Report
from vlmdeploy.report.numbers import Document, Phrase, Shown
from vlmdeploy.report.wording import difference, main_metrics, metric_name, peak_key, task_name, verdict

NOTHING = "\N{EN DASH}"


@dataclass(frozen=True)
class Cell:
    """A model's value in one column. difference: from the reference, with its verdict; missing: why there is none."""

    value: Shown | None
    missing: str = NOTHING
    difference: tuple[Phrase, ...] = ()
    verdict: str = ""


def columns(report: Report) -> list[tuple[str, str]]:
    """(heading, metric or unit) of every column after the model's name; tasks come first."""
    tasks = [(task_name(task), metric_name(metric)) for task, metric in main_metrics(report.models[0])]
    compared = [("Equal answers", ""), ("KL", "nats/token")] if report.models[1:] else []
    costs = [("On disk", ""), ("First token", "ms, median"), ("Decode", "tokens/s"), ("Memory", "highest")]
    return tasks + compared + costs


def cells(report: Report, place: int) -> list[Cell]:
    """A model's cells."""
    model, key = report.models[place], ("models", place)

    def cell(form: str, *path: str, is_known: bool, missing: str = NOTHING) -> Cell:
        return Cell(Shown(form, (*key, *path)) if is_known else None, missing)

    compared = [
        cell("share", "equal_answers", "value", is_known=model.equal_answers is not None),
        cell("amount", "agreement", "kl", "value", is_known=model.agreement is not None),
    ]
    measured = [
        cell("amount", "measurement", *path, is_known=model.measurement is not None, missing="not measured")
        for path in (("first_token", "p50"), ("decode_tok_s",))
    ]
    peak = peak_key(report, place)
    return [
        *(_score(report, place, task, metric) for task, metric in main_metrics(report.models[0])),
        *(compared if report.models[1:] else ()),
        cell("size", "subject", "size_bytes", is_known=True),
        *measured,
        Cell(None if peak is None else Shown("size", peak), "not measured"),
    ]


def _score(report: Report, place: int, task: str, metric: str) -> Cell:
    model, key = report.models[place], ("models", place)
    if metric not in model.tasks.get(task, {}):
        return Cell(None, "not asked")
    value = Shown("share", (*key, "tasks", task, metric, "value"))
    found = (model.differences or {}).get(task, {}).get(metric)
    if found is None:
        return Cell(value)
    return Cell(value, NOTHING, tuple(difference((*key, "differences", task, metric))), verdict(found))


def text_table(document: Document) -> tuple[list[str], list[list[str]]]:
    """Headings and rows as text, without model names."""
    report = document.report
    headings = [f"{heading}, {unit}" if unit else heading for heading, unit in columns(report)]
    return headings, [[_text(document, cell) for cell in cells(report, place)] for place in range(len(report.models))]


def _text(document: Document, cell: Cell) -> str:
    if cell.value is None:
        return NOTHING
    return document.sentence([cell.value, ", ", *cell.difference] if cell.difference else [cell.value])


def terminal_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Headings and rows with all tasks in one column, to be narrow."""
    headings, texts = text_table(Document(report))
    tasks = [task_name(task) for task, _ in main_metrics(report.models[0])]
    rows = []
    for model, row in zip(report.models, texts, strict=True):
        scores = "; ".join(f"{task} {score}" for task, score in zip(tasks, row, strict=False))
        rows.append([model.subject.name, scores, *row[len(tasks) :]])
    return ["model", "accuracy, difference to the reference", *headings[len(tasks) :]], rows

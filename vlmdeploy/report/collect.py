"""From evaluations to the report: computes every number that the page shows, from answers and measurements."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from vlmdeploy.bench.measurement import Measurement
from vlmdeploy.data.samples import Sample
from vlmdeploy.quant.quantization_report import REPORT_NAME, LinearReport, read_report
from vlmdeploy.records import record_of
from vlmdeploy.report.compared import (
    DRIFT_EDGES,
    LEAST_FALL,
    Fall,
    drift,
    drift_counts,
    falls_of,
    first_box,
    flips_of,
    worst,
)
from vlmdeploy.report.document import (
    BoxExample,
    Frontier,
    FrontierPoint,
    Grounding,
    LayerErrors,
    ModelResult,
    Regression,
    ReportedModel,
)
from vlmdeploy.report.evaluation import Evaluation
from vlmdeploy.report.pictures import PictureFolder
from vlmdeploy.report.wording import metric_name, task_name
from vlmdeploy.score.answerers import Validation, agreement
from vlmdeploy.score.metrics import TASK_METRICS, Prediction, box_iou, measure, paired_differences, score
from vlmdeploy.spec.matrices import MatrixPlace, places

SHOWN_REGRESSIONS = 9
SHOWN_BOXES = 4
Item = TypeVar("Item")


def model_result(
    subject: ReportedModel,
    samples: Sequence[Sample],
    evaluation: Evaluation,
    reference: Evaluation | None,
    pictures: PictureFolder,
    follow_links: bool = False,
) -> ModelResult:
    """The result of one model; reference None: this is the reference. follow_links: out of a checkpoint's folder."""
    predictions = evaluation.predictions(samples)
    alone = ModelResult(
        subject=subject,
        tasks=score(predictions),
        differences=None,
        flips=None,
        equal_answers=None,
        agreement=evaluation.agreement,
        text_only=evaluation.text_only,
        grounding=None,
        measurement=evaluation.measurement,
        unmeasured=evaluation.unmeasured,
        layer_errors=layer_errors(Path(subject.path), follow_links),
        regressions=(),
        num_regressions=0,
        num_improvements=0,
    )
    return alone if reference is None else _compared(alone, reference.predictions(samples), predictions, pictures)


def _compared(
    alone: ModelResult, reference: list[Prediction], predictions: list[Prediction], pictures: PictureFolder
) -> ModelResult:
    tasks = [prediction.sample.task for prediction in predictions]
    before, after = ([measure(prediction) for prediction in each] for each in (reference, predictions))
    falls = falls_of(before, after)
    return replace(
        alone,
        differences=paired_differences(reference, predictions),
        flips=flips_of(tasks, before, after),
        equal_answers=agreement(Validation({}, tuple(reference)), Validation({}, tuple(predictions))),
        grounding=_grounding(reference, predictions, pictures),
        regressions=tuple(
            _regression(reference[fall.place], predictions[fall.place], fall, pictures)
            for fall in worst(falls, tasks, SHOWN_REGRESSIONS)
        ),
        num_regressions=sum(fall.size >= LEAST_FALL for fall in falls),
        num_improvements=sum(fall.size >= LEAST_FALL for fall in falls_of(after, before)),
    )


def _regression(before: Prediction, after: Prediction, fall: Fall, pictures: PictureFolder) -> Regression:
    sample = before.sample
    return Regression(
        task=sample.task,
        kind=sample.kind,
        picture=None if sample.image is None else pictures.add(sample.image).name,
        question=sample.turns[-1].user,
        expected=_expected(sample),
        reference_answer=before.text,
        answer=after.text,
        metric=fall.metric,
        before=fall.before,
        after=fall.after,
    )


def _expected(sample: Sample) -> str:
    if sample.references:
        return " | ".join(dict.fromkeys(sample.references))
    return "; ".join(", ".join(f"{edge:g}" for edge in box) for box in sample.boxes)


def _grounding(reference: list[Prediction], predictions: list[Prediction], pictures: PictureFolder) -> Grounding | None:
    """How boxes of `rec` questions moved; None without such questions."""
    pairs = [
        (before, after) for before, after in zip(reference, predictions, strict=True) if before.sample.task == "rec"
    ]
    if not pairs:
        return None
    boxes = [(first_box(before), first_box(after)) for before, after in pairs]
    drifts = [drift(one, other) if one and other else None for one, other in boxes]
    known = [value for value in drifts if value is not None]
    order = sorted(range(len(pairs)), key=lambda place: -1e9 if drifts[place] is None else -(drifts[place] or 0.0))
    moved = [place for place in order if drifts[place] != 0] or order[:1]
    examples = [_box_example(*pairs[place], drifts[place], pictures) for place in moved[:SHOWN_BOXES]]
    median, p95 = np.quantile(known, (0.5, 0.95)).tolist() if known else (0.0, 0.0)
    return Grounding(len(known), DRIFT_EDGES, drift_counts(known), median, p95, tuple(examples))


def _box_example(before: Prediction, after: Prediction, moved: float | None, pictures: PictureFolder) -> BoxExample:
    sample = before.sample
    assert sample.image is not None, "a question for a box has a picture"
    shown = pictures.add(sample.image)
    one, other = first_box(before), first_box(after)
    return BoxExample(
        picture=shown.name,
        question=sample.turns[-1].user,
        expected=shown.scaled(sample.boxes[0]),
        reference=None if one is None else shown.scaled(one.pixels),
        model=None if other is None else shown.scaled(other.pixels),
        drift=moved,
        iou=0.0 if other is None else box_iou(other.pixels, sample.boxes[0]),
    )


def layer_errors(folder: Path, follow_links: bool = False) -> LayerErrors | None:
    """Held-out errors from a bundle's or checkpoint's quantization report; None without one. Raises ConfigError for a
    damaged report."""
    content = read_report(folder, follow_links)
    if not content:
        return None
    linears = [record_of(LinearReport, linear, str(folder / REPORT_NAME)) for linear in content["linears"]]
    place_of = places([linear.name for linear in linears])
    cells = {_cell(place_of[linear.name]): linear for linear in linears}
    rows = list(dict.fromkeys(row for row, _ in cells))
    columns = list(dict.fromkeys(column for _, column in cells))
    table = [[cells.get((row, column)) for column in columns] for row in rows]

    def values(value_of: Callable[[LinearReport], Item | None]) -> tuple[tuple[Item | None, ...], ...]:
        return tuple(tuple(None if cell is None else value_of(cell) for cell in row) for row in table)

    errors, bits = values(lambda linear: linear.held_out_error), values(lambda linear: linear.bits)
    return LayerErrors(tuple(rows), tuple(columns), errors, values(_ratio), bits)


def _cell(place: MatrixPlace) -> tuple[str, str]:
    """Row and column of a linear, such as "decoder 3" and "language qkv"."""
    row = (place.part.replace("_", " "), None if place.layer is None else str(place.layer))
    column = (place.expert, place.name.replace(".", " "))
    return " ".join(filter(None, row)), " ".join(filter(None, column)) or "all"


def _ratio(linear: LinearReport) -> float | None:
    if linear.held_out_error is None or not linear.held_out_error_rtn:
        return None
    return linear.held_out_error / linear.held_out_error_rtn


def frontier(results: Sequence[ModelResult]) -> Frontier | None:
    """Accuracy against latency and memory of the measured models; None if none was measured."""
    measured = [(result, result.measurement) for result in results if result.measurement is not None]
    if not measured:
        return None
    tasks = [task for task in TASK_METRICS if task in results[0].tasks]
    metrics = tuple(f"{task_name(task)} {metric_name(TASK_METRICS[task][0])}" for task in tasks)
    points = [_point(result, measurement, tasks) for result, measurement in measured]
    judged = (replace(point, is_dominated=any(dominates(other, point) for other in points)) for point in points)
    return Frontier(metrics, measured[0][1].new_tokens, tuple(judged))


def _point(result: ModelResult, measurement: Measurement, tasks: Sequence[str]) -> FrontierPoint:
    accuracy = float(np.mean([result.tasks[task][TASK_METRICS[task][0]].value for task in tasks]))
    latency = measurement.first_token.p50 + measurement.new_tokens * measurement.decode_per_token.p50
    return FrontierPoint(result.subject.name, accuracy, latency, measurement.memory.peak_bytes, is_dominated=False)


def dominates(one: FrontierPoint, other: FrontierPoint) -> bool:
    """Whether `one` is at least as good as `other` in accuracy, latency and memory, and better in one of them."""
    mine, theirs = ((point.accuracy, -point.latency_ms, -point.peak_bytes) for point in (one, other))
    return mine != theirs and all(a >= b for a, b in zip(mine, theirs, strict=True))


def questions_by_task(samples: Sequence[Sample]) -> dict[str, int]:
    """The number of questions per task, in the order of TASK_METRICS."""
    counts = Counter(sample.task for sample in samples)
    return {task: counts[task] for task in TASK_METRICS if task in counts}

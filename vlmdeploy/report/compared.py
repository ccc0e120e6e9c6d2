"""How a model's answers differ from the reference's: flips and their test, box drift, the worst regressions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vlmdeploy.report.document import Flips
from vlmdeploy.runtime.boxes import Box, parse_boxes
from vlmdeploy.score.metrics import SHARES, TASK_METRICS, Prediction

Measures = Mapping[str, float]  # of one answer, by metric
LEAST_FALL = 0.1  # of a metric, for an answer to count as worse
DRIFT_EDGES = (0.0, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 1000.0)  # thousandths of the picture's side


def mcnemar_p(lost: int, gained: int) -> float:
    """McNemar's exact test, two-sided: how likely chance alone splits the changed questions at least this unevenly.

    Twice the binomial tail of min(lost, gained) successes in lost + gained fair trials; 1 if nothing changed.
    """
    count = lost + gained
    if lost == gained:
        return 1.0
    logs = [
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) - count * math.log(2)
        for k in range(min(lost, gained) + 1)
    ]
    highest = max(logs)
    return min(1.0, 2 * math.exp(highest) * math.fsum(math.exp(each - highest) for each in logs))


def flips_of(
    tasks: Sequence[str], reference: Sequence[Measures], model: Sequence[Measures]
) -> dict[str, dict[str, Flips]]:
    """Questions lost and gained, by task and 0-or-1 metric. tasks: one per question."""
    found: dict[str, dict[str, Flips]] = {}
    for task, metrics in TASK_METRICS.items():
        pairs = [(one, other) for each, one, other in zip(tasks, reference, model, strict=True) if each == task]
        for metric in metrics:
            if pairs and metric in SHARES:
                lost = sum(before[metric] > after[metric] for before, after in pairs)
                gained = sum(before[metric] < after[metric] for before, after in pairs)
                found.setdefault(task, {})[metric] = Flips(lost, gained, mcnemar_p(lost, gained))
    return found


@dataclass(frozen=True)
class Fall:
    """How one answer changed: the metric that fell most, and its values. place: index of the answer."""

    place: int
    metric: str
    before: float
    after: float

    @property
    def size(self) -> float:
        """How much it fell; negative if every metric rose."""
        return self.before - self.after


def falls_of(reference: Sequence[Measures], model: Sequence[Measures]) -> list[Fall]:
    """The change of each answer's worst metric, answer by answer."""
    falls = []
    for place, (before, after) in enumerate(zip(reference, model, strict=True)):
        metric = max(before, key=lambda name: before[name] - after[name])
        falls.append(Fall(place, metric, before[metric], after[metric]))
    return falls


def worst(falls: Sequence[Fall], tasks: Sequence[str], count: int) -> list[Fall]:
    """The `count` largest falls of at least LEAST_FALL, round-robin over tasks so that no task hides the others."""
    queues: dict[str, list[Fall]] = {}
    for fall in sorted(falls, key=lambda each: (-each.size, each.place)):
        if fall.size >= LEAST_FALL:
            queues.setdefault(tasks[fall.place], []).append(fall)
    chosen: list[Fall] = []
    while len(chosen) < count and any(queues.values()):
        for queue in queues.values():
            if queue and len(chosen) < count:
                chosen.append(queue.pop(0))
    return chosen


def first_box(prediction: Prediction) -> Box | None:
    """The first box in an answer; None if none can be read."""
    assert prediction.size_px is not None, "an answer about a picture comes with its size"
    boxes = parse_boxes(prediction.text, *prediction.size_px)
    return boxes[0] if boxes else None


def drift(a: Box, b: Box) -> float:
    """How far the farthest edge moved, in thousandths of the picture's side along its axis."""
    return float(max(abs(one - other) for one, other in zip(a.norm, b.norm, strict=True)))


def drift_counts(drifts: Sequence[float]) -> tuple[int, ...]:
    """Histogram of drifts over DRIFT_EDGES."""
    return tuple(np.histogram(drifts, DRIFT_EDGES)[0].tolist())

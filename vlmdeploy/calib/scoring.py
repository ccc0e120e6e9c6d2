"""The one definition of every metric, for training, validation of checkpoints and validation of bundles.

Texts are compared lower-cased, every run of white space as one space, none at the ends; nothing else is forgiven.
  vqa, reg   exact_match      share of answers equal to the reference
  caption    exact_match and token_f1, the harmonic mean of precision and recall over words, repeated words counted
  rec        acc@0.5          share of answers whose first box has an IoU of at least 0.5 with the reference
             mean_iou         that IoU, 0 without a box
             parse_rate       share of answers in which a box can be read
A task's value is the unweighted mean over its kinds, `extra` rows left out (unless the task has no others); where a
task has several kinds, each one stands beside it as metric/kind. Intervals hold 95 %: Wilson's for a share of
questions, a bootstrap over pictures for the rest, because questions about one picture share their luck.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from vlmdeploy.data.samples import PixelBox, Sample
from vlmdeploy.errors import DataError
from vlmdeploy.runtime.boxes import parse_boxes

TASK_METRICS = {
    "vqa": ("exact_match",),
    "rec": ("acc@0.5", "mean_iou", "parse_rate"),
    "reg": ("exact_match",),
    "caption": ("exact_match", "token_f1"),
}
SHARES = frozenset(("exact_match", "acc@0.5", "parse_rate"))  # metrics that are 0 or 1 for one answer
IOU_THRESHOLD = 0.5
Z_95 = 1.959964
NUM_RESAMPLES = 1000
BOOTSTRAP_SEED = 0

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Score:
    """A metric with its 95 % interval, over `count` questions."""

    value: float
    low: float
    high: float
    count: int


Scores = dict[str, dict[str, Score]]  # task -> metric, or metric/kind


@dataclass(frozen=True)
class Prediction:
    """What a model answered: `text` and its `ids` without the stop id; size_px is the picture's width and height."""

    sample: Sample
    text: str
    ids: tuple[int, ...] = ()
    size_px: tuple[int, int] | None = None


def check_scorable(samples: Iterable[Sample]) -> None:
    """Raise DataError, naming the first sample that cannot be scored: unknown task, or no reference."""
    for sample in samples:
        where = f"question {sample.turns[-1].user!r} about {sample.image}"
        if sample.task not in TASK_METRICS:
            raise DataError(f'{where}: task "{sample.task}" has no metric; known: {", ".join(TASK_METRICS)}')
        if sample.task == "rec" and (sample.image is None or len(sample.boxes) != 1):
            raise DataError(f"{where}: task rec has {len(sample.boxes)} boxes, expected a picture and one box in it")
        if sample.task != "rec" and sample.answer is None:
            raise DataError(f"{where}: has no reference answer")


def score(predictions: Sequence[Prediction]) -> Scores:
    """Scores of every task that occurs, in the order of TASK_METRICS. Raises DataError if a sample has no reference."""
    check_scorable(prediction.sample for prediction in predictions)
    scores: Scores = {}
    for task, metrics in TASK_METRICS.items():
        of_task = [prediction for prediction in predictions if prediction.sample.task == task]
        if of_task:
            measured = [measure(prediction) for prediction in of_task]
            scores[task] = {}
            for metric in metrics:
                values = np.array([each[metric] for each in measured])
                scores[task].update(_task_scores(metric, of_task, values))
    return scores


def paired_differences(first: Sequence[Prediction], second: Sequence[Prediction]) -> Scores:
    """How much better the second model is, metric by metric, on the same samples in the same order; every interval is a
    bootstrap over pictures of the difference itself, which is far narrower than two intervals side by side."""
    differences: Scores = {}
    for task, metrics in TASK_METRICS.items():
        places = [place for place, prediction in enumerate(first) if prediction.sample.task == task]
        if not places:
            continue
        samples = [first[place].sample for place in places]
        before, after = ([measure(model[place]) for place in places] for model in (first, second))
        differences[task] = {
            metric: _difference(samples, np.array([b[metric] - a[metric] for a, b in zip(before, after, strict=True)]))
            for metric in metrics
        }
    return differences


def _difference(samples: Sequence[Sample], values: Floats) -> Score:
    strata = _counted_strata(samples)
    pictures = _picture_numbers(samples)
    interval = bootstrap_interval([values[places] for places in strata], [pictures[places] for places in strata])
    value = float(np.mean([values[places].mean() for places in strata]))
    return Score(value, *interval, sum(map(len, strata)))


def _counted_strata(samples: Sequence[Sample]) -> list[list[int]]:
    """Places of the samples that enter a task's own value, kind by kind."""
    kinds: dict[str, list[int]] = defaultdict(list)
    counted: dict[str, list[int]] = defaultdict(list)
    for place, sample in enumerate(samples):
        kinds[sample.kind].append(place)
        if not sample.extra:
            counted[sample.kind].append(place)
    return list((counted or kinds).values())


def as_json(scores: Scores) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """{"tasks": {task: {metric: {"value", "low", "high", "count"}}}}."""
    tasks = {task: {name: asdict(each) for name, each in metrics.items()} for task, metrics in scores.items()}
    return {"tasks": tasks}


def measure(prediction: Prediction) -> dict[str, float]:
    """The metrics of one answer, each 0..1, by the name they have in TASK_METRICS."""
    sample, text = prediction.sample, prediction.text
    if sample.task == "rec":
        return _measure_box(prediction)
    assert sample.answer is not None, "check_scorable let no sample pass without a reference"
    measured = {"exact_match": float(exact_match(text, sample.answer))}
    if sample.task == "caption":
        measured["token_f1"] = token_f1(text, sample.answer)
    return measured


def _measure_box(prediction: Prediction) -> dict[str, float]:
    assert prediction.size_px is not None, "an answer about a picture comes with its size"
    boxes = parse_boxes(prediction.text, *prediction.size_px)
    iou = box_iou(boxes[0].pixels, prediction.sample.boxes[0]) if boxes else 0.0
    return {"acc@0.5": float(iou >= IOU_THRESHOLD), "mean_iou": iou, "parse_rate": float(bool(boxes))}


def normalized(text: str) -> str:
    """Lower case, runs of white space as one space, none at the ends."""
    return " ".join(text.lower().split())


def exact_match(text: str, reference: str) -> bool:
    """Whether both texts are equal once normalized."""
    return normalized(text) == normalized(reference)


def token_f1(text: str, reference: str) -> float:
    """F1 over the words of both texts, 0..1; a word counts as often as it occurs. Two empty texts agree."""
    words, expected = Counter(normalized(text).split()), Counter(normalized(reference).split())
    if not words and not expected:
        return 1.0
    return 2 * (words & expected).total() / (words.total() + expected.total())


def box_iou(a: PixelBox, b: PixelBox) -> float:
    """Area shared by two boxes over the area they cover together, 0..1; 0 for a box with its corners swapped."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / (_area(a) + _area(b) - shared)


def _area(box: PixelBox) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _task_scores(metric: str, predictions: Sequence[Prediction], values: Floats) -> dict[str, Score]:
    """The metric of one task and, if it has several kinds, of each kind. values [n], one for each prediction."""
    samples = [prediction.sample for prediction in predictions]
    kinds: dict[str, list[int]] = defaultdict(list)
    for place, sample in enumerate(samples):
        kinds[sample.kind].append(place)
    scores = {metric: _score(metric, samples, values, _counted_strata(samples))}
    if len(kinds) > 1:
        for kind in sorted(kinds):
            scores[f"{metric}/{kind}"] = _score(metric, samples, values, [kinds[kind]])
    return scores


def _score(metric: str, samples: Sequence[Sample], values: Floats, strata: list[list[int]]) -> Score:
    """Unweighted mean over strata, which are places in values, of the mean in each."""
    count = sum(map(len, strata))
    value = float(np.mean([values[places].mean() for places in strata]))
    if len(strata) == 1 and metric in SHARES:
        return Score(value, *wilson_interval(round(float(values[strata[0]].sum())), count), count)
    pictures = _picture_numbers(samples)
    interval = bootstrap_interval([values[places] for places in strata], [pictures[places] for places in strata])
    return Score(value, *interval, count)


def _picture_numbers(samples: Sequence[Sample]) -> npt.NDArray[np.int64]:
    """For each sample the number of its picture, int64 [n]; a sample without one has a number of its own."""
    numbers: dict[object, int] = {}
    keys = [sample.image if sample.image is not None else place for place, sample in enumerate(samples)]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)


def wilson_interval(successes: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share; (0, 1) for no trials."""
    if count == 0:
        return 0.0, 1.0
    share, spread = successes / count, Z_95**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = Z_95 / (1 + spread) * float(np.sqrt(share * (1 - share) / count + spread / (4 * count)))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))  # at 0 and 1 rounding would bite


def bootstrap_interval(strata: Sequence[Floats], groups: Sequence[npt.NDArray[np.int64]]) -> tuple[float, float]:
    """95 % percentile interval of the unweighted mean of the strata's means, whole groups being resampled.

    strata: values [n_s] of each; groups: int64 [n_s], equal numbers for values that are not independent. Seeded.
    A stratum that a resample happens to miss does not enter that resample's mean.
    """
    names = np.unique(np.concatenate(groups))
    sums, counts = np.zeros((2, len(names), len(strata)))
    for column, (values, group) in enumerate(zip(strata, groups, strict=True)):
        members = np.searchsorted(names, group)
        np.add.at(sums[:, column], members, values)
        np.add.at(counts[:, column], members, 1)
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    means = []
    for _ in range(NUM_RESAMPLES):
        times = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))  # each group was drawn
        totals = times @ counts  # [strata]
        means.append(float(np.mean((times @ sums)[totals > 0] / totals[totals > 0])))
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)

"""The one definition of every metric, for training, validation of checkpoints and validation of bundles.

Texts are compared in lower case with single spaces and none at the ends; nothing else is normalized, except by a
benchmark's own rule (`text_rules`, `choices`).
  vqa, reg   exact_match      share of answers equal to the reference, or to one of them
  caption    exact_match and token_f1, the harmonic mean of precision and recall over words, repeated words counted
  rec        acc@0.5          share of answers whose first box has an IoU of at least 0.5 with the reference
             mean_iou         that IoU, 0 without a box
             parse_rate       share of answers in which a box can be read
  yes_no     accuracy         share of answers that say the right one of yes and no
             parse_rate       share in which exactly one of the two words can be read
             of the set: precision, recall and f1 of yes
  multiple_choice  accuracy   share of answers that choose the right option; without options: that quote the reference
             parse_rate       share in which a choice can be read
             of the set: circular_accuracy, share of questions with all rotations right, if there are rotations
  vqa_accuracy, anls, relaxed_accuracy, exact_match   the metric of that name, of TextVQA, DocVQA, ChartQA, OCRVQA
  ocrbench   contains         share of answers that contain a reference; times 1000 it is OCRBench's score
A task's value is the unweighted mean over its kinds without `extra` rows (unless it has no others), and from yes_no on
the mean over all questions, as those benchmarks define it; a task with several kinds also reports each as metric/kind.
95 % intervals are Wilson's for a share of questions, else a bootstrap over pictures, because questions about one
picture are not independent. Metrics of the set have no value for a single answer.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vlmdeploy.data.questions import UNSCORED
from vlmdeploy.data.samples import PixelBox, Sample
from vlmdeploy.errors import DataError
from vlmdeploy.runtime.boxes import parse_boxes
from vlmdeploy.score.choices import chosen_option, meets_open_question, said_yes_or_no
from vlmdeploy.score.intervals import bootstrap_interval, wilson_interval
from vlmdeploy.score.set_scores import all_right, yes_scores
from vlmdeploy.score.text_rules import anls, contains_answer, relaxed_accuracy, stripped_match, vqa_accuracy

TASK_METRICS = {
    "vqa": ("exact_match",),
    "rec": ("acc@0.5", "mean_iou", "parse_rate"),
    "reg": ("exact_match",),
    "caption": ("exact_match", "token_f1"),
    "yes_no": ("accuracy", "parse_rate"),
    "multiple_choice": ("accuracy", "parse_rate"),
    "vqa_accuracy": ("vqa_accuracy",),
    "anls": ("anls",),
    "relaxed_accuracy": ("relaxed_accuracy",),
    "ocrbench": ("contains",),
    "exact_match": ("exact_match",),
}
MEANS_OVER_KINDS = frozenset(("vqa", "rec", "reg", "caption"))
SHARES = frozenset(  # metrics that are 0 or 1 for one answer
    ("exact_match", "acc@0.5", "parse_rate", "accuracy", "relaxed_accuracy", "contains")
)
IOU_THRESHOLD = 0.5
LONGEST_SHOWN = 80  # characters of a question in a message
LONGEST_COMPARED = 2000  # characters of a reference of anls
LEAST_REFERENCES = 4  # of vqa_accuracy: three others must agree
FORMULAS = "Handwritten Mathematical Expression Recognition"  # OCRBench's category that ignores spaces

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
    """A model's answer: `text` and its `ids` without the stop id; size_px: the picture's width and height."""

    sample: Sample
    text: str
    ids: tuple[int, ...] = ()
    size_px: tuple[int, int] | None = None


def check_scorable(samples: Iterable[Sample], data: Path | None = None) -> None:
    """Raise DataError for the first sample that cannot be scored. data: the file to name in the message."""
    of_file = "" if data is None else f"{data}: "
    for sample in samples:
        if sample.task == UNSCORED:
            found = "these questions are not scored here: write the answers with --predictions FILE"
            raise DataError(f"{of_file}{found}")
        where = f"{of_file}{_named(sample)}"
        if sample.task not in TASK_METRICS:
            raise DataError(f'{where}: task "{sample.task}" has no metric; known: {", ".join(TASK_METRICS)}')
        if sample.task == "rec" and (sample.image is None or len(sample.boxes) != 1):
            raise DataError(f"{where}: task rec has {len(sample.boxes)} boxes, expected a picture and one box in it")
        if sample.task != "rec" and not sample.references:
            raise DataError(f"{where}: has no reference answer")
        if sample.task == "yes_no":
            _check_reference(sample, ("yes", "no"), where)
        if sample.task == "multiple_choice" and sample.options:
            _check_reference(sample, [letter for letter, _ in sample.options], where)
        if sample.task == "anls" and max(map(len, sample.references)) > LONGEST_COMPARED:
            found = f"has a reference of {max(map(len, sample.references))} characters"
            raise DataError(f"{where}: {found}, at most {LONGEST_COMPARED} are compared letter by letter")
        if sample.task == "vqa_accuracy" and len(sample.references) < LEAST_REFERENCES:
            found = f"has {len(sample.references)} reference answers"
            raise DataError(f"{where}: {found}, task vqa_accuracy wants those of {LEAST_REFERENCES} people or more")


def _named(sample: Sample) -> str:
    """The question in a message: its key and its first characters."""
    text = sample.turns[-1].user
    return f'question "{sample.key}" ({text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "..."!r})'


def _check_reference(sample: Sample, expected: Sequence[str], where: str) -> None:
    for reference in sample.references:
        if reference not in expected:
            raise DataError(f"{where}: its answer is {reference[:80]!r}, expected one of {', '.join(expected)}")


def score(predictions: Sequence[Prediction]) -> Scores:
    """Scores of every task in the data, in the order of TASK_METRICS. Raises DataError if a sample has no reference."""
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
            scores[task].update(_set_scores(of_task, measured))
    return scores


def paired_differences(first: Sequence[Prediction], second: Sequence[Prediction]) -> Scores:
    """How much better the second model is, per metric, on the same samples in the same order. Intervals are a bootstrap
    over pictures of the difference itself, far narrower than two intervals side by side."""
    differences: Scores = {}
    for task, metrics in TASK_METRICS.items():
        places = [place for place, prediction in enumerate(first) if prediction.sample.task == task]
        if not places:
            continue
        samples = [first[place].sample for place in places]
        before, after = ([measure(model[place]) for place in places] for model in (first, second))
        differences[task] = {}
        for metric in metrics:
            values = np.array([b[metric] - a[metric] for a, b in zip(before, after, strict=True)])
            differences[task][metric] = _mean(samples, values, _counted_strata(samples))
    return differences


def _counted_strata(samples: Sequence[Sample]) -> list[list[int]]:
    """Places of the samples that enter their task's value: one list per kind, or one list if kinds do not count."""
    if samples[0].task not in MEANS_OVER_KINDS:
        return [list(range(len(samples)))]
    counted = [place for place, sample in enumerate(samples) if not sample.extra]
    return list(_by_kind(samples, counted or range(len(samples))).values())


def _by_kind(samples: Sequence[Sample], places: Iterable[int]) -> dict[str, list[int]]:
    kinds: dict[str, list[int]] = defaultdict(list)
    for place in places:
        kinds[samples[place].kind].append(place)
    return kinds


def as_json(scores: Scores) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """{"tasks": {task: {metric: {"value", "low", "high", "count"}}}}."""
    tasks = {task: {name: asdict(each) for name, each in metrics.items()} for task, metrics in scores.items()}
    return {"tasks": tasks}


def measure(prediction: Prediction) -> dict[str, float]:
    """The metrics of one answer, each 0..1, by their name in TASK_METRICS."""
    return MEASURES[prediction.sample.task](prediction)


def _measure_match(prediction: Prediction) -> dict[str, float]:
    return {"exact_match": float(any(exact_match(prediction.text, each) for each in prediction.sample.references))}


def _measure_caption(prediction: Prediction) -> dict[str, float]:
    f1 = max(token_f1(prediction.text, reference) for reference in prediction.sample.references)
    return _measure_match(prediction) | {"token_f1": f1}


def _measure_yes_no(prediction: Prediction) -> dict[str, float]:
    said = said_yes_or_no(prediction.text)
    return {"accuracy": float(said in prediction.sample.references), "parse_rate": float(said is not None)}


def _measure_choice(prediction: Prediction) -> dict[str, float]:
    sample, text = prediction.sample, prediction.text
    if not sample.options:
        return {
            "accuracy": float(meets_open_question(text, sample.references)),
            "parse_rate": float(bool(text.strip())),
        }
    chosen = chosen_option(text, sample.options)
    return {"accuracy": float(chosen in sample.references), "parse_rate": float(chosen is not None)}


def _measure_formula_or_text(prediction: Prediction) -> dict[str, float]:
    sample = prediction.sample
    return {"contains": contains_answer(prediction.text, sample.references, is_formula=sample.kind == FORMULAS)}


def _measure_text(name: str, rule: Callable[[str, Sequence[str]], float], prediction: Prediction) -> dict[str, float]:
    return {name: rule(prediction.text, prediction.sample.references)}


def _measure_box(prediction: Prediction) -> dict[str, float]:
    assert prediction.size_px is not None, "an answer about a picture comes with its size"
    boxes = parse_boxes(prediction.text, *prediction.size_px)
    iou = box_iou(boxes[0].pixels, prediction.sample.boxes[0]) if boxes else 0.0
    return {"acc@0.5": float(iou >= IOU_THRESHOLD), "mean_iou": iou, "parse_rate": float(bool(boxes))}


MEASURES: dict[str, Callable[[Prediction], dict[str, float]]] = {
    "vqa": _measure_match,
    "rec": _measure_box,
    "reg": _measure_match,
    "caption": _measure_caption,
    "yes_no": _measure_yes_no,
    "multiple_choice": _measure_choice,
    "vqa_accuracy": partial(_measure_text, "vqa_accuracy", vqa_accuracy),
    "anls": partial(_measure_text, "anls", anls),
    "relaxed_accuracy": partial(_measure_text, "relaxed_accuracy", relaxed_accuracy),
    "ocrbench": _measure_formula_or_text,
    "exact_match": partial(_measure_text, "exact_match", stripped_match),
}


def normalized(text: str) -> str:
    """Lower case, single spaces, none at the ends."""
    return " ".join(text.lower().split())


def exact_match(text: str, reference: str) -> bool:
    """Whether both normalized texts are equal."""
    return normalized(text) == normalized(reference)


def token_f1(text: str, reference: str) -> float:
    """F1 over the words of both texts, 0..1, counting repeats. Two empty texts agree."""
    words, expected = Counter(normalized(text).split()), Counter(normalized(reference).split())
    if not words and not expected:
        return 1.0
    return 2 * (words & expected).total() / (words.total() + expected.total())


def box_iou(a: PixelBox, b: PixelBox) -> float:
    """Intersection over union of two boxes, 0..1; 0 for a box with swapped corners."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return width * height / (areas - width * height)


def _task_scores(metric: str, predictions: Sequence[Prediction], values: Floats) -> dict[str, Score]:
    """The metric of one task and, if it has several kinds, of each kind. values [n], one per prediction."""
    samples, is_share = [prediction.sample for prediction in predictions], metric in SHARES
    kinds = _by_kind(samples, range(len(samples)))
    scores = {metric: _mean(samples, values, _counted_strata(samples), is_share)}
    if len(kinds) > 1:
        for kind in sorted(kinds):
            scores[f"{metric}/{kind}"] = _mean(samples, values, [kinds[kind]], is_share)
    return scores


def _mean(samples: Sequence[Sample], values: Floats, strata: list[list[int]], is_share: bool = False) -> Score:
    """Unweighted mean over strata (places in values) of the mean in each. is_share: values are 0 or 1."""
    count = sum(map(len, strata))
    value = float(np.mean([values[places].mean() for places in strata]))
    if len(strata) == 1 and is_share:
        return Score(value, *wilson_interval(round(float(values[strata[0]].sum())), count), count)
    pictures = _picture_numbers(samples)
    interval = bootstrap_interval([values[places] for places in strata], [pictures[places] for places in strata])
    return Score(value, *interval, count)


def _set_scores(predictions: Sequence[Prediction], measured: Sequence[dict[str, float]]) -> dict[str, Score]:
    """The metrics of the whole set of one task's answers, if it has any."""
    samples = [prediction.sample for prediction in predictions]
    if samples[0].task == "yes_no":
        is_yes = np.array(["yes" in sample.references for sample in samples])
        said_yes = np.array([said_yes_or_no(prediction.text) == "yes" for prediction in predictions])
        found = yes_scores(is_yes, said_yes, _picture_numbers(samples))
        return {name: Score(*values, len(samples)) for name, values in found.items()}
    groups = [sample.group for sample in samples if sample.group is not None]
    if not groups:
        return {}
    assert len(groups) == len(samples), "a set of questions is rotated as a whole"
    values, count = all_right([each["accuracy"] == 1 for each in measured], groups)
    return {"circular_accuracy": Score(*values, count)}


def _picture_numbers(samples: Sequence[Sample]) -> npt.NDArray[np.int64]:
    """Each sample's picture as a number, int64 [n]; samples without a picture get distinct numbers."""
    numbers: dict[object, int] = {}
    keys = [sample.image if sample.image is not None else place for place, sample in enumerate(samples)]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)

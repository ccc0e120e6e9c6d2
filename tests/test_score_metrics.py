"""Reference: every metric and interval against tables computed by hand or taken from the literature."""

import json
from pathlib import Path

import numpy as np
import pytest

from vlmdeploy.data.samples import PixelBox, Sample
from vlmdeploy.errors import DataError
from vlmdeploy.runtime.chat import Turn
from vlmdeploy.score.intervals import bootstrap_interval, wilson_interval
from vlmdeploy.score.metrics import (
    Prediction,
    as_json,
    box_iou,
    check_scorable,
    exact_match,
    paired_differences,
    score,
    token_f1,
)


def answered(text: str, answer: str | None, task: str = "vqa", kind: str = "", extra: bool = False) -> Prediction:
    return Prediction(Sample(None, (Turn("?"),), task, kind or task, answer, extra=extra), text)


def located(text: str, box: PixelBox, picture: str = "a.png") -> Prediction:
    """An answer about a picture of 200 x 100 pixels."""
    sample = Sample(Path(picture), (Turn("Where?"),), "rec", "rec", None, (box,))
    return Prediction(sample, text, size_px=(200, 100))


@pytest.mark.parametrize(
    ("text", "reference", "equal"),
    [
        ("3 1", "3 1", True), (" Yes\n", "yes", True), ("3\t  1", "3 1", True),
        ("31", "3 1", False), ("yes.", "yes", False), ("", "yes", False),
    ],
)  # fmt: skip
def test_exact_match_ignores_case_and_space_only(text: str, reference: str, equal: bool) -> None:
    assert exact_match(text, reference) is equal


@pytest.mark.parametrize(
    ("text", "reference", "f1"),
    [
        ("a b c", "a b c", 1.0), ("A  b", "b a", 1.0), ("", "a", 0.0), ("", " ", 1.0),
        ("a b", "a c", 0.5),  # precision 1/2, recall 1/2
        ("a", "a b c", 0.5),  # precision 1, recall 1/3
        ("a a a", "a b", 0.4),  # one of three words right, one of two found
    ],
)  # fmt: skip
def test_token_f1(text: str, reference: str, f1: float) -> None:
    assert token_f1(text, reference) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("a", "b", "iou"),
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1.0), ((0, 0, 2, 2), (1, 0, 3, 2), 1 / 3), ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7),
        ((0, 0, 4, 4), (1, 1, 2, 2), 1 / 16), ((1, 1, 1, 1), (1, 1, 1, 1), 0.0),
        ((0, 0, 2, 2), (2, 0, 4, 2), 0.0),  # they only touch
        ((2, 2, 0, 0), (0, 0, 2, 2), 0.0),  # corners swapped
    ],
)  # fmt: skip
def test_box_iou(a: PixelBox, b: PixelBox, iou: float) -> None:
    assert box_iou(a, b) == pytest.approx(iou) == box_iou(b, a)


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [(0, 10, 0.0, 0.27753), (10, 10, 0.72247, 1.0), (5, 10, 0.23659, 0.76341), (81, 263, 0.25526, 0.36620)],
)
def test_wilson_interval(successes: int, count: int, low: float, high: float) -> None:
    """The last row is Newcombe's example (1998, Statistics in Medicine 17, table I)."""
    assert wilson_interval(successes, count) == pytest.approx((low, high), abs=6e-5)


def test_bootstrap_of_independent_values_is_close_to_the_normal_interval() -> None:
    values = np.random.default_rng(1).uniform(0, 1, 400)
    low, high = bootstrap_interval([values], [np.arange(400)])
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.004)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert bootstrap_interval([values], [np.arange(400)]) == (low, high)


def test_bootstrap_sees_that_answers_about_one_picture_are_not_independent() -> None:
    """Four equal values per picture are worth one: the interval is twice as wide as for independent values."""
    values = np.repeat(np.random.default_rng(1).integers(0, 2, 100), 4).astype(np.float64)
    grouped = np.subtract(*bootstrap_interval([values], [np.repeat(np.arange(100), 4)]))
    independent = np.subtract(*bootstrap_interval([values], [np.arange(400)]))
    assert grouped / independent == pytest.approx(2, rel=0.15)


def test_a_task_is_the_unweighted_mean_of_its_kinds_and_extra_rows_stay_out() -> None:
    predictions = [
        *(answered("1", "1", kind="sum") for _ in range(3)),
        answered("2", "1", kind="sum"),
        answered("yes", "no", kind="left_right"),
        answered("yes", "yes", kind="is_there", extra=True),
    ]
    scores = score(predictions)["vqa"]
    assert {name: (each.value, each.count) for name, each in scores.items()} == {
        "exact_match": (0.375, 5), "exact_match/is_there": (1.0, 1), "exact_match/left_right": (0.0, 1),
        "exact_match/sum": (0.75, 4),
    }  # fmt: skip
    assert (scores["exact_match/sum"].low, scores["exact_match/sum"].high) == wilson_interval(3, 4)
    assert scores["exact_match"].low <= 0.375 <= scores["exact_match"].high


def test_a_task_of_extra_rows_only_still_has_a_value() -> None:
    scores = score([answered("1", "1", extra=True)])
    assert scores["vqa"]["exact_match"].value == 1.0


def test_rec_takes_the_first_box_in_pixels_of_the_picture() -> None:
    box = (20.0, 10.0, 100.0, 50.0)  # in thousandths of 200 x 100: 100,100,500,500
    predictions = [
        located("[[100,100,500,500]]", box),
        located("It is at [[100,100,300,500]] or [[100,100,500,500]]", box),  # half of it: IoU 0.5
        located("[[600,600,900,900;100,100,500,500]]", box),
        located("nowhere", box),
    ]
    scores = score(predictions)["rec"]
    assert list(scores) == ["acc@0.5", "mean_iou", "parse_rate"]
    assert [scores[name].value for name in scores] == pytest.approx([0.5, 0.375, 0.75])
    assert (scores["acc@0.5"].low, scores["acc@0.5"].high) == wilson_interval(2, 4)


def test_captions_have_two_metrics() -> None:
    scores = score([answered("The digit 3.", "the digit 3.", "caption"), answered("a b", "a c", "caption")])["caption"]
    assert {name: each.value for name, each in scores.items()} == {"exact_match": 0.5, "token_f1": 0.75}


def test_json_form() -> None:
    predictions = [answered("7", "7", "reg"), answered("1", "1", "vqa")]
    document = as_json(score(predictions))
    low, _ = wilson_interval(1, 1)
    entry = {"exact_match": {"value": 1.0, "low": low, "high": 1.0, "count": 1}}
    assert json.loads(json.dumps(document)) == {"tasks": {"vqa": entry, "reg": entry}}


@pytest.mark.parametrize(
    ("prediction", "told"),
    [
        (answered("1", "1", "ocr"), 'task "ocr" has no metric'),
        (answered("1", None), "has no reference answer"),
        (answered("1", "1", "rec"), "task rec has 0 boxes"),
    ],
)
def test_what_cannot_be_scored_is_told(prediction: Prediction, told: str) -> None:
    with pytest.raises(DataError, match=told):
        check_scorable([prediction.sample])
    with pytest.raises(DataError, match=told):
        score([prediction])


def test_paired_difference_of_equal_answers_is_exactly_zero() -> None:
    answers = [answered(text, "1") for text in ("1", "2", "1", "3")]
    score_of = paired_differences(answers, answers)["vqa"]["exact_match"]
    assert (score_of.value, score_of.low, score_of.high, score_of.count) == (0, 0, 0, 4)


def test_paired_difference_counts_what_the_second_gains_and_loses() -> None:
    first = [answered(text, "1") for text in ("1", "1", "2", "2")]
    second = [answered(text, "1") for text in ("1", "2", "2", "2")]
    score_of = paired_differences(first, second)["vqa"]["exact_match"]
    assert score_of.value == -0.25 and score_of.low < -0.25 < score_of.high <= 0


def test_paired_difference_is_narrower_than_two_intervals_side_by_side() -> None:
    first = [answered("1" if place % 3 else "2", "1") for place in range(300)]
    second = [answered("2", "1"), *first[1:]]
    alone, paired = score(first)["vqa"]["exact_match"], paired_differences(first, second)["vqa"]["exact_match"]
    assert paired.high - paired.low < (alone.high - alone.low) / 4


def test_paired_difference_leaves_extra_kinds_out_of_the_mean() -> None:
    first = [answered("1", "1"), answered("1", "1", kind="easy", extra=True)]
    second = [answered("1", "1"), answered("2", "1", kind="easy", extra=True)]
    assert paired_differences(first, second)["vqa"]["exact_match"].value == 0

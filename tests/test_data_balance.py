"""Contract: which samples are chosen for calibration, and that the seed alone decides among equals."""

import math
from collections import Counter
from pathlib import Path

import pytest

from vlmdeploy.data.balance import Balance, Candidate, across_range, balance, draw_samples
from vlmdeploy.data.samples import Sample
from vlmdeploy.runtime.chat import Turn


def about(picture: int | None, count: int = 1) -> list[Sample]:
    """Questions about one picture, or about none."""
    image = None if picture is None else Path(f"{picture}.png")
    return [Sample(image, (Turn(f"{picture}, {number}?"),), "chat", "chat", "") for number in range(count)]


def pictured(pictures: int, questions: int = 1) -> list[Sample]:
    return [sample for picture in range(pictures) for sample in about(picture, questions)]


def num_texts(samples: list[Sample]) -> int:
    return sum(sample.image is None for sample in samples)


def test_a_draw_follows_the_seed_and_keeps_the_order() -> None:
    samples = pictured(50) + about(None, 50)
    drawn = draw_samples(samples, 20, seed=1)
    assert draw_samples(samples, 20, seed=1) == drawn != draw_samples(samples, 20, seed=2)
    assert len(drawn) == 20 and drawn == sorted(drawn, key=samples.index)


@pytest.mark.parametrize(("count", "most", "pictures"), [(5, 1, 5), (10, 1, 10), (20, 2, 10), (25, 3, 10)])
def test_every_picture_is_used_before_one_is_used_again(count: int, most: int, pictures: int) -> None:
    uses = Counter(sample.image for sample in draw_samples(pictured(10, questions=9), count, seed=0))
    assert max(uses.values()) == most and len(uses) == pictures


@pytest.mark.parametrize(
    ("pictures", "texts", "count", "expected"),
    [
        (60, 40, 20, 8),  # their share
        (99, 1, 20, 1),  # all there are
        (95, 10, 20, 5),  # a quarter
        (10, 90, 20, 10),  # half
        (5, 90, 20, 15),  # too few pictures for half
        (0, 90, 20, 20),
        (90, 0, 20, 0),
        (3, 2, 20, 2),  # everything
        (9, 9, 1, 0),
    ],
)
def test_text_only_samples_are_a_quarter_to_half_of_the_draw(
    pictures: int, texts: int, count: int, expected: int
) -> None:
    drawn = draw_samples(pictured(pictures) + about(None, texts), count, seed=3)
    assert len(drawn) == min(count, pictures + texts) and num_texts(drawn) == expected


def test_nothing_drawn_from_nothing() -> None:
    assert draw_samples([], 5, seed=0) == []


def test_balance_takes_pictures_first_and_then_texts() -> None:
    candidates = [Candidate(100, 20)] * 10 + [Candidate(0, 30)] * 10
    chosen = balance(candidates, 300, seed=0)
    assert (chosen.vision_tokens, chosen.language_tokens) == (300, 300)
    assert [place < 10 for place in chosen.indexes] == [True] * 3 + [False] * 8


def test_balance_keeps_a_quarter_of_its_limit_for_texts() -> None:
    candidates = [Candidate(100, 1)] * 20 + [Candidate(0, 1)] * 20
    chosen = balance(candidates, 10_000, seed=0, limit=8).indexes
    assert len(chosen) == 8 and sum(place >= 20 for place in chosen) == 2


def test_balance_follows_the_seed() -> None:
    candidates = [Candidate(100, 20)] * 20 + [Candidate(0, 30)] * 20
    assert balance(candidates, 300, seed=1) == balance(candidates, 300, seed=1) != balance(candidates, 300, seed=2)


def test_without_texts_balance_fills_the_language_expert_with_more_pictures() -> None:
    assert len(balance([Candidate(100, 10)] * 40, 200, seed=0).indexes) == 20


def test_balance_tells_what_it_reached_when_all_are_used_up() -> None:
    candidates = [Candidate(100, 10), Candidate(0, 7)]
    assert balance(candidates, 1000, seed=0) == Balance((0, 1), 100, 17)
    assert balance([], 1000, seed=0) == Balance((), 0, 0)


def test_balance_of_texts_only_stops_when_the_language_expert_has_enough() -> None:
    assert len(balance([Candidate(0, 10)] * 40, 200, seed=0).indexes) == 20


def test_across_range_takes_the_middle_of_equal_parts() -> None:
    scores = [float(score) for score in reversed(range(100))]
    assert [scores[place] for place in across_range(scores, 5)] == [10, 30, 50, 70, 90]
    assert across_range(scores, 1) == (scores.index(50),)


def test_across_range_drops_what_is_not_finite() -> None:
    assert across_range([math.nan, 3.0, math.inf, 1.0, -math.inf, 2.0], 9) == (3, 5, 1)
    assert across_range([math.nan], 4) == ()


@pytest.mark.parametrize("count", [1, 2, 7, 19, 20, 21])
def test_across_range_chooses_no_sample_twice(count: int) -> None:
    indexes = across_range([1.0] * 20, count)
    assert len(indexes) == len(set(indexes)) == min(count, 20)

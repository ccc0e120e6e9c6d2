"""Contract: options and stop strings. Reference: the filters against slow, obvious versions in this file."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from vlmdeploy.errors import BackendError, PromptError
from vlmdeploy.runtime.sampling import Sampler, SamplingOptions, StopStrings, keep_top_p, softmax

NO_IDS = np.array([], np.int64)
LOGITS = np.array([1.0, 3.0, 2.0, 3.0, -1.0], np.float32)


def choices(
    logits: np.ndarray[Any, Any], ids: np.ndarray[Any, Any] = NO_IDS, count: int = 4000, **options: Any
) -> list[int]:
    sampler = Sampler(SamplingOptions(**{"seed": 0, "temperature": 1.0, **options}))
    return [sampler(logits, ids) for _ in range(count)]


def shares(chosen: list[int], vocab: int) -> np.ndarray[Any, Any]:
    return np.bincount(chosen, minlength=vocab) / len(chosen)


def textbook_probabilities(
    logits: np.ndarray[Any, Any],
    ids: np.ndarray[Any, Any],
    temperature: float,
    top_k: int,
    top_p: float,
    penalty: float,
) -> np.ndarray[Any, Any]:
    """Token by token in the order of Hugging Face: penalty, temperature, top-k, top-p (from the worst upwards)."""
    scores = [float(value) for value in logits]
    for token in set(ids.tolist()):
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    scores = [score / temperature for score in scores]
    limit = sorted(scores)[-top_k]
    weights = [math.exp(score) if score >= limit else 0.0 for score in scores]
    total, cumulative = sum(weights), 0.0
    for token in sorted(range(len(scores)), key=lambda token: weights[token]):
        cumulative += weights[token] / total
        if cumulative <= 1 - top_p:
            weights[token] = 0.0
    return np.array(weights) / sum(weights)


def test_temperature_zero_takes_the_best_token_and_the_lowest_id_on_ties() -> None:
    assert set(choices(LOGITS, temperature=0.0, top_k=1, top_p=0.1, count=20)) == {1}


def test_repetition_penalty_moves_the_greedy_choice() -> None:
    ids = np.array([1, 1, 4])
    assert choices(LOGITS, ids, temperature=0.0, repetition_penalty=1.2, count=1) == [3]
    assert choices(np.array([-1.0, -1.05]), np.array([0]), temperature=0.0, repetition_penalty=1.1, count=1) == [1]


@pytest.mark.parametrize("seed", range(6))
def test_sampled_shares_follow_the_textbook(seed: int) -> None:
    random = np.random.default_rng(seed)
    logits, ids = random.normal(0, 2, 12).astype(np.float32), random.integers(0, 12, 5)
    temperature, top_k, top_p, penalty = (
        random.uniform(0.5, 2),
        int(random.integers(2, 12)),
        random.uniform(0.5, 1),
        1.3,
    )
    expected = textbook_probabilities(logits, ids, temperature, top_k, top_p, penalty)
    found = shares(
        choices(logits, ids, temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty), 12
    )
    assert set(np.flatnonzero(found)) <= set(np.flatnonzero(expected))
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.04)  # five standard deviations of 4000 draws


@pytest.mark.parametrize("spread", [0.1, 1, 3, 30])
@pytest.mark.parametrize("size", [1, 7, 3000])
def test_top_p_keeps_what_a_sort_of_all_tokens_keeps(size: int, spread: float) -> None:
    random = np.random.default_rng(size)
    scores = np.round(spread * random.standard_normal(size), 1)  # with ties
    scores[1:][random.random(size - 1) < 0.3] = -np.inf
    probabilities = softmax(scores)
    order = np.argsort(-probabilities, kind="stable")
    better = np.concatenate(([0.0], probabilities[order].cumsum()[:-1]))
    for top_p in (1e-9, 0.1, 0.5, 0.9, 0.99, 1 - 1e-16):
        expected = np.zeros(size)
        expected[order[better < top_p]] = probabilities[order[better < top_p]]
        np.testing.assert_array_equal(keep_top_p(probabilities, top_p), expected)


def test_top_k_keeps_ties_and_top_p_keeps_the_token_that_reaches_it() -> None:
    assert set(choices(LOGITS, top_k=1)) == {1, 3}
    halves = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    assert set(choices(halves, top_p=0.6)) == {0, 1}
    assert set(choices(np.zeros(4, np.float32), top_p=0.5)) == {0, 1}
    assert set(choices(halves, top_p=1e-9)) == {0}
    assert set(choices(halves, top_k=99)) == {0, 1, 2}


def test_a_seed_makes_answers_reproducible() -> None:
    assert choices(LOGITS, count=50) == choices(LOGITS, count=50)
    assert choices(LOGITS, count=50, seed=1) != choices(LOGITS, count=50, seed=2)


def test_a_tiny_temperature_is_greedy_without_warnings() -> None:
    assert set(choices(np.array([1.0, 5.0, 2.0], np.float32), temperature=1e-310, count=10)) == {1}


def test_logits_are_not_changed() -> None:
    logits = LOGITS.copy()
    choices(logits, np.array([0]), repetition_penalty=2.0, top_k=2, count=1)
    np.testing.assert_array_equal(logits, LOGITS)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error(value: float) -> None:
    with pytest.raises(BackendError, match="1 of 2 logits"):
        Sampler(SamplingOptions())(np.array([0.0, value], np.float32), NO_IDS)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("temperature", value) for value in (-0.1, math.nan, math.inf, "1", True, 10**400)],
        *[("top_k", value) for value in (-1, 1.5, True)],
        *[("top_p", value) for value in (0, 1.1, math.nan)],
        *[("repetition_penalty", value) for value in (0, -1, math.inf, 10**400)],
        *[("seed", value) for value in (-1, 0.5)],
        *[("max_new_tokens", value) for value in (0, -1, None)],
        *[("stop", value) for value in ("text", ("",), (1,), None)],
    ],
)
def test_an_option_out_of_range_is_named(option: str, value: Any) -> None:
    with pytest.raises(PromptError, match=f"option {option} is"):
        SamplingOptions(**{option: value})


def streamed(stop: tuple[str, ...], pieces: list[str]) -> tuple[str, bool]:
    stream = StopStrings(stop)
    shown = "".join(stream.add(piece) for piece in pieces) + stream.finish()
    return shown, stream.stopped


@pytest.mark.parametrize(
    ("stop", "pieces", "expected"),
    [
        ((), ["a", "b"], ("ab", False)),
        (("END",), ["one E", "N", "D two"], ("one ", True)),
        (("END",), ["one E", "N", "X"], ("one ENX", False)),
        (("END",), ["one EN"], ("one EN", False)),
        (("\n\n",), ["a\n", "b\n", "\nc"], ("a\nb", True)),
        (("aab",), ["a", "a", "a", "b"], ("a", True)),
        (("abc", "b"), ["abc"], ("a", True)),
        (("ab", "b"), ["xab"], ("x", True)),
        (("a",), ["", "a", "rest"], ("", True)),
    ],
)
def test_text_ends_before_the_stop_string(stop: tuple[str, ...], pieces: list[str], expected: tuple[str, bool]) -> None:
    assert streamed(stop, pieces) == expected


def test_only_a_possible_beginning_is_held_back() -> None:
    stream = StopStrings(("STOP",))
    assert [stream.add(piece) for piece in ("abS", "T", "x", "y")] == ["ab", "", "STx", "y"]


def test_how_the_pieces_fall_makes_no_difference() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        text = "".join(random.choice(list("ab"), 12))
        stop = tuple("".join(random.choice(list("ab"), random.integers(2, 5))) for _ in range(2))
        cuts = [0, *sorted(random.integers(0, 13, 3).tolist()), 12]
        pieces = [text[start:end] for start, end in pairwise(cuts)]
        assert streamed(stop, pieces) == streamed(stop, list(text)) == streamed(stop, [text])

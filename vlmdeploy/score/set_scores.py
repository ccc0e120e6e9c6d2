"""Scores that a whole set of answers has, but no single answer: precision, recall and F1 of yes, and questions that
count only if all their rotations are right. They enter no paired difference."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from vlmdeploy.score.intervals import grouped_resamples, percentile_interval, wilson_interval

Floats: TypeAlias = npt.NDArray[np.float64]
Bools: TypeAlias = npt.NDArray[np.bool_]
Ints: TypeAlias = npt.NDArray[np.int64]
Interval: TypeAlias = tuple[float, float, float]
"""Value, low, high."""


def yes_scores(is_yes: Bools, said_yes: Bools, pictures: Ints) -> dict[str, Interval]:
    """Precision, recall and F1 of the answer yes, as POPE reports them; 0 where they are not defined.

    is_yes, said_yes, pictures [n]: the truth, whether the answer was yes, and the picture's number. Intervals hold
    95 %, a bootstrap over pictures. Source: Li et al. 2023 (POPE); VLMEvalKit, yorn.py, POPE_rating.
    """
    events = np.stack([is_yes & said_yes, is_yes, said_yes], axis=1).astype(np.float64)  # [n, 3]
    resampled = grouped_resamples(events, pictures)  # [resamples, 3]
    scores: dict[str, Callable[[Floats], Floats]] = {"precision": _precision, "recall": _recall, "f1": _f1}
    return {
        name: (float(score(events.sum(axis=0)[None])[0]), *percentile_interval(score(resampled)))
        for name, score in scores.items()
    }


def _precision(sums: Floats) -> Floats:
    return _ratio(sums[:, 0], sums[:, 2])


def _recall(sums: Floats) -> Floats:
    return _ratio(sums[:, 0], sums[:, 1])


def _f1(sums: Floats) -> Floats:
    return _ratio(2 * sums[:, 0], sums[:, 1] + sums[:, 2])


def _ratio(part: Floats, whole: Floats) -> Floats:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def all_right(right: Sequence[bool], groups: Sequence[str]) -> tuple[Interval, int]:
    """Share of groups without a wrong answer, with Wilson's interval, and how many groups there are.

    right, groups [n]: of each answer. Source: Liu et al. 2023 (MMBench), circular evaluation.
    """
    flawless: dict[str, bool] = {}
    for is_right, group in zip(right, groups, strict=True):
        flawless[group] = flawless.get(group, True) and is_right
    successes = sum(flawless.values())
    return (successes / len(flawless), *wilson_interval(successes, len(flawless))), len(flawless)

"""Scores of a whole set of answers: precision, recall and F1 of yes, and questions that count only if all their
rotations are right. They have no paired difference."""

from collections.abc import Sequence
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
    """Precision, recall and F1 of the answer yes, as POPE reports them; 0 if undefined.

    is_yes, said_yes, pictures [n]: the truth, whether the answer was yes, and the picture's number. 95 % intervals by
    bootstrap over pictures. Source: Li et al. 2023 (POPE); VLMEvalKit, yorn.py, POPE_rating.
    """
    events = np.stack([is_yes & said_yes, is_yes, said_yes], axis=1).astype(np.float64)  # [n, 3]
    values, resampled = _yes_ratios(events.sum(axis=0)[None]), _yes_ratios(grouped_resamples(events, pictures))
    return {name: (float(value[0]), *percentile_interval(resampled[name])) for name, value in values.items()}


def _yes_ratios(sums: Floats) -> dict[str, Floats]:
    """Each [n], from sums [n, 3] of hits, true yes and said yes."""
    hits, true, said = sums.T
    parts = {"precision": (hits, said), "recall": (hits, true), "f1": (2 * hits, true + said)}
    return {name: np.divide(a, b, out=np.zeros_like(a), where=b > 0) for name, (a, b) in parts.items()}


def all_right(right: Sequence[bool], groups: Sequence[str]) -> tuple[Interval, int]:
    """Share of groups without a wrong answer, with Wilson's interval, and the number of groups.

    right, groups [n]: one per answer. Source: Liu et al. 2023 (MMBench), circular evaluation.
    """
    flawless: dict[str, bool] = {}
    for is_right, group in zip(right, groups, strict=True):
        flawless[group] = flawless.get(group, True) and is_right
    successes = sum(flawless.values())
    return (successes / len(flawless), *wilson_interval(successes, len(flawless))), len(flawless)

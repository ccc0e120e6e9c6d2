"""95 % intervals of scores: Wilson's for a share, and a bootstrap over groups of dependent values."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Z_95 = 1.959964
NUM_RESAMPLES = 1000
BOOTSTRAP_SEED = 0

Floats: TypeAlias = npt.NDArray[np.float64]


def wilson_interval(successes: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share; (0, 1) for no trials."""
    if count == 0:
        return 0.0, 1.0
    share, spread = successes / count, Z_95**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = Z_95 / (1 + spread) * float(np.sqrt(share * (1 - share) / count + spread / (4 * count)))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))  # clipped: rounding errors at 0, 1


def bootstrap_interval(strata: Sequence[Floats], groups: Sequence[npt.NDArray[np.int64]]) -> tuple[float, float]:
    """95 % percentile interval of the unweighted mean of the strata's means, resampling whole groups. Seeded.

    strata: values [n_s] of each; groups: int64 [n_s], equal numbers for dependent values. A stratum that a resample
    misses does not enter that resample's mean.
    """
    together = np.concatenate(groups)
    sums, counts = np.zeros((2, len(together), len(strata)))
    start = 0
    for column, values in enumerate(strata):
        rows = slice(start, start + len(values))
        sums[rows, column], counts[rows, column] = values, 1
        start += len(values)
    resampled = grouped_resamples(np.concatenate((sums, counts), axis=1), together)
    totals, of_values = resampled[:, len(strata) :], resampled[:, : len(strata)]
    means = [float(np.mean(each[total > 0] / total[total > 0])) for each, total in zip(of_values, totals, strict=True)]
    return percentile_interval(np.array(means))


def grouped_resamples(values: Floats, groups: npt.NDArray[np.int64]) -> Floats:
    """Column sums of seeded resamples of whole groups, [NUM_RESAMPLES, columns].

    values [n, columns]; groups int64 [n], equal numbers for dependent values.
    """
    names, members = np.unique(groups, return_inverse=True)
    sums = np.zeros((len(names), values.shape[1]))
    np.add.at(sums, members, values)
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    draws = (rng.integers(len(names), size=len(names)) for _ in range(NUM_RESAMPLES))
    return np.stack([np.bincount(drawn, minlength=len(names)) @ sums for drawn in draws])


def percentile_interval(values: Floats) -> tuple[float, float]:
    """The bounds of the central 95 % of the values."""
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)

"""The difference between two tensors of rows: relative error, cosine of each row, the largest single error and its
place; for logits also agreement of the best tokens and KL divergence. Computed in float64, in blocks of rows.
"""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vlmdeploy.layout import Ints
from vlmdeploy.runtime.backends.lanes import Floats

Wide = NDArray[np.float64]
BLOCK_VALUES = 1 << 20  # values widened to float64 at once


@dataclass(frozen=True)
class RowDifference:
    """The difference of b from a, with the caller's row numbers. If a or b holds Inf or NaN, every figure is NaN and
    `not_finite` says which and where.

    relative_error: |b - a| / |a| over all values; inf if only a is all zeros. cosine: 1 for two rows of zeros, 0 for
    one. kl_nats: mean over the rows of KL(a || b). update_error: error relative to what a's layer adds to its input; a
    long stream hides a wrong layer from the relative error.
    """

    relative_error: float
    cosine_mean: float
    cosine_worst: float
    cosine_worst_row: int
    max_abs_error: float
    max_at: tuple[int, int]  # row and channel
    not_finite: str | None = None
    top1_agreement: float | None = None
    kl_nats: float | None = None
    update_error: float | None = None


@dataclass
class RowMeter:
    """Accumulates the difference of rows given in blocks; are_logits: also compare best tokens and distributions."""

    are_logits: bool = False
    count: int = 0
    error_power: float = 0.0
    power: float = 0.0
    cosine_sum: float = 0.0
    worst_cosine: tuple[float, int] = (math.inf, -1)
    worst_error: tuple[float, tuple[int, int]] = (-1.0, (-1, -1))
    equal_best: int = 0
    kl_sum: float = 0.0
    odd: dict[str, tuple[int, tuple[int, int]]] = field(default_factory=dict)  # side -> count, place of the first

    def add(self, a: Floats, b: Floats, numbers: Ints) -> None:
        """Add rows of both, [rows, channels], with their numbers."""
        size = max(1, BLOCK_VALUES // a.shape[1])
        for start in range(0, len(a), size):
            span = slice(start, start + size)
            self._add_block(a[span].astype(np.float64), b[span].astype(np.float64), numbers[span])

    def _add_block(self, a: Wide, b: Wide, numbers: Ints) -> None:
        self._note_odd("A", a, numbers)
        self._note_odd("B", b, numbers)
        if self.odd:
            return  # the figures are meaningless now
        self.count += len(a)
        error = np.abs(b - a)
        self.error_power += float(np.square(error).sum())
        self.power += float(np.square(a).sum())
        row, channel = (int(place) for place in np.unravel_index(int(error.argmax()), error.shape))
        if error[row, channel] > self.worst_error[0]:
            self.worst_error = float(error[row, channel]), (int(numbers[row]), channel)
        cosines = _cosines(a, b)
        self.cosine_sum += float(cosines.sum())
        lowest = int(cosines.argmin())
        if cosines[lowest] < self.worst_cosine[0]:
            self.worst_cosine = float(cosines[lowest]), int(numbers[lowest])
        if self.are_logits:
            self.equal_best += int((a.argmax(1) == b.argmax(1)).sum())
            log_a, log_b = _log_softmax(a), _log_softmax(b)
            self.kl_sum += float((np.exp(log_a) * (log_a - log_b)).sum())

    def _note_odd(self, side: str, values: Wide, numbers: Ints) -> None:
        places = np.argwhere(~np.isfinite(values))
        if len(places):
            first = int(numbers[places[0][0]]), int(places[0][1])
            seen, place = self.odd.get(side, (0, first))
            self.odd[side] = seen + len(places), place

    def result(self) -> RowDifference:
        """The difference of all rows added so far, at least one."""
        if self.odd:
            told = ", ".join(f"{side} holds {_counted(*found)}" for side, found in self.odd.items())
            nan = math.nan
            return RowDifference(nan, nan, nan, -1, nan, (-1, -1), told)
        assert self.count, "at least one row was added"
        return RowDifference(
            _ratio(self.error_power, self.power),
            self.cosine_sum / self.count,
            *self.worst_cosine,
            *self.worst_error,
            top1_agreement=self.equal_best / self.count if self.are_logits else None,
            kl_nats=max(0.0, self.kl_sum / self.count) if self.are_logits else None,
        )


def row_difference(a: Floats, b: Floats, numbers: Ints, are_logits: bool = False) -> RowDifference:
    """The difference of two tensors [rows, channels] of one shape."""
    meter = RowMeter(are_logits)
    meter.add(a, b, numbers)
    return meter.result()


def _counted(count: int, place: tuple[int, int]) -> str:
    return f"{count} Inf or NaN, the first at row {place[0]}, channel {place[1]}"


def _ratio(error_power: float, power: float) -> float:
    if power == 0:
        return 0.0 if error_power == 0 else math.inf
    return math.sqrt(error_power / power)


def _cosines(a: Wide, b: Wide) -> Wide:
    """Cosine of each pair of rows, as 1 - |u - v|^2 / 2 of unit vectors: exactly 1 for equal rows, and accurate near
    1."""
    lengths_a, lengths_b = _lengths(a), _lengths(b)
    units_a, units_b = (np.divide(x, n, out=np.zeros_like(x), where=n > 0) for x, n in ((a, lengths_a), (b, lengths_b)))
    cosines: Wide = 1 - np.square(units_a - units_b).sum(1) / 2
    one_is_zero = (lengths_a == 0)[:, 0] != (lengths_b == 0)[:, 0]
    cosines[one_is_zero] = 0.0
    return cosines


def _lengths(x: Wide) -> Wide:
    return np.asarray(np.linalg.norm(x, axis=1, keepdims=True))


def _log_softmax(x: Wide) -> Wide:
    shifted = x - x.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))

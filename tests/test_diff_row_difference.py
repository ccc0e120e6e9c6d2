"""Reference tests of the figures of `vlmdeploy diff`: by hand, and against the textbook formulas in plain numpy."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from vlmdeploy.diff.row_difference import RowDifference, row_difference


def compared(a: object, b: object, are_logits: bool = False) -> RowDifference:
    """The difference of two small tables whose rows are numbered from 10 on."""
    first, second = np.array(a, np.float32), np.array(b, np.float32)
    return row_difference(first, second, 10 + np.arange(len(first)), are_logits)


def random_pair(rows: int, channels: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    random = np.random.default_rng(3)
    a = random.standard_normal((rows, channels))
    return a.astype(np.float32), (a + 0.1 * random.standard_normal((rows, channels))).astype(np.float32)


def test_figures_of_two_rows_by_hand() -> None:
    found = compared([[3, 4], [0, 2]], [[3, 4], [2, 0]])
    assert found.relative_error == pytest.approx(math.sqrt(8 / 29))
    assert (found.cosine_mean, found.cosine_worst, found.cosine_worst_row) == pytest.approx((0.5, 0, 11))
    assert (found.max_abs_error, found.max_at) == (2, (11, 0))
    assert (found.not_finite, found.top1_agreement, found.kl_nats) == (None, None, None)


def test_figures_are_the_textbook_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows at a time, so that sums and extremes go over block borders."""
    monkeypatch.setattr("vlmdeploy.diff.row_difference.BLOCK_VALUES", 16)
    a, b = random_pair(rows=7, channels=8)
    found = compared(a, b)
    dots = (a.astype(float) * b).sum(1)
    cosines = dots / np.sqrt((a.astype(float) ** 2).sum(1) * (b.astype(float) ** 2).sum(1))
    distance = np.abs(a.astype(float) - b)
    assert found.relative_error == pytest.approx(np.sqrt((distance**2).sum() / (a.astype(float) ** 2).sum()))
    assert (found.cosine_mean, found.cosine_worst) == pytest.approx((cosines.mean(), cosines.min()))
    assert found.cosine_worst_row == 10 + cosines.argmin()
    assert found.max_abs_error == pytest.approx(distance.max())
    assert found.max_at == (10 + int(distance.argmax()) // 8, int(distance.argmax()) % 8)


def test_equal_tensors_differ_by_exactly_nothing() -> None:
    a, _ = random_pair(rows=5, channels=33)
    found = compared(a, a.copy(), are_logits=True)
    assert (found.relative_error, found.max_abs_error, found.kl_nats) == (0, 0, 0)
    assert (found.cosine_mean, found.cosine_worst, found.top1_agreement) == (1, 1, 1)


def test_cosine_near_one_keeps_its_digits() -> None:
    """For a small angle t it is 1 - t^2 / 2, which a plain product of unit vectors loses."""
    found = row_difference(np.array([[1, 0]], np.float32), np.array([[1, 1e-6]], np.float32), np.arange(1))
    assert 1 - found.cosine_mean == pytest.approx(0.5e-12, rel=1e-3)


def test_logits_are_judged_by_best_token_and_divergence() -> None:
    a, b = np.log([[0.5, 0.25, 0.25], [0.6, 0.3, 0.1]]), np.log([[0.25, 0.5, 0.25], [0.6, 0.3, 0.1]])
    found = compared(a + 7, b - 2, are_logits=True)  # a constant added to a row of logits means nothing
    assert found.top1_agreement == 0.5
    assert found.kl_nats == pytest.approx((0.5 * math.log(2) + 0.25 * math.log(0.5)) / 2, rel=1e-5)


def test_huge_logits_have_a_divergence() -> None:
    found = compared([[3e38, 0]], [[0, 3e38]], are_logits=True)
    assert found.kl_nats == pytest.approx(3e38, rel=1e-6)


@pytest.mark.parametrize(("a", "b", "error", "cosine"), [
    ([[0, 0]], [[0, 0]], 0, 1), ([[0, 0]], [[0, 1]], math.inf, 0), ([[0, 1]], [[0, 0]], 1, 0),
])  # fmt: skip
def test_rows_of_zeros(a: object, b: object, error: float, cosine: float) -> None:
    found = compared(a, b)
    assert (found.relative_error, found.cosine_mean) == (error, cosine)


def test_values_that_are_not_finite_are_counted_and_placed() -> None:
    found = compared([[1, 2], [3, math.inf]], [[1, 2], [math.nan, math.nan]])
    assert found.not_finite == (
        "A holds 1 Inf or NaN, the first at row 11, channel 1, B holds 2 Inf or NaN, the first at row 11, channel 0"
    )
    assert math.isnan(found.relative_error) and math.isnan(found.cosine_mean) and math.isnan(found.max_abs_error)

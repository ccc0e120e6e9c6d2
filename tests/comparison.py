"""The tolerances of the tests, each with its reason, and a comparison that says how far off and where."""

from typing import Any

import numpy as np

GOLDEN_FP32 = 3e-4  # float32 against float32: another order of summing, at magnitudes up to 17
REFERENCE_FP32 = 1e-4  # our float32 against float64 on layers half as wide and magnitudes below 10
SAME_ROW_FP32 = 1e-4  # the same float32 sums with other padding, or positions shifted by one
GOLDEN_BF16_MEAN, GOLDEN_BF16_MAX = 0.15, 1.0  # logits around 5; bf16 keeps 8 bits and two roundings never agree
GPTQ_EQUAL_CODES = 0.999  # share; float32 against float64: a target near a tie changes later codes of its row
GPTQ_LOSS = 1e-4  # relative, where that share is kept: codes at ties cost the same either way
HESSIAN_FP32 = 1e-5  # float32 sums over up to 2000 tokens or inputs, relative to the largest of what is summed


def assert_close(name: str, actual: Any, expected: Any, tolerance: float) -> None:
    """Shapes equal and no difference above `tolerance`; integers and masks must be equal."""
    ours, theirs = np.asarray(actual), np.asarray(expected)
    assert ours.shape == theirs.shape, f"{name}: shape {ours.shape}, expected {theirs.shape}"
    bound = tolerance if theirs.dtype.kind == "f" else 0
    error = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
    assert np.isfinite(error).all(), f"{name}: {np.count_nonzero(~np.isfinite(error))} values are not finite"
    place = tuple(int(index) for index in np.unravel_index(error.argmax(), error.shape))
    assert error[place] <= bound, (
        f"{name}: largest error {error[place]:.3g} at {place} ({ours[place]} instead of {theirs[place]}), "
        f"allowed {bound:.3g}; {np.count_nonzero(error > bound)} of {error.size} values are too far off"
    )

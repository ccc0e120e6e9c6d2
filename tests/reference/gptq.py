"""GPTQ in numpy, column by column as in its paper, with scale search, refinement sweep and the asymmetric target.

Written from arXiv 2210.17323 (algorithm 1: damped Hessian, its inverse, upper Cholesky factor of the inverse, the
scaled error pushed to the later columns) and arXiv 2504.02692 (the target), without a line of vlmdeploy. Slow.
W [N, K] are N rows of K inputs, H [K, K] the Hessian, groups of G inputs. The grid is symmetric: value = scale * (code
- 2^(bits - 1)). Scales are always values of float16, in arrays of the dtype of the arithmetic; rounding is to even.
"""

import itertools
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Real = type[np.float32] | type[np.float64]
RATIOS = np.linspace(1.0, 0.4, 32)


def damped(hessian: Array, damping: float) -> Array:
    """H + damping * mean(diag H) * I, in H's dtype.

    A dead input (diagonal 0) first gets the mean of the diagonal; the damping then takes the mean of the filled one.
    """
    filled = hessian.copy()
    mean = filled.diagonal().mean()
    for column in range(len(filled)):
        if filled[column, column] == 0:
            filled[column, column] = mean
    result: Array = filled + damping * filled.diagonal().mean() * np.eye(len(filled), dtype=filled.dtype)
    return result


def processing_order(hessian: Array) -> Array:
    """Columns by descending diagonal, equal ones in their natural order; dead ones come last if H is not yet filled."""
    return np.argsort(-hessian.diagonal(), kind="stable")


def conditional_weights(hessian_damped: Array, order: Array) -> Array:
    """D [K] in the original order of columns: the variance of each input given those processed after it."""
    factor = inverse_factor(hessian_damped, order)
    weights = np.zeros(len(order), hessian_damped.dtype)
    weights[order] = 1 / factor.diagonal() ** 2
    return weights


def inverse_factor(hessian_damped: Array, order: Array) -> Array:
    """Upper triangular U with inverse(H) = U^T U, H in processing order."""
    inverse = np.linalg.inv(hessian_damped[np.ix_(order, order)])
    upper: Array = np.linalg.cholesky(inverse).T
    return upper


def to_half(scale: Any) -> Any:
    """A scale that float16 holds; one too small for it becomes the smallest number of its sign, not zero."""
    size = max(np.float16(abs(scale)), np.finfo(np.float16).smallest_subnormal)
    return np.copysign(size, np.float16(scale))


def maximal_scale(values: Array, bits: int) -> Any:
    """The scale that spans one group of weights, not rounded; 1 for a group of zeros."""
    largest = np.abs(values).max()
    return largest / values.dtype.type((2**bits - 1) / 2) if largest > 0 else values.dtype.type(1)


def maximal_scales(weights: Array, bits: int, group: int) -> Array:
    """Scales [N, K / G] that span every group, rounded to float16."""
    rows, columns = weights.shape
    scales = np.zeros((rows, columns // group), weights.dtype)
    for row in range(rows):
        for index in range(columns // group):
            scales[row, index] = to_half(maximal_scale(weights[row, index * group : (index + 1) * group], bits))
    return scales


def search_scales(weights: Array, omega: Array, bits: int, group: int, symmetric: bool = True) -> Array:
    """Scales [N, K / G]: of 32 fractions of the maximal one, then of its negative, the first with the least error,
    weighted by omega [K]."""
    if not symmetric:
        raise NotImplementedError("the reference knows only the symmetric grid")
    rows, columns = weights.shape
    scales = np.zeros((rows, columns // group), weights.dtype)
    for row in range(rows):
        for index in range(columns // group):
            places = slice(index * group, (index + 1) * group)
            scales[row, index] = search_one_scale(weights[row, places], omega[places], bits)
    return scales


def search_one_scale(values: Array, omega: Array, bits: int) -> Any:
    """The scale of one group; an all-zero group has scale 1."""
    dtype = values.dtype.type
    if not values.any():
        return dtype(1)
    best, least = dtype(0), np.inf
    for sign, ratio in itertools.product((1, -1), RATIOS):
        scale = dtype(to_half(dtype(sign * ratio) * maximal_scale(values, bits)))
        rounded = np.clip(np.rint(values / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        error = (omega.astype(dtype) * (values - scale * rounded) ** 2).sum()
        if error < least:
            best, least = scale, error
    return best


def gptq(
    weights: Array,
    hessian: Array,
    bits: int,
    group: int,
    damping: float,
    act_order: bool = True,
    clip: Literal["none", "conditional"] = "none",
    dtype: Real = np.float64,
) -> tuple[Array, Array]:
    """Codes uint8 [N, K] and scales [N, K / G] of `dtype`. hessian is H without damping; groups are static.

    "conditional" searches the scales with D for weights, "none" takes the maximal ones.
    """
    hessian = hessian.astype(dtype)
    order = processing_order(hessian) if act_order else np.arange(len(hessian))
    hessian = damped(hessian, damping)
    scales = maximal_scales(weights.astype(dtype), bits, group)
    if clip == "conditional":
        scales = search_scales(weights.astype(dtype), conditional_weights(hessian, order), bits, group)
    factor = inverse_factor(hessian, order)
    zero = 2 ** (bits - 1)
    remaining: Array = weights.astype(dtype)[:, order]
    codes = np.zeros(weights.shape, np.uint8)
    for place, column in enumerate(order):
        scale = scales[:, column // group]
        rounded = np.clip(np.rint(remaining[:, place] / scale), -zero, zero - 1)
        codes[:, column] = rounded + zero
        error = (remaining[:, place] - scale * rounded) / factor[place, place]
        later = slice(place + 1, None)
        remaining[:, later] = remaining[:, later] - np.outer(error, factor[place, later])
    return codes, scales


def dequantize(codes: Array, scales: Array, group: int, bits: int) -> Array:
    """Weights [N, K] in the dtype of the scales."""
    values: Array = np.repeat(scales, group, 1) * (codes.astype(scales.dtype) - 2 ** (bits - 1))
    return values


def sweep(
    weights: Array,
    codes: Array,
    scales: Array,
    hessian_damped: Array,
    group: int,
    bits: int,
    dtype: Real = np.float64,
) -> tuple[Array, Array]:
    """Codes and scales after one visit to every group: its scale by least squares, then each of its codes in turn."""
    W, H, zero = weights.astype(dtype), hessian_damped.astype(dtype), 2 ** (bits - 1)
    codes, scales = codes.copy(), scales.astype(dtype)
    for row in range(len(W)):
        c = codes[row].astype(dtype) - zero
        error = np.repeat(scales[row], group) * c - W[row]
        for index in range(scales.shape[1]):
            places = np.arange(index * group, (index + 1) * group)
            s = refit_scale(scales[row, index], c[places], error, H[:, places], H[np.ix_(places, places)])
            scales[row, index] = s
            error[places] = s * c[places] - W[row, places]
            for j in places:
                gradient = error @ H[:, j]  # Y_j, always from the present error
                c[j] = np.clip(np.rint(c[j] - gradient / (s * H[j, j])), -zero, zero - 1)
                error[j] = s * c[j] - W[row, j]
        codes[row] = c + zero
    return codes, scales


def refit_scale(old: Any, c: Array, error: Array, H_columns: Array, H_gg: Array) -> Any:
    """The least-squares scale of one group of one row, float16; `old` if the sign or more than a factor of 2 changes.

    c [G] are the codes less the zero point, error [K] is Q - W of the row, H_columns [K, G] and H_gg [G, G] parts of H.
    """
    curvature = c @ H_gg @ c
    if curvature <= 0:
        return old
    new = old.dtype.type(np.float16(old - c @ (error @ H_columns) / curvature))
    return new if 0.5 <= new / old <= 2 else old


def loss(weights: Array, dequantized: Array, hessian: Array) -> float:
    """tr(E H E^T) with E = W - Q, in float64."""
    E = weights.astype(np.float64) - dequantized.astype(np.float64)
    return float(np.trace(E @ hessian.astype(np.float64) @ E.T))


def asymmetric_target(weights: Array, hessian_damped: Array, cross: Array) -> Array:
    """W + W C inverse(H): what to quantize where the inputs X_q [K, T] stand in for X_fp.

    H = X_q X_q^T / T, damped; cross = (X_fp - X_q) X_q^T / T.
    """
    target: Array = weights + weights @ cross @ np.linalg.inv(hessian_damped)
    return target


def random_problem(rows: int, columns: int, tokens: int, seed: int) -> tuple[Array, Array, Array]:
    """Weights [N, K], inputs X [T, K] and X^T X / T, float32.

    X has a decaying spectrum in random directions and a few loud channels, like the inputs of a language model.
    """
    random = np.random.default_rng(seed)
    weights = (0.05 * random.standard_normal((rows, columns))).astype(np.float32)
    amplitudes = np.arange(1, columns + 1) ** -0.75
    rotation = np.linalg.qr(random.standard_normal((columns, columns)))[0]
    X = (random.standard_normal((tokens, columns)) * amplitudes) @ rotation
    loud = random.choice(columns, max(1, columns // 32), replace=False)
    X[:, loud] *= random.uniform(5, 20, len(loud))
    X = X.astype(np.float32)
    exact = X.astype(np.float64)
    return weights, X, (exact.T @ exact / tokens).astype(np.float32)

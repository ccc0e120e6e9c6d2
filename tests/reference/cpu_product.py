"""y = x W^T with quantized W and activations rounded to int8, as ONNX Runtime's MatMulNBits does at accuracy level 4.

Each group of a row of x becomes whole numbers, the largest 127; each product is summed exactly and scaled in float64.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def fields(rows: Array, bits: int, count: int) -> Array:
    """Bytes [rows, bytes] -> int64 [rows, count]: fields of 4 or 8 bits, the lowest first."""
    if bits == 8:
        return rows[:, :count].astype(np.int64)
    both = np.stack([rows & 15, rows >> 4], axis=-1).reshape(len(rows), -1)
    return both[:, :count].astype(np.int64)


def rounded(x: Array, group: int) -> tuple[Array, Array]:
    """Whole numbers int64 [rows, groups, group] and scales float32 [rows, groups] of x float32 [rows, width]."""
    groups = x.reshape(len(x), -1, group)
    largest = np.abs(groups).max(-1)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    return np.rint(groups * inverse[..., None]).astype(np.int64), largest / np.float32(127)


def product(x: Array, codes: Array, scales: Array, zeros: Array | None, bias: Array | None, bits: int) -> Array:
    """float64 [rows, outputs]. codes uint8 [outputs, bytes]; scales [outputs, groups]; zeros uint8 [outputs, bytes], or
    None: 2^(bits - 1); bias [outputs] or None."""
    (outputs, groups), width = scales.shape, x.shape[1]
    group = width // groups
    middle = np.full((outputs, groups), 1 << (bits - 1)) if zeros is None else fields(zeros, bits, groups)
    steps = fields(codes, bits, width).reshape(outputs, groups, group) - middle[..., None]
    whole, row_scales = rounded(x, group)
    sums = np.einsum("ogk,rgk->rog", steps, whole)
    y: Array = (sums * scales.astype(np.float64) * row_scales[:, None].astype(np.float64)).sum(-1)
    return y if bias is None else y + bias


def gelu(y: Array) -> Array:
    """y / 2 * (1 + erf(y / sqrt 2))."""
    return np.asarray(y / 2 * (1 + np.vectorize(math.erf)(y / math.sqrt(2))))


def gated(y: Array) -> Array:
    """silu of the first half of the outputs, times the second half. [rows, outputs] -> [rows, outputs / 2]."""
    gate, up = np.split(y, 2, axis=-1)
    with np.errstate(over="ignore"):
        return np.asarray(gate / (1 + np.exp(-gate)) * up)

"""A linear layer whose rows choose one of two int4 weight matrices, and its packed bytes: textbook loops.

y[row] = W[expert of row] x[row] + bias[expert of row], W = scale * (code - 8), one scale per group of inputs. In the
packed form byte j of a group of G inputs holds code j in its low four bits and code G/2 + j in its high four bits.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
ZERO_POINT = 8


def pack(codes: Array, group_size: int) -> Array:
    """Codes [rows, in] -> bytes [rows, in / 2]."""
    rows, width = codes.shape
    packed = np.zeros((rows, width // 2), np.uint8)
    for row in range(rows):
        for group in range(width // group_size):
            for place in range(group_size // 2):
                low = int(codes[row, group * group_size + place])
                high = int(codes[row, group * group_size + group_size // 2 + place])
                packed[row, group * (group_size // 2) + place] = low + 16 * high
    return packed


def weights(codes: Array, scales: Array, group_size: int) -> Array:
    """Float64 [out, in] of codes [out, in] and scales [groups, out]."""
    per_input = np.repeat(scales.astype(np.float64), group_size, 0).T
    return per_input * (codes.astype(np.float64) - ZERO_POINT)


def order(experts: Array) -> tuple[Array, int]:
    """Rows of expert 0 in ascending order, then all others; and how many rows expert 0 has."""
    first = [row for row, expert in enumerate(experts) if expert == 0]
    rest = [row for row, expert in enumerate(experts) if expert != 0]
    return np.array(first + rest, np.int32), len(first)


def routed_linear(x: Array, experts: Array, codes: Array, scales: Array, bias: Array, group_size: int) -> Array:
    """Float64 [rows, out]: x [rows, in], codes [2, out, in], scales [2, groups, out], bias [2, out]."""
    matrices = [weights(codes[expert], scales[expert], group_size) for expert in range(2)]
    y = np.zeros((len(x), codes.shape[1]))
    for row, expert in enumerate(experts):
        chosen = 0 if expert == 0 else 1
        y[row] = matrices[chosen] @ x[row].astype(np.float64) + bias[chosen]
    return y

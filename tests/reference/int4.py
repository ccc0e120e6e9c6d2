"""Symmetric int4 by rounding to the nearest code, and its packing, group by group.

A group is `group_size` neighbouring weights of one output row. Codes are 0..15 with zero point 8; 15 values lie inside
-7.5..7.5 scales, hence the 7.5. Packed bytes follow ONNX Runtime's MatMulNBits: [out, groups, group_size / 2], the even
place in the low four bits.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
ZERO_POINT = 8


def quantize_rtn(weight: Array, group_size: int) -> tuple[Array, Array]:
    """Codes uint8 [out, in] and scales float16 [out, in / group_size] of weights [out, in]."""
    num_out, num_in = weight.shape
    codes = np.zeros((num_out, num_in), np.uint8)
    scales = np.zeros((num_out, num_in // group_size), np.float16)
    for row in range(num_out):
        for group in range(num_in // group_size):
            places = slice(group * group_size, (group + 1) * group_size)
            values = weight[row, places].astype(np.float32)
            largest = np.abs(values).max()
            scale = np.float16(largest / 7.5)  # rounded first: the codes fit the scale that is stored
            if scale == 0:  # nothing but zeros, or too small for float16
                scale = np.float16(1) if largest == 0 else np.finfo(np.float16).smallest_subnormal
            scales[row, group] = scale
            codes[row, places] = np.clip(np.rint(values / np.float32(scale)) + ZERO_POINT, 0, 15)
    return codes, scales


def dequantize(codes: Array, scales: Array, group_size: int) -> Array:
    """Float32 weights [out, in]: scale * (code - 8)."""
    return np.repeat(scales.astype(np.float32), group_size, 1) * (codes.astype(np.float32) - ZERO_POINT)


def pack(codes: Array, group_size: int) -> Array:
    """Codes [out, in] -> bytes [out, groups, group_size / 2]."""
    num_out, num_in = codes.shape
    packed = np.zeros((num_out, num_in // 2), np.uint8)
    for place in range(0, num_in, 2):
        packed[:, place // 2] = codes[:, place] | codes[:, place + 1] << 4
    return packed.reshape(num_out, num_in // group_size, group_size // 2)


def unpack(packed: Array) -> Array:
    """Bytes [out, groups, group_size / 2] -> codes [out, in]."""
    rows = packed.reshape(len(packed), -1)
    codes = np.zeros((len(rows), 2 * rows.shape[1]), np.uint8)
    codes[:, 0::2] = rows & 15
    codes[:, 1::2] = rows >> 4
    return codes

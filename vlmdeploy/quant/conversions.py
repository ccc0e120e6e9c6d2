"""Lay out a `Quantized` for the operators that read codes: ONNX Runtime's MatMulNBits and ONNX's DequantizeLinear.

Conversions are exact: same codes, same fp16 scales, no second rounding. What a format cannot hold exactly raises
QuantizationError.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from vlmdeploy.errors import QuantizationError
from vlmdeploy.quant.grid import Codes, Floats, Grid, Quantized, pack_nibbles

CONTAINERS = (2, 4, 8)
SMALLEST_BLOCK, LARGEST_BLOCK = 16, 128  # powers of two that every MatMulNBits kernel supports


@dataclass(frozen=True)
class MatMulNBits:
    """Inputs and attributes of the operator. codes uint8 [out, groups, block_size * bits / 8]; scales float32 [out,
    groups]; zero_points uint8 [out, ceil(groups * bits / 8)], or None where all are 2^(bits - 1)."""

    codes: Codes
    scales: Floats
    zero_points: Codes | None
    bits: int
    block_size: int


@dataclass(frozen=True)
class DequantizeLinear:
    """A weight [in, out] for the operator along axis 0, opset 21 or later; all zero points are 0.

    codes uint8: the bytes of the whole tensor in C order, two 4-bit codes per byte, low nibble first. scales [groups,
    out].
    """

    codes: Codes
    shape: tuple[int, int]
    data_type: Literal["INT4", "INT8"]
    scales: Floats


def widen(quantized: Quantized, bits: int) -> Quantized:
    """The same values with wider codes. Codes and zero points are shifted, so a symmetric grid stays symmetric."""
    grid = quantized.grid
    wider = Grid(bits, grid.group_size, grid.symmetric)
    if bits == grid.bits:
        return quantized
    if not grid.bits < bits <= 8:
        raise QuantizationError(f"codes of {grid.bits} bits cannot be widened to {bits} bits")
    shift = np.uint8(wider.zero_point - grid.zero_point)
    zeros = None if quantized.zeros is None else quantized.zeros + shift
    return Quantized(quantized.codes + shift, quantized.scales, wider, zeros)


def repeat_scales(quantized: Quantized, group_size: int) -> Quantized:
    """The same values in smaller groups, which repeat the scale and zero point of their old group."""
    grid = quantized.grid
    if grid.group_size % group_size:
        raise QuantizationError(f"groups of {grid.group_size} cannot be split into groups of {group_size}")
    times = grid.group_size // group_size
    zeros = None if quantized.zeros is None else quantized.zeros.repeat(times, 1)
    scales = quantized.scales.repeat(times, 1)
    return Quantized(quantized.codes, scales, replace(grid, group_size=group_size), zeros)


def matmul_nbits(quantized: Quantized) -> MatMulNBits:
    """Lay out for ONNX Runtime, in the narrowest fields that hold the codes.

    Splits groups that the operator does not support, e.g. a whole width of 11008 into blocks of 128.
    """
    bits = field_bits(quantized.grid.bits)
    held = repeat_scales(widen(quantized, bits), matmul_block_size(quantized.grid.group_size))
    num_out, groups = held.scales.shape
    return MatMulNBits(
        codes=pack_bytes(held.codes, bits).reshape(num_out, groups, -1),
        scales=held.scales,
        zero_points=None if held.zeros is None else pack_bytes(_padded(held.zeros, 8 // bits), bits),
        bits=bits,
        block_size=held.grid.group_size,
    )


def field_bits(bits: int) -> int:
    """The narrowest MatMulNBits field that holds codes of `bits` bits."""
    return next(width for width in CONTAINERS if width >= bits)


def matmul_block_size(group_size: int) -> int:
    """The largest power of two up to 128 that divides the group; QuantizationError if it is below 16."""
    block_size = min(group_size & -group_size, LARGEST_BLOCK)
    if block_size < SMALLEST_BLOCK:
        raise QuantizationError(
            f"groups of {group_size} are not multiples of a MatMulNBits block: powers of two ≥ {SMALLEST_BLOCK}"
        )
    return block_size


def pack_bytes(codes: Codes, bits: int) -> Codes:
    """Codes of 2, 4 or 8 bits, 8 / bits of them per byte along the last axis, the first one lowest."""
    if bits == 8:
        return codes
    if bits == 4:
        return pack_nibbles(codes)
    pairs: Codes = codes[..., 0::2] | (codes[..., 1::2] << np.uint8(2))
    return pack_nibbles(pairs)


def _padded(values: Codes, multiple: int) -> Codes:
    return np.pad(values, ((0, 0), (0, -values.shape[1] % multiple)))


def dequantize_linear(quantized: Quantized) -> DequantizeLinear:
    """Lay out for ONNX's DequantizeLinear, whose blocks are the groups: INT4 for up to 4 bits, else INT8.

    The grid is symmetric: code - 2^(bits - 1) is signed and needs no zero point.
    """
    assert quantized.zeros is None, "the caller rejects asymmetric codes"
    bits = 4 if quantized.grid.bits <= 4 else 8
    held = widen(quantized, bits)
    signed = np.ascontiguousarray(held.codes.T) ^ np.uint8(held.grid.zero_point)
    return DequantizeLinear(
        codes=pack_bytes(signed.reshape(-1), bits),
        shape=(signed.shape[0], signed.shape[1]),
        data_type="INT4" if bits == 4 else "INT8",
        scales=np.ascontiguousarray(held.scales.T),
    )

"""One `Quantized` laid out for each engine: ONNX Runtime's MatMulNBits, ONNX DequantizeLinear, TensorRT and GGUF.

All of it is exact: the same codes and the same fp16 scales in another order, never a second rounding. What a format
cannot hold exactly raises QuantizationError. Writing graphs and files around these arrays is left to others.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vlmdeploy.errors import QuantizationError
from vlmdeploy.quant.grid import Codes, Floats, Grid, Quantized, pack_nibbles

CONTAINERS = (2, 4, 8)
SMALLEST_BLOCK, LARGEST_BLOCK = 16, 128  # the powers of two that every kernel of MatMulNBits knows
GGUF_BLOCK = 32

Halves = NDArray[np.float16]


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
    """Inputs of the operator, opset 21 or later. codes uint8: the bytes of the whole tensor in C order, two 4-bit codes
    per byte, low nibble first. scales and zero_points follow the shape of the weight, one value per block along `axis`.
    """

    codes: Codes
    shape: tuple[int, int]
    data_type: Literal["INT4", "UINT4", "INT8", "UINT8"]
    scales: Floats
    zero_points: Codes | None  # packed as the codes; None where all are 0
    axis: int
    block_size: int


@dataclass(frozen=True)
class TensorrtInt4:
    """A weight [in, out] of INT4 for DequantizeLinear along axis 0. codes uint8 [in, out / 2], low nibble first; scales
    float16 [in / block_size, out]."""

    codes: Codes
    scales: Halves
    block_size: int


def widen(quantized: Quantized, bits: int) -> Quantized:
    """The same values with wider codes: codes and zero points move up so that a symmetric grid stays symmetric."""
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
    """The same values in smaller groups, each with the scale and zero point of the group it was part of."""
    grid = quantized.grid
    if grid.group_size % group_size:
        raise QuantizationError(f"groups of {grid.group_size} cannot be split into groups of {group_size}")
    times = grid.group_size // group_size
    zeros = None if quantized.zeros is None else quantized.zeros.repeat(times, 1)
    scales = quantized.scales.repeat(times, 1)
    return Quantized(quantized.codes, scales, replace(grid, group_size=group_size), zeros)


def matmul_nbits(quantized: Quantized, container_bits: int | None = None) -> MatMulNBits:
    """For ONNX Runtime, in fields of `container_bits` (default: the narrowest of 2, 4 and 8 that holds the codes).

    Groups that the operator does not know are split, e.g. a whole width of 11008 into blocks of 128.
    """
    bits = container_bits or field_bits(quantized.grid.bits)
    if bits not in CONTAINERS:
        raise QuantizationError(f"MatMulNBits in fields of {bits} bits; it knows {', '.join(map(str, CONTAINERS))}")
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
    """The narrowest field of MatMulNBits that holds codes of so many bits."""
    return next(width for width in CONTAINERS if width >= bits)


def matmul_block_size(group_size: int) -> int:
    """The largest power of two up to 128 that divides the group; QuantizationError where that is below 16."""
    block_size = min(group_size & -group_size, LARGEST_BLOCK)
    if block_size < SMALLEST_BLOCK:
        raise QuantizationError(
            f"groups of {group_size} are not made of blocks that MatMulNBits knows: powers of two ≥ {SMALLEST_BLOCK}"
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


def dequantize_linear(quantized: Quantized, axis: int, signed: bool | None = None) -> DequantizeLinear:
    """For ONNX's DequantizeLinear: weight [in, out] for axis 0, [out, in] for axis 1; blocks are groups.

    signed (default: a symmetric grid) stores code - 2^(bits - 1), which needs no zero points if they are all in the
    middle. Codes of up to 4 bits become INT4 or UINT4, wider ones INT8 or UINT8.
    """
    if axis not in (0, 1):
        raise QuantizationError(f"DequantizeLinear along axis {axis} of a matrix; expected 0 or 1")
    bits = 4 if quantized.grid.bits <= 4 else 8
    held = widen(quantized, bits)
    signed = held.zeros is None if signed is None else signed
    codes, scales = _turned(held.codes, axis), _turned(held.scales, axis)
    zeros = None if held.zeros is None and signed else _turned(_all_zeros(held), axis)
    return DequantizeLinear(
        codes=_packed_flat(codes, bits, signed),
        shape=(codes.shape[0], codes.shape[1]),
        data_type=_data_type(bits, signed),
        scales=scales,
        zero_points=None if zeros is None else _packed_flat(zeros, bits, signed),
        axis=axis,
        block_size=held.grid.group_size,
    )


def _data_type(bits: int, signed: bool) -> Literal["INT4", "UINT4", "INT8", "UINT8"]:
    if bits == 4:
        return "INT4" if signed else "UINT4"
    return "INT8" if signed else "UINT8"


def _turned(values: NDArray[Any], axis: int) -> NDArray[Any]:
    """[out, ...] with the inputs along `axis`, contiguous."""
    return np.ascontiguousarray(values.T if axis == 0 else values)


def _all_zeros(quantized: Quantized) -> Codes:
    if quantized.zeros is not None:
        return quantized.zeros
    return np.full(quantized.scales.shape, quantized.grid.zero_point, np.uint8)


def _packed_flat(codes: Codes, bits: int, signed: bool) -> Codes:
    """The bytes of a whole tensor: flattened in C order, an odd end padded. Signed is the highest bit flipped."""
    flat = codes.reshape(-1)
    if signed:
        flat = flat ^ np.uint8(1 << (bits - 1))
    return pack_bytes(np.pad(flat, (0, flat.size * bits % 8 // bits)), bits)


def tensorrt_int4(quantized: Quantized) -> TensorrtInt4:
    """For TensorRT's INT4 weights. Raises QuantizationError for codes it does not take: asymmetric or wider ones."""
    _check_symmetric(quantized, "TensorRT's INT4 weights")
    held = widen(quantized, 4)
    if held.codes.shape[0] % 2:
        raise QuantizationError(f"TensorRT packs two outputs per byte, but there are {held.codes.shape[0]}")
    signed = np.ascontiguousarray(held.codes.T) ^ np.uint8(held.grid.zero_point)
    scales = np.ascontiguousarray(held.scales.T.astype(np.float16))
    return TensorrtInt4(pack_nibbles(signed), scales, held.grid.group_size)


def gguf_q4_0(quantized: Quantized) -> Codes:
    """A GGUF tensor of type Q4_0: uint8 [out, in / 32 * 18], blocks of an fp16 scale and 16 bytes.

    Byte i of a block holds code i in its low nibble and code i + 16 in its high one.
    """
    _check_symmetric(quantized, "Q4_0")
    held = repeat_scales(widen(quantized, 4), GGUF_BLOCK)
    blocks: Codes = held.codes.reshape(*held.scales.shape, 2, GGUF_BLOCK // 2)
    return _gguf_blocks(held.scales, blocks[:, :, 0] | (blocks[:, :, 1] << np.uint8(4)))


def gguf_q8_0(quantized: Quantized) -> Codes:
    """A GGUF tensor of type Q8_0: uint8 [out, in / 32 * 34], blocks of an fp16 scale and 32 int8."""
    _check_symmetric(quantized, "Q8_0")
    held = repeat_scales(widen(quantized, 8), GGUF_BLOCK)
    signed = held.codes ^ np.uint8(held.grid.zero_point)
    return _gguf_blocks(held.scales, signed.reshape(*held.scales.shape, GGUF_BLOCK))


def _gguf_blocks(scales: Floats, codes: Codes) -> Codes:
    """scales [out, blocks] and bytes [out, blocks, n] -> uint8 [out, blocks * (2 + n)]."""
    halves = np.ascontiguousarray(scales.astype("<f2")).view(np.uint8).reshape(*scales.shape, 2)
    return np.concatenate((halves, codes), -1).reshape(len(scales), -1)


def _check_symmetric(quantized: Quantized, target: str) -> None:
    if quantized.zeros is not None and (quantized.zeros != quantized.grid.zero_point).any():
        raise QuantizationError(
            f"{target} cannot hold zero points, but these codes are asymmetric: quantize symmetrically"
        )

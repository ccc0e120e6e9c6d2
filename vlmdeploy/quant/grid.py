"""The integer grid: groups of neighbouring inputs share a scale and a zero point.

Symmetric (the default): the zero point is 2^(bits - 1), the scale max|w| / ((2^bits - 1) / 2), as in GPTQ files.
Asymmetric: scale and zero point span the group's range; TensorRT does not support this. Scales are rounded to fp16
*before* codes are chosen, so ONNX Runtime, TensorRT and GPTQ files hold the same values: docs/design/0002-one-grid.md.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vlmdeploy.errors import QuantizationError

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]

SMALLEST_SCALE = float(np.finfo(np.float16).smallest_subnormal)
LARGEST_SCALE = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Grid:
    """Width of the codes, inputs per scale, and whether the zero point is fixed in the middle.

    group_size: a number of inputs; GPTQ's -1 (one group for the whole width) is the width itself here.
    """

    bits: int
    group_size: int
    symmetric: bool = True

    @property
    def zero_point(self) -> int:
        """The code of 0.0 in a symmetric grid."""
        return 1 << (self.bits - 1)

    @property
    def max_code(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1


@dataclass(frozen=True)
class Quantized:
    """Some rows of a quantized matrix: value = scale * (code - zero point).

    codes uint8 [rows, in]; scales float32 [rows, groups], each an fp16 value; zeros uint8 [rows, groups], None for the
    zero point of a symmetric grid.
    """

    codes: Codes
    scales: Floats
    grid: Grid
    zeros: Codes | None = None


def quantize_rtn(weights: Floats, grid: Grid) -> Quantized:
    """Round to nearest. weights float32 [rows, in]; raises QuantizationError if groups do not divide `in`."""
    groups = split_groups(weights, grid)
    scales, zeros = initial_scales(groups, grid)
    return round_to_grid(weights, scales, zeros, grid)


def split_groups(weights: Floats, grid: Grid) -> Floats:
    """weights [rows, in] -> [rows, groups, group_size]; raises QuantizationError if groups do not divide `in`."""
    rows, width = weights.shape
    if width % grid.group_size:
        raise QuantizationError(f"group size {grid.group_size} does not divide the input width {width}")
    return weights.reshape(rows, -1, grid.group_size)


def round_to_grid(weights: Floats, scales: Floats, zeros: Codes | None, grid: Grid) -> Quantized:
    """Round to the nearest codes for given scales and zero points, both [rows, groups]."""
    rows, width = weights.shape
    steps = weights.reshape(rows, -1, grid.group_size) / scales[..., None]
    np.rint(steps, out=steps)
    steps += np.float32(grid.zero_point) if zeros is None else zeros[..., None].astype(np.float32)
    codes = np.clip(steps, 0, grid.max_code, out=steps).astype(np.uint8)
    return Quantized(codes.reshape(rows, width), scales, grid, zeros)


def initial_scales(groups: Floats, grid: Grid) -> tuple[Floats, Codes | None]:
    """Scales (and zero points of an asymmetric grid) that span each group, [rows, groups] each.

    Raises QuantizationError if fp16 cannot hold a scale.
    """
    return (symmetric_scales(groups, grid), None) if grid.symmetric else asymmetric_scales(groups, grid)


def symmetric_scales(groups: Floats, grid: Grid) -> Floats:
    """One scale per group, rounded to fp16: groups float32 [rows, groups, group_size] -> [rows, groups].

    A group of zeros gets scale 1. Raises QuantizationError if fp16 cannot hold a scale.
    """
    return _checked_scales(spanning_scales(groups, grid), groups)


def asymmetric_scales(groups: Floats, grid: Grid) -> tuple[Floats, Codes]:
    """Scales and zero points that span min(w, 0) to max(w, 0) of each group.

    Zero points are at least 1: GPTQ's v1 files store them minus one, and a negative field borrows from its neighbour.
    """
    scales = _checked_scales(spanning_scales(groups, grid), groups)
    low = np.minimum(groups.min(-1), 0)
    return scales, np.clip(np.rint(-low / scales), 1, grid.max_code).astype(np.uint8)


def spanning_scales(groups: Floats, grid: Grid) -> Floats:
    """The unrounded scales with which the codes span each group; 0 for a group of zeros."""
    low, high = groups.min(-1), groups.max(-1)
    if grid.symmetric:
        spans: Floats = np.maximum(high, -low) / np.float32(grid.max_code / 2)
        return spans
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    steps = np.where(low == 0, grid.max_code - 1, grid.max_code)  # a zero point of at least 1 leaves code 0 unused
    spans = (high - low) / steps.astype(np.float32)
    return spans


def _checked_scales(scales: Floats, groups: Floats) -> Floats:
    if scales.max(initial=0.0) > LARGEST_SCALE:
        raise QuantizationError(f"a weight of magnitude {np.abs(groups).max():.3g} needs a scale beyond fp16")
    return np.where(scales == 0, np.float32(1), to_half(scales))


def to_half(scales: Floats) -> Floats:
    """Round scales to fp16 values of the same sign, never to zero."""
    sizes = np.clip(np.abs(scales), SMALLEST_SCALE, LARGEST_SCALE)
    rounded: Floats = np.copysign(sizes, scales).astype(np.float16).astype(np.float32)
    return rounded


def dequantize(quantized: Quantized) -> Floats:
    """Float values, scale * (code - zero point), float32 [rows, in]."""
    rows, width = quantized.codes.shape
    grid = quantized.grid
    values: Floats = quantized.codes.astype(np.float32).reshape(rows, -1, grid.group_size)
    values -= np.float32(grid.zero_point) if quantized.zeros is None else quantized.zeros[..., None].astype(np.float32)
    values *= quantized.scales[..., None]
    return values.reshape(rows, width)


def stacked(parts: list[Quantized]) -> Quantized:
    """Concatenate the rows of several matrices of one grid."""
    if len(parts) == 1:
        return parts[0]
    symmetric = all(part.zeros is None for part in parts)
    grid = replace(parts[0].grid, symmetric=symmetric)
    zeros = None if symmetric else np.concatenate([_all_zeros(part) for part in parts])
    return Quantized(
        np.concatenate([part.codes for part in parts]), np.concatenate([part.scales for part in parts]), grid, zeros
    )


def _all_zeros(part: Quantized) -> Codes:
    return np.full(part.scales.shape, part.grid.zero_point, np.uint8) if part.zeros is None else part.zeros


def pack_nibbles(codes: Codes) -> Codes:
    """Two 4-bit codes per byte along the last axis, the first in the low nibble: [..., n] -> [..., n / 2]."""
    return np.asarray(codes[..., 0::2] | (codes[..., 1::2] << 4), np.uint8)


def unpack_nibbles(packed: Codes) -> Codes:
    """The inverse of `pack_nibbles`: [..., n] -> [..., 2 n]."""
    codes: Codes = np.stack((packed & 0x0F, packed >> 4), -1).reshape(*packed.shape[:-1], -1)
    return codes

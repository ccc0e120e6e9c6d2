"""The symmetric integer grid: groups of neighbouring inputs share a positive scale, the zero point is 2^(bits - 1).

Scales are rounded to fp16 *before* codes are chosen, so that ONNX Runtime, TensorRT, GPTQ files and GGUF all hold the
same result. The scale of a group is max|w| / ((2^bits - 1) / 2), as in GPTQ files; see docs/design/0002-one-grid.md.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlmdeploy.errors import QuantizationError

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]

SMALLEST_SCALE = float(np.finfo(np.float16).smallest_subnormal)
LARGEST_SCALE = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Grid:
    """How wide the codes are and how many inputs share a scale."""

    bits: int
    group_size: int

    @property
    def zero_point(self) -> int:
        """The code of 0.0."""
        return 1 << (self.bits - 1)

    @property
    def max_code(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1


@dataclass(frozen=True)
class Quantized:
    """Some rows of a quantized matrix: codes uint8 [rows, in]; scales float32 [rows, groups], each an fp16 value."""

    codes: Codes
    scales: Floats
    grid: Grid


def quantize_rtn(weights: Floats, grid: Grid) -> Quantized:
    """Round to nearest. weights float32 [rows, in]; raises QuantizationError if groups do not divide `in`."""
    rows, width = weights.shape
    if width % grid.group_size:
        raise QuantizationError(f"group size {grid.group_size} does not divide the input width {width}")
    groups = weights.reshape(rows, -1, grid.group_size)
    scales = symmetric_scales(groups, grid)
    steps = groups / scales[..., None]
    np.rint(steps, out=steps)
    steps += grid.zero_point
    codes = np.clip(steps, 0, grid.max_code, out=steps).astype(np.uint8)
    return Quantized(codes.reshape(rows, width), scales, grid)


def symmetric_scales(groups: Floats, grid: Grid) -> Floats:
    """One scale per group, rounded to fp16: groups float32 [rows, groups, group_size] -> [rows, groups].

    A group of zeros gets scale 1. Raises QuantizationError where fp16 cannot hold the scale.
    """
    largest = np.maximum(groups.max(-1), -groups.min(-1))
    scales = largest / (grid.max_code / 2)
    if scales.max(initial=0.0) > LARGEST_SCALE:
        raise QuantizationError(f"a weight of magnitude {largest.max():.3g} needs a scale beyond fp16")
    rounded = np.maximum(scales, SMALLEST_SCALE).astype(np.float16).astype(np.float32)
    return np.where(largest == 0, np.float32(1), rounded)


def dequantize(quantized: Quantized) -> Floats:
    """Float values, scale * (code - zero point), float32 [rows, in]."""
    rows, width = quantized.codes.shape
    grid = quantized.grid
    values: Floats = quantized.codes.astype(np.float32).reshape(rows, -1, grid.group_size)
    values -= np.float32(grid.zero_point)
    values *= quantized.scales[..., None]
    return values.reshape(rows, width)


def pack_nibbles(codes: Codes) -> Codes:
    """Two 4-bit codes per byte along the last axis, the first in the low nibble: [..., n] -> [..., n / 2]."""
    return np.asarray(codes[..., 0::2] | (codes[..., 1::2] << 4), np.uint8)


def unpack_nibbles(packed: Codes) -> Codes:
    """The inverse of `pack_nibbles`: [..., n] -> [..., 2 n]."""
    codes: Codes = np.stack((packed & 0x0F, packed >> 4), -1).reshape(*packed.shape[:-1], -1)
    return codes

"""Encode and decode a quantized linear of a GPTQ checkpoint: qweight, qzeros, scales and g_idx.

value[out, in] = scale[g_idx[in], out] * (code - zero point[g_idx[in], out]). Format "gptq" (v1) stores zero points
minus one, "gptq_v2" stores them unchanged. `packing` packs the bits, `gptq_config` reads and writes the config.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmdeploy.errors import QuantizationError, WeightsError
from vlmdeploy.quant.gptq_config import BITS, CheckpointFormat
from vlmdeploy.quant.grid import Codes, Floats, Grid, Quantized, dequantize
from vlmdeploy.quant.packing import (
    WORD_BITS,
    fills_words,
    num_words,
    pack_rows,
    pack_words,
    unpack_rows,
    unpack_words,
)

PARTS = ("qweight", "qzeros", "scales", "g_idx")
ALL_ROWS = slice(None)
LARGEST_FLOAT = float(np.finfo(np.float32).max)

Array = NDArray[Any]
Tensors = Mapping[str, Array]


@dataclass(frozen=True)
class StoredLinear:
    """A linear as stored, inputs in their own order.

    codes uint8 [out, in]; scales float32 [out, groups]; zeros uint8 [out, groups]; g_idx int64 [in]: the group of each
    input. Groups need not be contiguous, nor the last one full.
    """

    codes: Codes
    scales: Floats
    zeros: Codes
    g_idx: NDArray[np.int64]
    bits: int
    group_size: int

    def dequantize(self) -> Floats:
        """Float values scale * (code - zero point), float32 [out, in], for any groups."""
        if self._groups_are_contiguous() and len(self.g_idx) % self.group_size == 0:  # 15 times faster
            grid = Grid(self.bits, self.group_size, symmetric=False)
            return dequantize(Quantized(self.codes, self.scales, grid, self.zeros))
        values: Floats = self.codes.astype(np.float32)
        values -= self.zeros[:, self.g_idx]
        values *= self.scales[:, self.g_idx]
        return values

    def quantized(self) -> Quantized:
        """Convert for the exporters; zeros are None if all are the symmetric zero point.

        Raises QuantizationError for groups that are not contiguous or not full, and for scales that fp16 cannot hold.
        """
        width = len(self.g_idx)
        if not self._groups_are_contiguous():
            raise QuantizationError(
                "dynamic groups (act-order without static groups): neighbouring inputs do not share a scale, so no "
                "backend can hold these codes; dequantize them instead"
            )
        if width % self.group_size:
            raise QuantizationError(f"group size {self.group_size} does not divide the input width {width}")
        if not _are_half(self.scales):
            raise QuantizationError(
                "the scales are not fp16 values, which every backend needs; dequantize them instead"
            )
        symmetric = bool((self.zeros == Grid(self.bits, self.group_size).zero_point).all())
        grid = Grid(self.bits, self.group_size, symmetric)
        return Quantized(self.codes, self.scales, grid, None if symmetric else self.zeros)

    def _groups_are_contiguous(self) -> bool:
        return bool((self.g_idx == np.arange(len(self.g_idx)) // self.group_size).all())


def encode_linear(
    quantized: Quantized, name: str = "linear", checkpoint_format: CheckpointFormat = "gptq"
) -> dict[str, Array]:
    """Encode a linear as four tensors under their short names.

    qweight int32 [in * bits / 32, out], qzeros int32 [groups, out * bits / 32], scales float16 [groups, out], g_idx
    int32 [in]. Raises QuantizationError, naming the linear, for sizes that do not fill words and groups, and for
    values that the format cannot hold.
    """
    grid = quantized.grid
    _check_encodable(quantized, name)
    zeros = quantized.zeros
    if zeros is None:
        zeros = np.full(quantized.scales.shape, grid.zero_point, np.uint8)
    if checkpoint_format == "gptq":
        if not zeros.all():
            raise QuantizationError(
                f"{name}: zero point 0 cannot be stored in format gptq; write gptq_v2 or keep it ≥ 1"
            )
        zeros = zeros - np.uint8(1)
    return {
        "qweight": pack_rows(quantized.codes, grid.bits),
        "qzeros": np.ascontiguousarray(pack_words(zeros, grid.bits).T),
        "scales": np.ascontiguousarray(quantized.scales.T.astype(np.float16)),
        "g_idx": (np.arange(quantized.codes.shape[1]) // grid.group_size).astype(np.int32),
    }


def _check_encodable(quantized: Quantized, name: str) -> None:
    grid, (num_out, num_in) = quantized.grid, quantized.codes.shape
    if grid.bits not in BITS:
        raise QuantizationError(f"{name}: {grid.bits} bits; GPTQ files hold {', '.join(map(str, BITS))}")
    if num_in % grid.group_size:
        raise QuantizationError(f"{name}: group size {grid.group_size} does not divide the input width {num_in}")
    for axis, size in (("input", num_in), ("output", num_out)):
        if not fills_words(size, grid.bits):
            raise QuantizationError(
                f"{name}: {size} codes of {grid.bits} bits along the {axis} do not fill 32-bit words; other readers "
                "refuse such files: keep this linear in float or use another precision"
            )
    if not _are_half(quantized.scales):
        raise QuantizationError(f"{name}: the scales are not fp16 values, but GPTQ files hold fp16")


def _are_half(scales: Floats) -> bool:
    with np.errstate(over="ignore"):
        return bool((scales.astype(np.float16).astype(np.float32) == scales).all())


def decode_linear(
    tensors: Tensors,
    grid: Grid,
    checkpoint_format: CheckpointFormat,
    name: str,
    rows: slice = ALL_ROWS,
    desc_act: bool = False,
) -> StoredLinear:
    """Decode a linear written by any GPTQ library from its tensors by short name; `rows` selects outputs.

    g_idx may be absent or empty (k // group size) unless the config says desc_act, qzeros too if the grid is symmetric.
    The last word and the last group may be partly filled; scales may be fp16 or wider. Zero points of a v1 file are its
    words plus one in every field, with carries, as GPTQModel reads them (there a zero point 0 borrowed from its
    neighbour); 3-bit fields wrap alone. Raises WeightsError, naming the linear, for inconsistent shapes, types or
    values.
    """
    qweight, scales = _typed(tensors, "qweight", "i", name), _typed(tensors, "scales", "f", name)
    num_out, num_in = qweight.shape[1], input_width(tensors, grid.bits)
    groups = -(-num_in // grid.group_size)
    _check_shape(name, "qweight", qweight, (num_words(num_in, grid.bits), num_out))
    _check_shape(name, "scales", scales, (groups, num_out))
    _check_scales(scales, grid, name)
    check_g_idx(_size(tensors, "g_idx"), num_in, grid, desc_act, name)
    return StoredLinear(
        codes=unpack_rows(_words(qweight[:, rows]), grid.bits, num_in),
        scales=np.ascontiguousarray(scales[:, rows].T, np.float32),
        zeros=_zero_points(tensors, grid, checkpoint_format, (groups, num_out), name)[rows],
        g_idx=_group_of_input(tensors, grid, num_in, groups, name),
        bits=grid.bits,
        group_size=grid.group_size,
    )


def input_width(tensors: Tensors, bits: int) -> int:
    """The number of inputs: the length of g_idx, else all codes that fit the words."""
    return _size(tensors, "g_idx") or len(tensors["qweight"]) * WORD_BITS // bits


def check_g_idx(size: int, num_in: int, grid: Grid, desc_act: bool, name: str) -> None:
    """Raise WeightsError, naming the linear, unless a g_idx of `size` entries (0: none) gives each input its group."""
    if size not in (0, num_in):
        raise WeightsError(f"{name}.g_idx: {size} entries, expected {num_in}, one for each input")
    if not size and desc_act and grid.group_size < num_in:
        raise WeightsError(
            f"{name}.g_idx: missing or empty, but the config says desc_act = true: which inputs share a group of "
            f"{grid.group_size} is not known"
        )


def _size(tensors: Tensors, part: str) -> int:
    return int(tensors[part].size) if part in tensors else 0


def _check_scales(scales: Array, grid: Grid, name: str) -> None:
    """Raise WeightsError if a scale, or a weight on its grid, overflows float32."""
    largest = float(np.abs(scales).max(initial=0))
    if not largest * grid.max_code <= LARGEST_FLOAT:
        found = f"values up to {largest:.3g}" if np.isfinite(largest) else "values that are not finite"
        raise WeightsError(f"{name}.scales: {found}, expected weights that float32 can hold")


def _typed(tensors: Tensors, part: str, kind: str, name: str) -> Array:
    """Look up a tensor and check that it is a matrix of int32 (kind "i") or of floats ("f")."""
    if part not in tensors:
        raise WeightsError(f"{name}.{part}: missing; a GPTQ linear has {', '.join(PARTS)}")
    values = tensors[part]
    if values.ndim != 2 or values.dtype.kind != kind or (kind == "i" and values.itemsize != 4):
        expected = "an int32 matrix" if kind == "i" else "a matrix of floats"
        raise WeightsError(f"{name}.{part}: {values.dtype} {list(values.shape)}, expected {expected}")
    return values


def _check_shape(name: str, part: str, values: Array, expected: tuple[int, int]) -> None:
    if values.shape != expected:
        raise WeightsError(
            f"{name}.{part}: {list(values.shape)}, expected {list(expected)}: do bits and group size of the config "
            "belong to these weights?"
        )


def _words(values: Array) -> NDArray[np.int32]:
    return values.astype(np.int32, copy=False)


def _zero_points(
    tensors: Tensors, grid: Grid, checkpoint_format: CheckpointFormat, shape: tuple[int, int], name: str
) -> Codes:
    """Zero points uint8 [out, groups] of the whole linear; shape is (groups, out)."""
    groups, num_out = shape
    if not _size(tensors, "qzeros"):
        if not grid.symmetric:
            raise WeightsError(f"{name}.qzeros: missing or empty, but the config says sym = false")
        return np.full((num_out, groups), grid.zero_point, np.uint8)
    words = _words(_typed(tensors, "qzeros", "i", name))
    _check_shape(name, "qzeros", words, (groups, num_words(num_out, grid.bits)))
    if checkpoint_format == "gptq" and WORD_BITS % grid.bits == 0:
        ones = sum(1 << place for place in range(0, WORD_BITS, grid.bits))
        words = (words.view(np.uint32) + np.uint32(ones)).view(np.int32)
    zeros = unpack_words(np.ascontiguousarray(words.T), grid.bits, num_out)
    if checkpoint_format == "gptq" and WORD_BITS % grid.bits:
        zeros = (zeros + np.uint8(1)) & np.uint8(grid.max_code)
    return zeros


def _group_of_input(tensors: Tensors, grid: Grid, num_in: int, groups: int, name: str) -> NDArray[np.int64]:
    if not _size(tensors, "g_idx"):
        return np.arange(num_in) // grid.group_size
    g_idx = tensors["g_idx"]
    if g_idx.ndim != 1 or g_idx.dtype.kind != "i" or g_idx.min() < 0 or g_idx.max() >= groups:
        raise WeightsError(
            f"{name}.g_idx: {g_idx.dtype} {list(g_idx.shape)} with values {g_idx.min()} to {g_idx.max()}, expected one "
            f"group of 0 to {groups - 1} for each input"
        )
    return g_idx.astype(np.int64)

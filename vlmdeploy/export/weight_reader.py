"""Reads a bundle's weights from the checkpoint, a few rows at a time, in the planned precision.

`effective` returns the float values that the stored weights stand for; verification fills PyTorch with them.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmdeploy.errors import ExportError, QuantizationError
from vlmdeploy.model.checkpoint import Checkpoint
from vlmdeploy.quant.grid import Floats, Quantized, dequantize, quantize_rtn
from vlmdeploy.quant.precision import Precision, PrecisionPlan, Stored

Ints = NDArray[np.int64]
BLOCK_BYTES = 8 << 20  # float32 bytes of a block of rows: it stays in the processor's cache


def stored_precisions(checkpoint: Checkpoint) -> Stored | None:
    """The precisions in a quantized checkpoint; None for a float one. Linears of several grids count as floats."""
    if not checkpoint.is_quantized:
        return None
    grids = {target: checkpoint.stored_grid(target) for target in checkpoint.rules if target in checkpoint}
    codes = {target: Precision.of(grid) for target, grid in grids.items() if grid is not None}
    report = checkpoint.report()
    chosen = report["settings"]["parts"] if report else {}
    return Stored(codes, {part: kind for part, kind in chosen.items() if kind in ("fp32", "fp16")})


@dataclass(frozen=True)
class WeightReader:
    """Weights of a checkpoint in the precisions of a plan."""

    checkpoint: Checkpoint
    plan: PrecisionPlan

    def matrix_shape(self, target: str) -> tuple[int, int]:
        """Rows and columns of a parameter as a matrix [out, in]."""
        shape = self.checkpoint.shape(target)
        return shape[0], int(np.prod(shape[1:]))

    def vector(self, target: str) -> Floats:
        """A whole parameter, float32, in its own shape."""
        return np.asarray(self.checkpoint.parameter(target).numpy())

    def rows(self, target: str, start: int, stop: int) -> Floats:
        """Rows of a matrix, float32 [stop - start, in]."""
        return np.asarray(self.checkpoint.rows(target, start, stop).flatten(1).numpy())

    def half_rows(self, target: str, start: int, stop: int) -> NDArray[np.float16]:
        """Rows as fp16. Raises ExportError if a value overflows."""
        rows = self.rows(target, start, stop)
        with np.errstate(over="ignore"):
            halves = rows.astype(np.float16)
        if not np.isfinite(halves).all():
            raise ExportError(
                f'"{target}" holds a value of {np.abs(rows).max():.3g}, beyond fp16 (65504): {self.in_fp32(target)}'
            )
        return halves

    def quantized(self, target: str, start: int, stop: int) -> Quantized:
        """Rows as codes and scales: those of the checkpoint, or else rounded to nearest.

        Raises QuantizationError where a scale overflows, or no backend can hold the stored codes.
        """
        grid = self.plan[target].grid
        assert grid is not None, f"{target} is kept in float"
        try:
            if target in self.checkpoint and self.checkpoint.stored_grid(target) is not None:
                return self.checkpoint.quantized_rows(target, start, stop)
            return quantize_rtn(self.rows(target, start, stop), grid)
        except QuantizationError as error:
            raise QuantizationError(f'"{target}": {error}: {self.in_fp32(target)}') from error

    def effective_rows(self, target: str, start: int, stop: int) -> Floats:
        """The float32 values that the stored rows stand for."""
        precision = self.plan.by_target.get(target, Precision("fp32"))
        if precision.bits:
            return dequantize(self.quantized(target, start, stop))
        if precision.type == "fp16":
            return self.half_rows(target, start, stop).astype(np.float32)
        return self.rows(target, start, stop)

    def effective(self, target: str) -> Tensor:
        """The float32 values that a whole stored parameter stands for, in its own shape."""
        shape = self.checkpoint.shape(target)
        if target not in self.plan.by_target:
            return self.checkpoint.parameter(target)
        values = torch.empty(self.matrix_shape(target))
        for start, stop in self.blocks(target):
            values[start:stop] = torch.from_numpy(self.effective_rows(target, start, stop))
        return values.reshape(shape)

    def blocks(self, target: str) -> list[tuple[int, int]]:
        """Row ranges of the blocks of a matrix."""
        rows, width = self.matrix_shape(target)
        size = max(1, BLOCK_BYTES // (4 * width))
        return [(start, min(start + size, rows)) for start in range(0, rows, size)]

    def in_fp32(self, target: str) -> str:
        """The remedy for a value of this parameter that a narrow type cannot hold."""
        return in_fp32(self.checkpoint.rules[target].part)


def in_fp32(part: str) -> str:
    """The remedy for a value that a narrow type cannot hold."""
    option = "--target ort-fp32" if part == "decoder" else f"--{part.replace('_', '-')} fp32"
    return f"keep that part in fp32 with {option}"

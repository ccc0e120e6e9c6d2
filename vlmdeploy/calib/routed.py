"""Routed statistics of one linear: its Hessian from the tokens that really reach it, calibration and held-out apart."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlmdeploy.calib.activations import Ints
from vlmdeploy.calib.calibration_set import Tokens
from vlmdeploy.calib.hessian import CrossSum, HessianSum
from vlmdeploy.calib.processes import Processes
from vlmdeploy.calib.solver import HeldOut, Problem, judged_rows
from vlmdeploy.errors import CalibrationError
from vlmdeploy.quant.grid import Grid

CHUNK_TOKENS = 1024

HessianKind = Literal["routed", "pooled", "text-only"]
Inputs = Callable[[Ints], tuple[Tensor, ...]]
"""The linear's input for some rows, [rows, in]: of the quantized stream and, under asymmetric calibration, the float one."""


def chunks(rows: Ints) -> Iterator[Ints]:
    """Row numbers in pieces of bounded size."""
    return (rows[start : start + CHUNK_TOKENS] for start in range(0, len(rows), CHUNK_TOKENS))


@dataclass(frozen=True)
class Statistics:
    """Collects what `Problem` needs. kind: whose tokens a Hessian is made of; all but "routed" are for comparison."""

    processes: Processes
    kind: HessianKind = "routed"

    def problem(
        self, name: str, weights: Tensor, grid: Grid, tokens: Tokens, expert: str | None, inputs: Inputs
    ) -> Problem:
        """Statistics of one linear. expert: whose tokens reach it; None: all tokens do.

        Raises CalibrationError, naming linear and sample, for activations that are not finite.
        """
        source = self._source(expert)
        total, cross = HessianSum(weights.shape[1]), None
        rows = tokens.select(source, held_out=False)
        for piece in chunks(rows):
            x, *undisturbed = inputs(piece)
            _check_finite(name, x, piece, tokens)
            total.add(x)
            if undisturbed:
                cross = cross or CrossSum.empty(weights.shape[1])
                cross.add(undisturbed[0] - x, x)
        total.samples = tokens.samples_in(rows)
        total.reduce(self.processes)
        if cross is not None:
            cross.reduce(self.processes)
        held_out = self._held_out(name, weights, tokens, source, inputs)
        count, samples = total.tokens, total.samples
        disturbance = None if cross is None else cross.mean()
        return Problem(name, weights, grid, total.mean(), count, samples, held_out, disturbance)

    def _source(self, expert: str | None) -> str | None:
        if expert is None or self.kind == "pooled":
            return None
        return "language" if self.kind == "text-only" else expert

    def _held_out(
        self, name: str, weights: Tensor, tokens: Tokens, source: str | None, inputs: Inputs
    ) -> HeldOut | None:
        """The same for held-out tokens; None where no process has any."""
        total, judged = HessianSum(weights.shape[1]), weights[judged_rows(len(weights))]
        cross, spread = torch.zeros(judged.shape), torch.zeros(1)
        is_asymmetric = False
        for piece in chunks(tokens.select(source, held_out=True)):
            x, *undisturbed = inputs(piece)
            _check_finite(name, x, piece, tokens)
            total.add(x)
            if undisturbed:
                is_asymmetric = True
                difference = (undisturbed[0] - x) @ judged.t()
                cross.addmm_(difference.t(), x)
                spread += difference.square().sum()
        total.reduce(self.processes)
        if not total.tokens:
            return None
        count = total.tokens
        self.processes.sum_in_place(cross)
        self.processes.sum_in_place(spread)
        (asymmetric,) = self.processes.sum_counts(int(is_asymmetric))
        disturbance = cross.div_(count) if asymmetric else None
        return HeldOut(total.mean(), count, disturbance, float(spread) / count)


def _check_finite(name: str, x: Tensor, rows: Ints, tokens: Tokens) -> None:
    finite = torch.isfinite(x).all(1)
    if bool(finite.all()):
        return
    row = int(rows[int((~finite).nonzero()[0])])
    raise CalibrationError(
        f"{name}: the activations that enter it hold Inf or NaN, first in sample {tokens.sample_of(row)}"
    )

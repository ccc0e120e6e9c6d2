"""Routed statistics of one linear: its Hessian over the tokens that reach it, and its held-out inputs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vlmdeploy.calib.activations import Ints
from vlmdeploy.calib.calibration_set import Tokens
from vlmdeploy.calib.hessian import HessianSum
from vlmdeploy.calib.processes import Processes
from vlmdeploy.calib.solver import HeldOut, Problem, judged_rows
from vlmdeploy.errors import CalibrationError
from vlmdeploy.quant.grid import Grid

CHUNK_TOKENS = 1024
HELD_OUT_TOKENS = 2048  # kept in full: smaller than a second Hessian of a wide input

HessianKind = Literal["routed", "pooled", "text-only"]
Inputs = Callable[[Ints], tuple[Tensor, ...]]
"""The linear's input for some rows, [rows, in]: in the quantized stream and, if there are two, in the float one."""


def chunks(rows: Ints) -> Iterator[Ints]:
    """Split row numbers into pieces of bounded size."""
    return (rows[start : start + CHUNK_TOKENS] for start in range(0, len(rows), CHUNK_TOKENS))


@dataclass(frozen=True)
class Statistics:
    """Collects the data of a `Problem`. kind: whose tokens enter a Hessian; all but "routed" are for comparison."""

    processes: Processes
    kind: HessianKind = "routed"

    def problem(
        self,
        name: str,
        weights: Tensor,
        grid: Grid,
        tokens: Tokens,
        expert: str | None,
        inputs: Inputs,
        counts: Tensor | None = None,
    ) -> Problem:
        """Collect the statistics of one linear. expert: whose tokens reach it, or None for all. counts [tokens]: what
        each token counts in the Hessian and in held-out losses.

        Raises CalibrationError, naming linear and sample, for activations that are not finite.
        """
        source = self._source(expert)
        total, cross = HessianSum(weights.shape[1]), None  # cross: (X_float - X)^T X
        rows = tokens.select(source, held_out=False)
        weighted = inputs if counts is None else _weighted(inputs, counts)
        for piece in chunks(rows) if len(rows) else [rows]:  # a process without rows must still take part in the sums
            x, *undisturbed = _finite(name, weighted(piece), piece, tokens)
            total.add(x)
            if undisturbed:
                cross = torch.zeros_like(total.total) if cross is None else cross
                cross.addmm_((undisturbed[0] - x).t(), x)
        total.samples = tokens.samples_in(rows)
        total.reduce(self.processes)
        if cross is not None:
            self.processes.sum_in_place(cross)
            cross.div_(max(1, total.tokens))
        held_out = self._held_out(name, weights, tokens, source, weighted)
        return Problem(name, weights, grid, total.mean(), total.tokens, total.samples, held_out, cross)

    def _source(self, expert: str | None) -> str | None:
        if expert is None or self.kind == "pooled":
            return None
        return "language" if self.kind == "text-only" else expert

    def _held_out(
        self, name: str, weights: Tensor, tokens: Tokens, source: str | None, inputs: Inputs
    ) -> HeldOut | None:
        """Held-out tokens, evenly spaced if there are many; None if no process has any."""
        rows = tokens.select(source, held_out=True)
        kept = _evenly(rows, tokens, HELD_OUT_TOKENS // self.processes.count)
        judged = weights[judged_rows(len(weights))]
        seen, disturbances = [torch.empty(0, weights.shape[1])], [torch.empty(0, len(judged))]
        for piece in chunks(kept):
            x, *undisturbed = _finite(name, inputs(piece), piece, tokens)
            seen.append(x)
            disturbances += [(other - x) @ judged.t() for other in undisturbed]
        (count,) = self.processes.sum_counts(len(rows))
        if not count:
            return None
        everyone = self.processes.gather((torch.cat(seen), torch.cat(disturbances)))
        disturbance = torch.cat([each[1] for each in everyone])
        return HeldOut(torch.cat([each[0] for each in everyone]), count, disturbance if len(disturbance) else None)


def _weighted(inputs: Inputs, counts: Tensor) -> Inputs:
    """These rows times the roots of what they count."""

    def scaled(rows: Ints) -> tuple[Tensor, ...]:
        factors = counts[torch.from_numpy(rows)].sqrt()[:, None]
        return tuple(factors * x for x in inputs(rows))

    return scaled


def _evenly(rows: Ints, tokens: Tokens, limit: int) -> Ints:
    """At most about `limit` of these rows, evenly spaced among first tokens as among the others."""
    if len(rows) <= limit:
        return rows
    is_first = tokens.is_first(rows)
    kept = [
        part[np.linspace(0, len(part) - 1, -(-len(part) * limit // len(rows))).astype(np.int64)]
        for part in (rows[is_first], rows[~is_first])
    ]
    return np.sort(np.concatenate(kept))


def _finite(name: str, streams: tuple[Tensor, ...], rows: Ints, tokens: Tokens) -> tuple[Tensor, ...]:
    """Return the streams unchanged. Raises CalibrationError if one is not finite."""
    for x in streams:
        finite = torch.isfinite(x).all(1)
        if not bool(finite.all()):
            row = int(rows[int((~finite).nonzero()[0])])
            raise CalibrationError(
                f"{name}: the activations that enter it hold Inf or NaN, first in sample {tokens.sample_of(row)}"
            )
    return streams

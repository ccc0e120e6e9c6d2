"""Quantize one linear with the recipe that is best on held-out tokens.

The calibration error is no criterion: with about as many tokens as inputs it looks perfect, while new tokens do worse
than with rounding to nearest.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vlmdeploy.calib.hessian import effective_rank, largest_eigenvalue, start_vector
from vlmdeploy.overriding import override
from vlmdeploy.quant.gptq import (
    ClipWeights,
    Factor,
    GptqOptions,
    asymmetric_target,
    best_loops,
    factorize,
    filled_diagonal,
    output_loss,
    quantize_clipped,
    quantize_gptq,
    sweep,
)
from vlmdeploy.quant.grid import Grid, Quantized, dequantize, quantize_rtn
from vlmdeploy.quant.loops import Loops
from vlmdeploy.quant.quantization_report import LinearReport

DAMPINGS = (0.01, 0.05, 0.2, 0.6, 2.0)
LEAST_FOR_FEW_TOKENS = 0.05  # damping with fewer tokens than inputs
SAMPLE_ROWS = 256  # rows of the matrix on which recipes are tried
INVERSE_STEPS = 10  # of inverse iteration
DEFAULT_SWEEPS = {3: 2, 4: 1}  # by bits; none for others


@dataclass(frozen=True)
class HeldOut:
    """Held-out inputs float32 [kept, in], an even sample of `tokens` tokens.

    disturbance [kept, rows], under asymmetric calibration: W (x_float - x) for the `judged_rows` of W.
    """

    inputs: Tensor
    tokens: int
    disturbance: Tensor | None = None

    def loss(self, errors: Tensor) -> float:
        """Mean squared distance from the float model's outputs, for weight errors [rows, in] of the judged rows."""
        distance = self.inputs @ errors.t()
        if self.disturbance is not None:
            distance -= self.disturbance
        return float(distance.square().sum()) / len(self.inputs)


@dataclass(frozen=True)
class Problem:
    """A linear to quantize: weights float32 [out, in], hessian [in, in] of `tokens` tokens from `samples` samples.

    cross [in, in]: see `quant.gptq.asymmetric_target`; None for plain calibration.
    """

    name: str
    weights: Tensor
    grid: Grid
    hessian: Tensor
    tokens: int
    samples: int = 0
    held_out: HeldOut | None = None
    cross: Tensor | None = None

    @property
    def has_few_tokens(self) -> bool:
        """Whether the Hessian is singular: there are fewer tokens than inputs."""
        return self.tokens < self.weights.shape[1]


class Solver(Protocol):
    """Quantizes one linear."""

    def solve(self, problem: Problem) -> tuple[Quantized, LinearReport]:
        """Quantize the whole matrix. Raises QuantizationError."""


@dataclass(frozen=True)
class Trial:
    """A recipe and its loss on the judged rows."""

    damping: float
    sweeps: int
    loss: float
    is_rtn: bool = False


@dataclass(frozen=True)
class GptqSolver(Solver):
    """GPTQ with the damping and the number of sweeps that are best on held-out tokens.

    sweeps None: the default for the bits. dampings: the candidates from the least up; the first is used if nothing is
    held out. signed: whether narrow symmetric grids may get negative scales.
    """

    act_order: bool = True
    clip: ClipWeights = "conditional"
    signed: bool = True
    sweeps: int | None = None
    dampings: tuple[float, ...] = DAMPINGS
    loops: Loops = field(default_factory=best_loops)

    @override
    def solve(self, problem: Problem) -> tuple[Quantized, LinearReport]:
        best, factor = self._choose(problem)
        if best.is_rtn:
            quantized = quantize_clipped(
                np.asarray(problem.weights), filled_diagonal(problem.hessian), problem.grid, self.signed, self.loops
            )
        else:
            quantized = self._quantize(problem, factor, problem.weights, best.sweeps)
        return quantized, self._report(problem, quantized, best, factor)

    def _choose(self, problem: Problem) -> tuple[Trial, Factor]:
        """The best recipe and its factorized Hessian. Starts in the middle of the dampings and goes on in the direction
        that lowers the loss, while it does. Holds one factor in memory at a time."""
        factor: Factor | None = None

        def best_with(damping: float) -> Trial:
            nonlocal factor
            factor = None  # free it before the next one
            factor = factorize(problem.hessian, damping, self.act_order)
            return min(self._try(problem, factor), key=lambda trial: trial.loss)

        dampings = self._dampings(problem)
        start = place = (len(dampings) - 1) // 2
        best = best_with(dampings[start])
        for step in (-1, 1):
            while place + step in range(len(dampings)):
                candidate = best_with(dampings[place + step])
                if candidate.loss >= best.loss:
                    break
                best, place = candidate, place + step
            if place != start:
                break
        assert factor is not None, "of the last trial"
        if factor.damping != best.damping:
            factor = None
            factor = factorize(problem.hessian, best.damping, self.act_order)
        rtn = self._try_rtn(problem)
        return (rtn if rtn is not None and rtn.loss < best.loss else best), factor

    def _dampings(self, problem: Problem) -> tuple[float, ...]:
        usual = tuple(
            damping for damping in self.dampings if damping >= LEAST_FOR_FEW_TOKENS or not problem.has_few_tokens
        )
        return usual if problem.held_out is not None else usual[:1]

    def _try(self, problem: Problem, factor: Factor) -> Iterator[Trial]:
        """Try the recipes with this factor on the judged rows."""
        sweeps = self._sweeps(problem)
        if problem.held_out is None:
            yield Trial(factor.damping, sweeps, 0.0)
            return
        rows = judged_rows(len(problem.weights))
        target = self._target(problem, factor, problem.weights[rows])
        plain = quantize_gptq(target, factor, problem.grid, self._options(problem), problem.hessian, self.loops)
        yield Trial(factor.damping, 0, held_out_loss(problem, plain))
        for count in range(1, sweeps + 1):
            plain = sweep(target, plain, problem.hessian, factor.damping, self.loops)
            if count == sweeps:
                yield Trial(factor.damping, sweeps, held_out_loss(problem, plain))

    def _try_rtn(self, problem: Problem) -> Trial | None:
        if problem.held_out is None:
            return None
        rows = np.asarray(problem.weights[judged_rows(len(problem.weights))])
        rounded = quantize_clipped(rows, filled_diagonal(problem.hessian), problem.grid, self.signed, self.loops)
        return Trial(0.0, 0, held_out_loss(problem, rounded), is_rtn=True)

    def _sweeps(self, problem: Problem) -> int:
        if problem.has_few_tokens:
            return 0
        return DEFAULT_SWEEPS.get(problem.grid.bits, 0) if self.sweeps is None else self.sweeps

    def _options(self, problem: Problem) -> GptqOptions:
        return GptqOptions("none" if problem.has_few_tokens else self.clip, 0, self.signed)

    def _target(self, problem: Problem, factor: Factor, weights: Tensor) -> Tensor:
        return weights if problem.cross is None else asymmetric_target(weights, factor, problem.cross)

    def _quantize(self, problem: Problem, factor: Factor, weights: Tensor, sweeps: int) -> Quantized:
        target = self._target(problem, factor, weights)
        quantized = quantize_gptq(target, factor, problem.grid, self._options(problem), problem.hessian, self.loops)
        for _ in range(sweeps):
            quantized = sweep(target, quantized, problem.hessian, factor.damping, self.loops)
        return quantized

    def _report(self, problem: Problem, quantized: Quantized, best: Trial, factor: Factor) -> LinearReport:
        largest = largest_eigenvalue(problem.hessian) + factor.damping * float(problem.hessian.diagonal().mean())
        least = float(smallest_eigenvalue(factor))
        return measured_report(
            problem,
            quantized,
            LinearReport(
                problem.name,
                problem.grid.bits,
                problem.grid.group_size,
                "rtn" if best.is_rtn else "gptq",
                damping=None if best.is_rtn else best.damping,
                sweeps=best.sweeps,
                asymmetric=problem.cross is not None and not best.is_rtn,
                condition_number=largest / least if least else None,
                note="rounding to nearest was better on held-out tokens" if best.is_rtn else "",
            ),
        )


def judged_rows(count: int) -> Tensor:
    """The rows on which recipes are judged: all rows of a small matrix, else evenly spaced ones."""
    if count <= SAMPLE_ROWS:
        return torch.arange(count)
    return torch.linspace(0, count - 1, SAMPLE_ROWS).long()


def held_out_loss(problem: Problem, judged: Quantized) -> float:
    """Mean squared distance on held-out tokens between the float model's outputs and those of these rows."""
    assert problem.held_out is not None, "the caller checks"
    weights = problem.weights[judged_rows(len(problem.weights))]
    return problem.held_out.loss(torch.from_numpy(dequantize(judged)) - weights)


def measured_report(problem: Problem, quantized: Quantized, report: LinearReport) -> LinearReport:
    """Add to a report what holds for any method: tokens, spectrum, errors."""
    rows = judged_rows(len(problem.weights))
    weights, grid = problem.weights[rows], problem.grid
    kept = Quantized(
        quantized.codes[rows],
        quantized.scales[rows],
        grid,
        None if quantized.zeros is None else quantized.zeros[rows],
    )
    errors = torch.from_numpy(dequantize(kept)) - weights
    scale = output_loss(weights, problem.hessian)
    values = {
        "tokens": problem.tokens,
        "samples": problem.samples,
        "negative_scales": int((quantized.scales < 0).sum()),
        "dead_inputs": int((problem.hessian.diagonal() == 0).sum()),
        "effective_rank": effective_rank(problem.hessian),
        "calibration_error": output_loss(errors, problem.hessian) / scale if scale else None,
    }
    if problem.held_out is not None:
        scale = float((problem.held_out.inputs @ weights.t()).square().sum()) / len(problem.held_out.inputs)
        rounded = quantize_rtn(np.asarray(weights), grid)
        values["held_out_tokens"] = problem.held_out.tokens
        values["held_out_error"] = held_out_loss(problem, kept) / scale if scale else None
        values["held_out_error_rtn"] = held_out_loss(problem, rounded) / scale if scale else None
    return LinearReport(**{**vars(report), **values})


def smallest_eigenvalue(factor: Factor) -> float:
    """Of the damped Hessian, by inverse iteration: an upper bound, a few percent off on flat spectra."""
    scale = torch.from_numpy(factor.conditional[factor.order])
    vector = start_vector(len(scale))[:, None]
    value = 0.0
    for _ in range(INVERSE_STEPS):
        moved = torch.linalg.solve_triangular(factor.unit, vector, upper=False, unitriangular=True)
        moved = torch.linalg.solve_triangular(factor.unit.t(), moved / scale[:, None], upper=True, unitriangular=True)
        size = float(moved.norm())
        value = 1 / size
        vector = moved / size
    return value

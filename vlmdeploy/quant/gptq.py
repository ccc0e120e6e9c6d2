"""GPTQ (arXiv 2210.17323): quantize the inputs of a weight matrix one by one and compensate each error in the remaining
inputs, given the Hessian. This form needs one Cholesky factor and no inverse.

With H = L L^T over the permuted inputs, tr(E H E^T) = |E L|^2. So the last input is quantized first, and the target of
input j is its weight plus its share of all errors so far: t_j = w_j + sum_{i>j} e_i L_ij / L_jj. D_j = L_jj^2 is what
remains of an error in input j after compensation. Blocks look left: one long product per block, instead of an update of
the rest of the matrix. Matrices are [out, in], Hessians X^T X / tokens.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vlmdeploy.errors import QuantizationError
from vlmdeploy.quant.grid import (
    Codes,
    Floats,
    Grid,
    Quantized,
    initial_scales,
    round_to_grid,
    spanning_scales,
    split_groups,
    to_half,
)
from vlmdeploy.quant.loops import Ints, Loops
from vlmdeploy.quant.numpy_loops import NUMPY_LOOPS

BLOCK = 128
CLIP_RATIOS = np.linspace(1.0, 0.4, 32, dtype=np.float32)
MOST_SIGNED_BITS = 4  # in wider grids one more step is nothing, and a backend may want positive scales
SEARCH_ROWS = 256  # rows whose candidate scales are in memory at once
TURNED_ROWS = 64  # rows that are transposed at once
MAX_SCALE_CHANGE = 2.0  # a refit that changes a scale more is rejected
DAMPING_STEPS = 3.0
LEAST_RAISED_DAMPING = 1e-3

ClipWeights = Literal["none", "ones", "diagonal", "conditional"]


@dataclass(frozen=True)
class Factor:
    """The damped Hessian of permuted inputs as unit * diag(D) * unit^T.

    order int64 [in]: the input at each position; the last position is quantized first. unit [in, in]: lower triangular
    with a unit diagonal. conditional float32 [in]: D of each input, in the inputs' own order. damping: relative to the
    mean of the diagonal, after any raise.
    """

    order: Ints
    unit: Tensor
    conditional: Floats
    damping: float


@dataclass(frozen=True)
class GptqOptions:
    """clip: the weights of squared errors in the scale search; "none" keeps the largest weight of each group
    representable. sweeps: rounds of refinement after the last input. signed: whether the search also tries negative
    scales."""

    clip: ClipWeights = "conditional"
    sweeps: int = 1
    signed: bool = True


def factorize(hessian: Tensor, damping: float, act_order: bool = True) -> Factor:
    """Factor hessian + damping * mean(diagonal) * I; float32 [in, in], not modified.

    Dead inputs get the mean on the diagonal, so their weights are rounded to nearest. If the factorization fails, try
    float64, then more damping. Raises QuantizationError for an empty or non-finite Hessian, and if damping 1 fails.
    """
    diagonal = filled_diagonal(hessian)
    order = np.argsort(-diagonal, kind="stable")[::-1].copy() if act_order else np.arange(len(diagonal))[::-1].copy()
    while True:
        lower = _cholesky(hessian, diagonal, order, damping)
        if lower is not None:
            break
        if damping >= 1:
            raise QuantizationError("the Hessian cannot be factorized even with damping 1: are its activations finite?")
        damping = min(1.0, max(DAMPING_STEPS * damping, LEAST_RAISED_DAMPING))
    roots = lower.diagonal().clone()
    lower.div_(roots)
    conditional = np.empty(len(diagonal), np.float32)
    conditional[order] = roots.square().numpy()
    return Factor(order, lower, conditional, damping)


def filled_diagonal(hessian: Tensor) -> Floats:
    """The diagonal, float32 [in], with zeros replaced by the mean. Raises QuantizationError if it is all zero."""
    diagonal: Floats = hessian.diagonal().numpy().copy()
    if not np.isfinite(diagonal).all():
        raise QuantizationError("the Hessian holds Inf or NaN")
    if not diagonal.any():
        raise QuantizationError("the Hessian is empty: no token reached this input")
    diagonal[diagonal == 0] = diagonal.mean()
    return diagonal


def _cholesky(hessian: Tensor, diagonal: Floats, order: Ints, damping: float) -> Tensor | None:
    """The lower factor of the permuted, damped Hessian; None if it is not positive definite."""
    places = torch.from_numpy(order)
    permuted = torch.empty_like(hessian)
    _permute(hessian, places, permuted)
    new_diagonal = torch.from_numpy(diagonal[order]) + damping * float(diagonal.mean())
    permuted.diagonal().copy_(new_diagonal)
    lower, failed = _factor_in_place(permuted)
    if not failed:
        return lower
    _permute(hessian, places, permuted)
    permuted.diagonal().copy_(new_diagonal)
    lower, failed = _factor_in_place(permuted.double())
    return None if failed else lower.float()


def _permute(hessian: Tensor, places: Tensor, permuted: Tensor) -> None:
    """Permute rows and columns, in blocks: a copy of all rows would be a third matrix in memory."""
    for start in range(0, len(places), BLOCK):
        rows = hessian.index_select(0, places[start : start + BLOCK])
        permuted[start : start + BLOCK] = rows.index_select(1, places)


def _factor_in_place(matrix: Tensor) -> tuple[Tensor, bool]:
    """Compute the lower factor in place; the second result says whether that failed."""
    info = torch.empty((), dtype=torch.int32)
    lower, info = torch.linalg.cholesky_ex(matrix.mT, out=(matrix.mT, info))
    return lower, bool(info) or not bool(torch.isfinite(lower.diagonal()).all())


def quantize_gptq(
    weights: Tensor, factor: Factor, grid: Grid, options: GptqOptions, hessian: Tensor, loops: Loops | None = None
) -> Quantized:
    """Quantize weights float32 [out, in]; modifies neither weights nor Hessian.

    hessian: the one that was factorized, for the scale search and the sweeps. Raises QuantizationError if groups do not
    divide `in` or a scale does not fit in fp16.
    """
    loops = loops or best_loops()
    omega = clip_weights(options.clip, factor, hessian)
    scales, zeros = search_scales(np.asarray(weights), omega, grid, options.signed, loops)
    codes = _quantize_columns(weights, factor, grid, scales, zeros, loops)
    quantized = Quantized(codes, scales, grid, zeros)
    for _ in range(options.sweeps):
        quantized = sweep(weights, quantized, hessian, factor.damping, loops)
    return quantized


def clip_weights(clip: ClipWeights, factor: Factor, hessian: Tensor) -> Floats | None:
    """The weight of each input's squared error in the scale search, [in]; None: no search."""
    match clip:
        case "none":
            return None
        case "ones":
            return np.ones(len(factor.order), np.float32)
        case "diagonal":
            return filled_diagonal(hessian)
        case "conditional":
            return factor.conditional


def search_scales(
    weights: Floats, omega: Floats | None, grid: Grid, signed: bool = True, loops: Loops | None = None
) -> tuple[Floats, Codes | None]:
    """Scales [out, groups] (and zero points of an asymmetric grid), fp16 values.

    With omega float32 [in], try 32 scales per group, from 1 to 0.4 of the spanning scale, and take the one with the
    least sum of omega * (rounding error)^2. signed: in a narrow symmetric grid try their negatives, too. The codes
    reach one step further below zero than above; a negative scale gives that step to the positive weights.
    """
    groups = split_groups(weights, grid)
    scales, zeros = initial_scales(groups, grid)
    if omega is None:
        return scales, zeros
    loops = loops or best_loops()
    omega = omega.reshape(groups.shape[1], -1)
    for start in range(0, len(groups), SEARCH_ROWS):
        rows = slice(start, start + SEARCH_ROWS)
        scales[rows], middles = _best_candidates(groups[rows], omega, grid, signed, loops)
        if zeros is not None:
            zeros[rows] = middles
    return scales, zeros


def _best_candidates(groups: Floats, omega: Floats, grid: Grid, signed: bool, loops: Loops) -> tuple[Floats, Codes]:
    """The best scales and zero points of some rows: groups [rows, groups, group_size] -> [rows, groups] each."""
    lows, spans = groups.min(-1), spanning_scales(groups, grid)
    has_both_signs = signed and grid.symmetric and grid.bits <= MOST_SIGNED_BITS
    ratios = np.concatenate([CLIP_RATIOS, -CLIP_RATIOS]) if has_both_signs else CLIP_RATIOS
    candidates = to_half(np.where(spans == 0, np.float32(1), spans) * ratios[:, None, None])
    if grid.symmetric:
        middles = np.broadcast_to(np.uint8(grid.zero_point), candidates.shape).copy()
    else:
        middles = np.rint(-np.minimum(lows, 0) * CLIP_RATIOS[:, None, None] / candidates)
        middles = np.clip(middles, 1, grid.max_code).astype(np.uint8)
    best = np.zeros(spans.shape, np.int64)
    loops.search_scales(np.ascontiguousarray(groups), omega, candidates, middles, grid.max_code, best)
    chosen = best[None]
    return np.take_along_axis(candidates, chosen, 0)[0], np.take_along_axis(middles, chosen, 0)[0]


def _quantize_columns(
    weights: Tensor, factor: Factor, grid: Grid, scales: Floats, zeros: Codes | None, loops: Loops
) -> Codes:
    """Quantize with fixed scales: codes uint8 [out, in]."""
    order, unit = factor.order, factor.unit
    rest = _turned_weights(weights, torch.from_numpy(order))  # weights, then errors, from the last row up
    turned_scales, turned_zeros = turned_grid(scales, zeros, grid)
    codes = np.empty(rest.shape, np.uint8)
    groups = order // grid.group_size
    for stop in range(len(order), 0, -BLOCK):
        start = max(0, stop - BLOCK)
        targets = rest[start:stop].clone()
        if stop < len(order):
            targets.addmm_(unit[stop:, start:stop].t(), rest[stop:])
        places = slice(start, stop)
        block = np.ascontiguousarray(unit[start:stop, start:stop].numpy())
        loops.quantize_block(
            targets.numpy(), rest[start:stop].numpy(), block, turned_scales, turned_zeros, groups[places],
            order[places], codes, grid.max_code,
        )  # fmt: skip
    return _transposed(codes)


def _turned_weights(weights: Tensor, places: Tensor) -> Tensor:
    """The transposed weights in a given input order, [in, out]; some rows at a time, to stay in the cache."""
    turned = torch.empty(weights.shape[::-1])
    for start in range(0, len(weights), TURNED_ROWS):
        rows = slice(start, start + TURNED_ROWS)
        turned[:, rows] = weights[rows].index_select(1, places).t()
    return turned


def _transposed(codes: Codes) -> Codes:
    """A new transposed array. Torch works in tiles, five times as fast as numpy."""
    turned: Codes = torch.from_numpy(codes).t().clone(memory_format=torch.contiguous_format).numpy()
    return turned


def turned_grid(scales: Floats, zeros: Codes | None, grid: Grid) -> tuple[Floats, Floats]:
    """Scales and zero points for the inner loops: float32 [groups, out]."""
    turned = scales.T.copy()  # always a copy, even of one row: sweeps write to it
    if zeros is None:
        return turned, np.full(turned.shape, grid.zero_point, np.float32)
    return turned, np.ascontiguousarray(zeros.T.astype(np.float32))


def sweep(
    weights: Tensor, quantized: Quantized, hessian: Tensor, damping: float, loops: Loops | None = None
) -> Quantized:
    """Refine once: group by group, the best scale for the codes, then the best code for each weight.

    Each step lowers tr(E H E^T) of the damped Hessian with all else fixed, up to the fp16 rounding of the scale. Dead
    inputs are rounded to nearest on the new scale.
    """
    loops = loops or best_loops()
    grid, size = quantized.grid, quantized.grid.group_size
    scales, zeros = turned_grid(quantized.scales, quantized.zeros, grid)
    codes = _transposed(quantized.codes)
    errors = _turned_errors(weights, codes, scales, zeros, size)
    diagonal = filled_diagonal(hessian)
    extra = torch.from_numpy(diagonal) - hessian.diagonal() + damping * float(diagonal.mean())
    for group in range(len(scales)):
        places = slice(group * size, (group + 1) * size)
        block = hessian[places, places] + torch.diag(extra[places])
        slopes = torch.addmm(extra[places, None] * errors[places], hessian[places], errors)
        steps = _steps(codes[places], zeros[group])
        _refit_scales(slopes, errors[places], steps, scales[group], block)
        loops.descend(
            slopes.numpy(), errors[places].numpy(), codes[places], scales[group], zeros[group], block.numpy(),
            grid.max_code,
        )  # fmt: skip
    return replace(quantized, codes=_transposed(codes), scales=np.ascontiguousarray(scales.T))


def _turned_errors(weights: Tensor, codes: Codes, scales: Floats, zeros: Floats, size: int) -> Tensor:
    """value - weight, [in, out]."""
    errors = weights.t().clone(memory_format=torch.contiguous_format)
    for group, (scale, zero) in enumerate(zip(scales, zeros, strict=True)):
        places = slice(group * size, (group + 1) * size)
        values = _steps(codes[places], zero).mul_(torch.from_numpy(scale))
        torch.sub(values, errors[places], out=errors[places])
    return errors


def _steps(codes: Codes, zeros: Floats) -> Tensor:
    """code - zero point of one group, float32 [group_size, out]."""
    return torch.from_numpy(codes).float().sub_(torch.from_numpy(zeros))


def _refit_scales(slopes: Tensor, errors: Tensor, steps: Tensor, scales: Floats, hessian: Tensor) -> None:
    """Refit the scale of each output of one group to its codes; modifies slopes, errors and scales.

    slopes, errors, steps (code - zero point) [group_size, out]; scales [out]; hessian [group_size, group_size].
    """
    bent = hessian @ steps
    curvature = (steps * bent).sum(0).numpy()
    wanted = scales - (steps * slopes).sum(0).numpy() / np.where(curvature > 0, curvature, 1)
    rounded = to_half(wanted.astype(np.float32))
    ratio = rounded / scales  # negative where the sign would change
    is_believed = (curvature > 0) & (ratio < MAX_SCALE_CHANGE) & (ratio > 1 / MAX_SCALE_CHANGE)
    change = torch.from_numpy(np.where(is_believed, rounded - scales, np.float32(0)))
    errors += change * steps
    slopes += bent.mul_(change)
    scales[:] = np.where(is_believed, rounded, scales)


def quantize_clipped(
    weights: Floats, omega: Floats, grid: Grid, signed: bool = True, loops: Loops | None = None
) -> Quantized:
    """Round to nearest after a scale search with input weights omega [in]; signed: see `search_scales`."""
    scales, zeros = search_scales(weights, omega, grid, signed, loops)
    return round_to_grid(weights, scales, zeros, grid)


def asymmetric_target(weights: Tensor, factor: Factor, cross: Tensor) -> Tensor:
    """The weights to quantize if earlier layers disturb the inputs: W + W cross H^-1, float32 [out, in].

    cross [in, in] = (X_float - X)^T X / tokens, with X_float the float model's inputs and X the disturbed ones. On X,
    the result has the least squared distance to W on X_float. Source: GPTAQ (arXiv 2504.02692), here in closed form
    before rounding.
    """
    order = torch.from_numpy(factor.order)
    pushed = (weights @ cross)[:, order]
    solved = torch.linalg.solve_triangular(factor.unit.t(), pushed, upper=True, left=False, unitriangular=True)
    solved /= torch.from_numpy(factor.conditional)[order]
    solved = torch.linalg.solve_triangular(factor.unit, solved, upper=False, left=False, unitriangular=True)
    target = weights.clone()
    target[:, order] += solved
    return target


def output_loss(errors: Tensor, hessian: Tensor) -> float:
    """tr(E H E^T): the mean squared change of the outputs, summed over them. errors [out, in]."""
    return float(((errors @ hessian) * errors).sum())


def best_loops() -> Loops:
    """The compiled loops if numba is installed, else the numpy loops."""
    try:
        from vlmdeploy.quant.numba_loops import COMPILED_LOOPS
    except ModuleNotFoundError as error:
        if error.name != "numba":
            raise
        return NUMPY_LOOPS
    return COMPILED_LOOPS

"""Reference tests: GPTQ, its scale search, refinement and asymmetric target against tests/reference/gptq.py in float64.
Agreement: compiled and numpy loops. Contract: damping, dead inputs, Hessians that cannot be used, a missing numba."""

import sys
from typing import Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.comparison import GPTQ_EQUAL_CODES, GPTQ_LOSS, HESSIAN_FP32, assert_close
from tests.reference import gptq as reference
from tests.tiny_bundle import run_process
from vlmdeploy.errors import QuantizationError
from vlmdeploy.quant.gptq import (
    ClipWeights,
    Factor,
    GptqOptions,
    asymmetric_target,
    best_loops,
    clip_weights,
    factorize,
    output_loss,
    quantize_clipped,
    quantize_gptq,
    search_scales,
    sweep,
)
from vlmdeploy.quant.grid import Grid, Quantized, dequantize, quantize_rtn, round_to_grid
from vlmdeploy.quant.numba_loops import COMPILED_LOOPS
from vlmdeploy.quant.numpy_loops import NUMPY_LOOPS

Doubles = NDArray[np.float64]
Clip = Literal["none", "conditional"]
DAMPING = 0.01
SEED_OF_WIDTH = {256: 1, 512: 2}  # no target so near a tie that 3e-7 of the Hessian, ten float32 roundings, decides
CONDITIONAL_FP32 = 1e-4  # relative; what is left of an input after float32 differences, condition numbers up to 1e3
TIE_STEPS = 1e-4  # in steps of the grid: how far float32 may move a target, summing the errors of 256 inputs
HALF_ROUNDING = 2.0**-11  # the largest relative error of rounding a scale to fp16

both_bits = pytest.mark.parametrize("bits", [3, 4])
both_orders = pytest.mark.parametrize("act_order", [False, True], ids=["natural", "act_order"])
both_clips = pytest.mark.parametrize("clip", ["none", "conditional"])
both_grids = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])


def problem(width: int = 128, seed: int = 0, rows: int = 8) -> tuple[Tensor, Tensor]:
    """Weights [rows, width] and the Hessian of 4 * width tokens."""
    weights, _, hessian = reference.random_problem(rows, width, 4 * width, seed)
    return torch.from_numpy(weights), torch.from_numpy(hessian)


def on_half_scales(weights: Tensor, grid: Grid) -> Tensor:
    """The weights with the largest of each group moved to where the scale that spans the group is an fp16 value.

    The search multiplies this scale by fractions; the reference rounds it to fp16 only after that.
    """
    values, size = weights.numpy(), grid.group_size
    limits = np.repeat(reference.maximal_scales(values, grid.bits, size), size, 1) * np.float32(grid.max_code / 2)
    groups = np.abs(values).reshape(len(values), -1, size)
    is_largest = (groups == groups.max(-1, keepdims=True)).reshape(values.shape)
    return torch.from_numpy(np.where(is_largest, np.copysign(limits, values), np.clip(values, -limits, limits)))


def double(tensor: Tensor) -> Doubles:
    values: Doubles = tensor.double().numpy()
    return values


def reference_results(
    weights: Tensor, hessian: Tensor, grid: Grid, act_order: bool, clip: Clip, sweeps: int
) -> list[tuple[NDArray[np.uint8], Doubles]]:
    """Codes and values after 0, 1, .. sweeps, in float64."""
    w, h, bits, group = double(weights), double(hessian), grid.bits, grid.group_size
    codes, scales = reference.gptq(w, h, bits, group, DAMPING, act_order, clip)
    results = [(codes, scales)]
    for _ in range(sweeps):
        results.append(reference.sweep(w, *results[-1], reference.damped(h, DAMPING), group, bits))
    return [(codes, reference.dequantize(codes, scales, group, bits)) for codes, scales in results]


@both_clips
@both_orders
@both_bits
@pytest.mark.parametrize("width", SEED_OF_WIDTH)
def test_codes_and_loss_are_those_of_the_reference(width: int, bits: int, act_order: bool, clip: Clip) -> None:
    grid = Grid(bits, 128)
    weights, hessian = problem(width, SEED_OF_WIDTH[width])
    weights = on_half_scales(weights, grid)
    factor = factorize(hessian, DAMPING, act_order)
    expected = reference_results(weights, hessian, grid, act_order, clip, sweeps=2)
    for sweeps, (codes, values) in enumerate(expected):
        ours = quantize_gptq(weights, factor, grid, GptqOptions(clip, sweeps), hessian)
        equal = (ours.codes == codes).mean()
        assert equal >= GPTQ_EQUAL_CODES, f"{sweeps} sweeps: {equal:.3%} of the codes are equal"
        losses = [reference.loss(double(weights), q, double(hessian)) for q in (dequantize(ours), values)]
        assert_close(f"loss after {sweeps} sweeps", losses[0] / losses[1], 1.0, GPTQ_LOSS)


@both_clips
@both_orders
@both_bits
@pytest.mark.parametrize(("width", "group"), [(64, 16), (64, 64), (128, 32), (128, 64), (128, 128)])
def test_all_codes_of_narrow_matrices_equal_the_reference(
    width: int, group: int, bits: int, act_order: bool, clip: Clip
) -> None:
    weights, hessian = problem(width, seed=bits)
    grid = Grid(bits, group)
    weights = on_half_scales(weights, grid)
    factor = factorize(hessian, DAMPING, act_order)
    for sweeps, (codes, _) in enumerate(reference_results(weights, hessian, grid, act_order, clip, sweeps=2)):
        ours = quantize_gptq(weights, factor, grid, GptqOptions(clip, sweeps), hessian)
        assert (ours.codes == codes).all(), f"{sweeps} sweeps: {(ours.codes != codes).sum()} codes differ"


@both_clips
@both_orders
@both_grids
def test_each_code_is_nearest_to_its_target_given_the_codes_before(
    symmetric: bool, act_order: bool, clip: Clip
) -> None:
    weights, hessian = problem(256)
    grid = Grid(4, 32, symmetric)
    factor = factorize(hessian, DAMPING, act_order)
    ours = quantize_gptq(weights, factor, grid, GptqOptions(clip, sweeps=0), hessian)
    order = reference.processing_order(double(hessian)) if act_order else np.arange(256)
    damped = reference.damped(double(hessian), DAMPING)[np.ix_(order, order)]
    lower = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]  # upper triangular: H = R R^T
    errors = (double(weights) - dequantize(ours))[:, order]
    targets = double(weights)[:, order] + errors @ (lower / lower.diagonal() - np.eye(256))
    zeros = np.full(ours.scales.shape, 8) if ours.zeros is None else ours.zeros
    scales, middles = (np.repeat(each, 32, 1)[:, order] for each in (ours.scales, zeros))
    off = np.abs(np.clip(targets / scales + middles, 0, 15) - ours.codes[:, order])
    assert_close("distance from target to code in steps", np.maximum(off, 0.5), np.full_like(off, 0.5), TIE_STEPS)


@both_orders
@pytest.mark.parametrize("dead", [[], [3, 17, 90]], ids=["all_alive", "dead_inputs"])
def test_factor_is_that_of_the_damped_hessian(dead: list[int], act_order: bool) -> None:
    _, hessian = problem()
    hessian = without_inputs(hessian, dead)
    factor = factorize(hessian, 0.05, act_order)
    damped = reference.damped(double(hessian), 0.05)
    roots = np.sqrt(damped.diagonal())
    assert_close("H / sqrt(H_ii H_jj)", product(factor) / np.outer(roots, roots), damped / np.outer(roots, roots),
                 HESSIAN_FP32)  # fmt: skip
    wanted = reference.processing_order(damped) if act_order else np.arange(128)
    assert (factor.order[::-1] == wanted).all()
    conditional = reference.conditional_weights(damped, wanted)
    assert_close("D relative to the reference", factor.conditional / conditional, np.ones(128), CONDITIONAL_FP32)


def without_inputs(hessian: Tensor, dead: list[int]) -> Tensor:
    """The Hessian of activations that are always zero at `dead`."""
    hessian = hessian.clone()
    hessian[dead] = 0
    hessian[:, dead] = 0
    return hessian


def product(factor: Factor) -> Doubles:
    """unit * diag(D) * unit^T with the inputs in their own order."""
    unit, back = double(factor.unit), np.argsort(factor.order)
    permuted: Doubles = (unit * factor.conditional[factor.order].astype(np.float64)) @ unit.T
    return permuted[np.ix_(back, back)]


@both_clips
@pytest.mark.parametrize("sweeps", [0, 2])
def test_weights_of_dead_inputs_are_rounded_to_nearest(sweeps: int, clip: Clip) -> None:
    weights, hessian = problem()
    dead = [0, 5, 64, 127]
    hessian = without_inputs(hessian, dead)
    factor = factorize(hessian, DAMPING)
    ours = quantize_gptq(weights, factor, Grid(4, 32), GptqOptions(clip, sweeps), hessian)
    nearest = round_to_grid(weights.numpy(), ours.scales, None, ours.grid)
    assert (ours.codes[:, dead] == nearest.codes[:, dead]).all()
    assert (ours.codes != nearest.codes).mean() > 0.1


@pytest.mark.parametrize("sweeps", [0, 1])
def test_one_live_input_leaves_all_others_rounded_to_nearest(sweeps: int) -> None:
    weights, hessian = problem(64)
    hessian = without_inputs(hessian, list(range(63)))
    factor = factorize(hessian, DAMPING)
    ours = quantize_gptq(weights, factor, Grid(4, 16), GptqOptions("none", sweeps), hessian)
    assert (ours.codes == round_to_grid(weights.numpy(), ours.scales, None, ours.grid).codes).all()
    assert sweeps or (ours.scales == quantize_rtn(weights.numpy(), ours.grid).scales).all()


@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e3])
@both_clips
def test_identical_activations_of_all_tokens_are_reproduced_almost_exactly(clip: Clip, magnitude: float) -> None:
    weights, _ = problem(64)
    row = magnitude * torch.from_numpy(np.random.default_rng(0).standard_normal(64, np.float32))
    hessian = torch.outer(row, row)
    factor = factorize(hessian, DAMPING)
    ours = quantize_gptq(weights, factor, Grid(4, 16), GptqOptions(clip, 1), hessian)
    losses = [output_loss(torch.from_numpy(dequantize(q)) - weights, hessian) for q in (ours, rounded(weights, ours))]
    assert factor.damping == DAMPING
    assert losses[0] < 0.01 * losses[1], losses


def rounded(weights: Tensor, like: Quantized) -> Quantized:
    return quantize_rtn(weights.numpy(), like.grid)


def test_empty_hessian_is_an_error() -> None:
    with pytest.raises(QuantizationError, match="the Hessian is empty: no token reached this input"):
        factorize(torch.zeros(64, 64), DAMPING)


@pytest.mark.parametrize("place", [(5, 5), (5, 9)], ids=["diagonal", "beside"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_hessian_with_inf_or_nan_is_an_error(value: float, place: tuple[int, int]) -> None:
    _, hessian = problem(64)
    hessian[place] = hessian[place[::-1]] = value
    with pytest.raises(QuantizationError, match=r"Inf or NaN|are its activations finite\?"):
        factorize(hessian, DAMPING)


def indefinite(least: float) -> Tensor:
    """A Hessian whose smallest eigenvalue is `least` times the mean of its diagonal."""
    _, hessian = problem(64)
    values, vectors = np.linalg.eigh(double(hessian))
    values *= 64 / values.sum()
    values[0] = least
    matrix = torch.from_numpy(((vectors * values) @ vectors.T).astype(np.float32))
    return matrix / matrix.diagonal().mean()


@pytest.mark.parametrize(
    ("least", "damping", "raised"), [(-0.02, 0.01, 0.03), (-0.2, 0.01, 0.27), (-0.9, 0.01, 1.0), (-5e-4, 0.0, 1e-3)]
)
def test_damping_is_raised_until_an_indefinite_hessian_can_be_factorized(
    least: float, damping: float, raised: float
) -> None:
    hessian = indefinite(least)
    factor = factorize(hessian, damping)
    assert factor.damping == pytest.approx(raised)
    damped = double(hessian) + raised * double(hessian).diagonal().mean() * np.eye(64)
    assert_close("damped H", product(factor), damped, HESSIAN_FP32 * float(damped.max()))


def test_hessian_that_damping_one_does_not_make_definite_is_an_error() -> None:
    with pytest.raises(QuantizationError, match="cannot be factorized even with damping 1"):
        factorize(indefinite(-1.5), DAMPING)


def test_damping_is_not_raised_where_float64_is_enough() -> None:
    x = np.float32(1 + 3395 * 2**-13)  # x * x is rounded up: the difference to the exact square is lost in float32
    hessian = torch.tensor([[x * x, x], [x, 1.0]])
    assert factorize(hessian, 0.0, act_order=False).damping == 0


@both_grids
@pytest.mark.parametrize("sweeps", [0, 2])
def test_scales_are_fp16_values(sweeps: int, symmetric: bool) -> None:
    weights, hessian = problem()
    options, grid = GptqOptions("conditional", sweeps), Grid(4, 32, symmetric)
    ours = quantize_gptq(weights, factorize(hessian, DAMPING), grid, options, hessian)
    assert ours.scales.dtype == np.float32
    assert (ours.scales < 0).any() == symmetric and (ours.scales != 0).all()
    assert (ours.scales.astype(np.float16) == ours.scales).all()


@both_grids
@both_clips
def test_group_of_zeros_stays_zero(clip: Clip, symmetric: bool) -> None:
    weights, hessian = problem()
    weights[3, 32:64] = 0
    ours = quantize_gptq(weights, factorize(hessian, DAMPING), Grid(4, 32, symmetric), GptqOptions(clip, 1), hessian)
    assert (dequantize(ours)[3, 32:64] == 0).all()
    assert np.isfinite(dequantize(ours)).all()


@both_clips
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_asymmetric_codes_fit_the_grid_and_lose_less_than_rounding(bits: int, clip: Clip) -> None:
    weights, hessian = problem()
    weights[:, :32] = weights[:, :32].abs()
    weights[:, 32:64] = -weights[:, 32:64].abs()
    grid = Grid(bits, 32, symmetric=False)
    ours = quantize_gptq(weights, factorize(hessian, DAMPING), grid, GptqOptions(clip, 1), hessian)
    assert ours.zeros is not None and ours.zeros.min() >= 1 and ours.zeros.max() <= grid.max_code
    assert ours.codes.max() <= grid.max_code
    losses = [output_loss(torch.from_numpy(dequantize(q)) - weights, hessian) for q in (ours, rounded(weights, ours))]
    assert losses[0] < 0.5 * losses[1], losses


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_asymmetric_grid_spans_each_group(bits: int) -> None:
    weights, _ = problem()
    weights[:, :32] = weights[:, :32].abs()
    weights[:, 32:64] = -weights[:, 32:64].abs()
    ours = quantize_rtn(weights.numpy(), Grid(bits, 32, symmetric=False))
    steps = np.abs(dequantize(ours) - weights.numpy()) / np.repeat(ours.scales, 32, 1)
    assert steps.max() <= 0.5 + ours.grid.max_code * HALF_ROUNDING
    assert (ours.codes.reshape(8, 4, 32).max(-1) == ours.grid.max_code).mean() > 0.4  # the whole range is used


@pytest.mark.parametrize("clip", ["ones", "diagonal"])
@pytest.mark.parametrize("group", [32, 128])
def test_searched_scales_equal_the_reference(group: int, clip: ClipWeights) -> None:
    weights, hessian = problem()
    weights[2, :32] = 0
    grid = Grid(4, group)
    weights = on_half_scales(weights, grid)
    omega = np.ones(128) if clip == "ones" else double(hessian).diagonal()
    scales, _ = search_scales(weights.numpy(), clip_weights(clip, factorize(hessian, DAMPING), hessian), grid)
    expected = reference.search_scales(double(weights), omega, 4, group)
    assert (scales == expected).all()


def test_negative_scale_gives_the_further_step_to_positive_weights() -> None:
    """Codes reach from -8 to 7."""
    weights = np.array([[-7.0, 8.0, 1.0, 0.0], [7.0, -8.0, 1.0, 0.0]], np.float32)
    quantized = quantize_clipped(weights, np.ones(4, np.float32), Grid(4, 4))
    assert np.sign(quantized.scales).tolist() == [[-1], [1]]
    distance = np.abs(dequantize(quantized) - weights).max(1)
    positive = quantize_clipped(weights, np.ones(4, np.float32), Grid(4, 4), signed=False)
    assert (positive.scales > 0).all()
    assert distance[0] == pytest.approx(distance[1], abs=1e-6)
    assert distance[0] < np.abs(dequantize(positive) - weights)[0].max()


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_both_signs_are_never_worse_than_one(bits: int) -> None:
    weights, hessian = problem()
    omega = clip_weights("conditional", factorize(hessian, DAMPING), hessian)
    assert omega is not None
    errors = [
        (omega * (dequantize(quantize_clipped(weights.numpy(), omega, Grid(bits, 32), signed)) - weights.numpy()) ** 2)
        .reshape(len(weights), -1, 32)
        .sum(-1)
        for signed in (False, True)
    ]
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    assert (errors[1] < errors[0] * 0.999).any() == (bits <= 4)


@pytest.mark.parametrize("threads", [1, 2])
@both_grids
@both_clips
def test_compiled_and_numpy_loops_give_the_same_codes(clip: Clip, symmetric: bool, threads: int) -> None:
    weights, hessian = problem(rows=150)  # not a multiple of the 64 that a compiled loop takes at once
    factor, grid = factorize(hessian, DAMPING), Grid(4, 32, symmetric)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        first, second = (
            quantize_gptq(weights, factor, grid, GptqOptions(clip, 1), hessian, loops)
            for loops in (NUMPY_LOOPS, COMPILED_LOOPS)
        )
    finally:
        torch.set_num_threads(before)
    assert (first.codes == second.codes).all()
    assert (first.scales == second.scales).all()
    if not symmetric:
        assert first.zeros is not None and second.zeros is not None
        assert (first.zeros == second.zeros).all()


def test_loops_are_compiled_where_numba_is_installed_and_numpy_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert best_loops().is_compiled
    monkeypatch.setitem(sys.modules, "numba", None)  # importing it raises ModuleNotFoundError
    monkeypatch.delitem(sys.modules, "vlmdeploy.quant.numba_loops")
    assert best_loops() is NUMPY_LOOPS


def test_quantize_can_be_imported_and_works_without_numba() -> None:
    code = """
import sys
sys.modules["numba"] = None
import torch
import vlmdeploy.calib.request
from vlmdeploy.calib.solver import GptqSolver, Problem
from vlmdeploy.quant.grid import Grid
quantized, report = GptqSolver().solve(Problem("q", torch.ones(4, 32), Grid(4, 16), torch.eye(32), tokens=64))
print(GptqSolver().loops.is_compiled, report.method, quantized.codes.shape)
"""
    done = run_process("-c", code, OMP_NUM_THREADS="1")
    assert (done.stdout, done.stderr) == ("False gptq (4, 32)\n", "")


@both_grids
@pytest.mark.parametrize("rows", [1, 8])
def test_weights_hessian_factor_and_codes_are_left_unchanged(rows: int, symmetric: bool) -> None:
    weights, hessian = problem(rows=rows)
    factor = factorize(hessian, DAMPING)
    kept = weights.clone(), hessian.clone(), factor.unit.clone()
    ours = quantize_gptq(weights, factor, Grid(4, 32, symmetric), GptqOptions("none", 0), hessian)
    codes = ours.codes.copy()
    sweep(weights, ours, hessian, DAMPING)
    asymmetric_target(weights, factor, hessian)
    assert (ours.codes == codes).all()
    assert torch.equal(weights, kept[0]) and torch.equal(hessian, kept[1]) and torch.equal(factor.unit, kept[2])


@both_grids
def test_sweep_leaves_the_codes_and_scales_that_it_is_given_unchanged(symmetric: bool) -> None:
    weights, hessian = problem()
    ours = quantize_gptq(weights, factorize(hessian, DAMPING), Grid(4, 32, symmetric), GptqOptions("none", 0), hessian)
    codes, scales = ours.codes.copy(), ours.scales.copy()
    swept = sweep(weights, ours, hessian, DAMPING)
    assert (ours.codes == codes).all() and (ours.scales == scales).all()
    assert (swept.codes != codes).any() and (swept.scales != scales).any()


@both_grids
@both_bits
def test_sweep_raises_the_damped_loss_of_a_row_by_no_more_than_fp16_scales_explain(bits: int, symmetric: bool) -> None:
    weights, hessian = problem()
    grid = Grid(bits, 32, symmetric)
    ours = quantize_gptq(weights, factorize(hessian, DAMPING), grid, GptqOptions("none", sweeps=0), hessian)
    damped = reference.damped(double(hessian), DAMPING)
    first = row_losses(weights, ours, damped)
    for _ in range(4):  # the later sweeps change little: there only the rounding of scales is left
        before, allowed = row_losses(weights, ours, damped), loss_of_rounding_scales(ours, damped)
        ours = sweep(weights, ours, hessian, DAMPING)
        after = row_losses(weights, ours, damped)
        assert (after <= before * (1 + HESSIAN_FP32) + allowed).all(), (before, after)
    assert after.sum() < 0.99 * first.sum()


def row_losses(weights: Tensor, quantized: Quantized, hessian: Doubles) -> Doubles:
    errors = dequantize(quantized) - double(weights)
    losses: Doubles = ((errors @ hessian) * errors).sum(1)
    return losses


def loss_of_rounding_scales(quantized: Quantized, hessian: Doubles) -> Doubles:
    """What half a unit of fp16 in every scale adds to the loss of each row at most, about the best scales."""
    size = quantized.grid.group_size
    values = dequantize(quantized).astype(np.float64).reshape(len(quantized.codes), -1, size)
    blocks = np.stack([hessian[at : at + size, at : at + size] for at in range(0, len(hessian), size)])
    added: Doubles = HALF_ROUNDING**2 * np.einsum("rgi,gij,rgj->r", values, blocks, values)
    return added


@both_orders
def test_asymmetric_target_equals_the_reference(act_order: bool) -> None:
    weights, x, _ = reference.random_problem(8, 128, 512, 0)
    disturbed = x + np.random.default_rng(0).standard_normal(x.shape, np.float32) * x.std()
    hessian, cross = disturbed.T @ disturbed / 512, (x - disturbed).T @ disturbed / 512
    factor = factorize(torch.from_numpy(hessian), DAMPING, act_order)
    ours = asymmetric_target(torch.from_numpy(weights), factor, torch.from_numpy(cross))
    damped = reference.damped(hessian.astype(np.float64), DAMPING)
    expected = reference.asymmetric_target(weights.astype(np.float64), damped, cross.astype(np.float64))
    largest = float(np.abs(expected - weights).max())
    assert largest > 0.01
    assert_close(
        "what the target adds", (ours.numpy() - weights) / largest, (expected - weights) / largest, HESSIAN_FP32
    )


def test_codes_do_not_depend_on_the_other_rows() -> None:
    weights, hessian = problem(rows=80)
    factor = factorize(hessian, DAMPING)
    options, grid = GptqOptions("conditional", 1), Grid(4, 32)
    every = quantize_gptq(weights, factor, grid, options, hessian)
    few = quantize_gptq(weights[::7], factor, grid, options, hessian)
    assert (few.codes == every.codes[::7]).mean() >= GPTQ_EQUAL_CODES

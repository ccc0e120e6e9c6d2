"""Reference tests of a reference: tests/reference/gptq.py against the identities that GPTQ rests on, and against
tests/reference/int4.py where the two must agree. Nothing of vlmdeploy is used."""

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.comparison import assert_close
from tests.reference import gptq as reference
from tests.reference import int4

Floats = NDArray[np.float64]

FLOAT64 = 1e-8  # float64 sums and solves of Hessians whose condition number is up to 1e5, relative
HALF_ROUNDING = 2.0**-11  # the largest relative error of rounding a scale to float16
SEEDS = range(3)
GROUP, DAMPING = 16, 0.01


def problem(seed: int) -> tuple[Floats, Floats]:
    """Weights [8, 64] and a Hessian of 256 tokens in float64, without damping."""
    weights, _, hessian = reference.random_problem(8, 64, 256, seed)
    return weights.astype(np.float64), hessian.astype(np.float64)


def unit_upper_factor(hessian: Floats) -> tuple[Floats, Floats]:
    """F unit upper triangular and D with H = F diag(D) F^T: the Cholesky factor of H read backwards, no inverse."""
    factor = np.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1].astype(np.float64)
    return factor / factor.diagonal(), factor.diagonal() ** 2


@pytest.mark.parametrize("seed", SEEDS)
def test_loss_is_a_sum_over_columns_weighted_by_the_conditional_variances(seed: int) -> None:
    weights, hessian = problem(seed)
    hessian, order = reference.damped(hessian, DAMPING), reference.processing_order(hessian)
    error = np.random.default_rng(seed).standard_normal(weights.shape)
    factor, _ = unit_upper_factor(hessian[np.ix_(order, order)])
    columns = ((error[:, order] @ factor) ** 2).sum(0)
    expected = reference.loss(error, np.zeros_like(error), hessian)
    total = reference.conditional_weights(hessian, order)[order] @ columns
    assert_close("loss relative to the closed form", total / expected, 1.0, FLOAT64)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_codes_are_those_of_the_form_without_an_inverse(seed: int, act_order: bool) -> None:
    weights, hessian = problem(seed)
    codes, scales = reference.gptq(weights, hessian, 4, GROUP, DAMPING, act_order)
    order = reference.processing_order(hessian) if act_order else np.arange(64)
    factor, _ = unit_upper_factor(reference.damped(hessian, DAMPING)[np.ix_(order, order)])
    errors = (weights - reference.dequantize(codes, scales, GROUP, 4))[:, order]
    targets = weights[:, order] + errors @ (factor - np.eye(64))
    expected = np.clip(np.rint(targets / np.repeat(scales, GROUP, 1)[:, order]) + 8, 0, 15)
    assert (codes[:, order] == expected).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("seed", SEEDS)
def test_uncorrelated_inputs_are_rounded_to_nearest(seed: int, dtype: reference.Real) -> None:
    weights, _, hessian = reference.random_problem(8, 64, 256, seed)
    weights[0, :GROUP] = 0
    diagonal = np.diag(hessian.diagonal())
    diagonal[3, 3] = 0  # a dead input is not treated otherwise
    codes, scales = reference.gptq(weights, diagonal, 4, GROUP, DAMPING, dtype=dtype)
    expected_codes, expected_scales = int4.quantize_rtn(weights, GROUP)
    assert (codes == expected_codes).all()
    assert (scales == expected_scales).all()


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("seed", SEEDS)
def test_each_refinement_lowers_the_loss(seed: int, bits: int) -> None:
    weights, hessian = problem(seed)
    rtn = reference.gptq(weights, np.eye(64), bits, GROUP, DAMPING)
    plain = reference.gptq(weights, hessian, bits, GROUP, DAMPING, act_order=False)
    ordered = reference.gptq(weights, hessian, bits, GROUP, DAMPING)
    clipped = reference.gptq(weights, hessian, bits, GROUP, DAMPING, clip="conditional")
    swept = reference.sweep(weights, *clipped, reference.damped(hessian, DAMPING), GROUP, bits)
    results = [rtn, plain, ordered, clipped, swept]
    losses = [reference.loss(weights, reference.dequantize(*pair, GROUP, bits), hessian) for pair in results]
    assert losses == sorted(losses, reverse=True), losses
    assert losses[1] < 0.5 * losses[0], losses


def test_searched_scales_never_have_a_larger_weighted_error_than_the_maximal_ones() -> None:
    weights, hessian = problem(0)
    weights[2, GROUP : 2 * GROUP] = 0
    omega = hessian.diagonal()
    errors = []
    for scales in (reference.search_scales(weights, omega, 4, GROUP), reference.maximal_scales(weights, 4, GROUP)):
        assert scales[2, 1] == 1
        assert (scales == scales.astype(np.float16)).all()
        wide = np.repeat(scales, GROUP, 1)
        squares = omega * (weights - wide * np.clip(np.rint(weights / wide), -8, 7)) ** 2
        errors.append(squares.reshape(8, -1, GROUP).sum(-1))
    assert (errors[0] <= errors[1]).all()
    assert errors[0].sum() < 0.8 * errors[1].sum()


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("seed", SEEDS)
def test_sweep_raises_the_loss_of_a_row_by_no_more_than_float16_scales_explain(seed: int, bits: int) -> None:
    weights, hessian = problem(seed)
    hessian = reference.damped(hessian, DAMPING)
    codes, scales = reference.gptq(weights, hessian, bits, GROUP, 0.0)
    for _ in range(4):  # the later sweeps change little: there only the rounding of scales is left
        before = reference.dequantize(codes, scales, GROUP, bits)
        steps = (codes - 2.0 ** (bits - 1)).reshape(8, -1, GROUP)
        codes, scales = reference.sweep(weights, codes, scales, hessian, GROUP, bits)
        after = reference.dequantize(codes, scales, GROUP, bits)
        blocks = np.stack([hessian[at : at + GROUP, at : at + GROUP] for at in range(0, 64, GROUP)])
        curvatures = np.einsum("rgi,gij,rgj->rg", steps, blocks, steps)  # [rows, groups]
        rounding = ((scales * HALF_ROUNDING) ** 2 * curvatures).sum(1)
        for row in range(8):
            old, new = (reference.loss(weights[row : row + 1], q[row : row + 1], hessian) for q in (before, after))
            assert new <= old + rounding[row], (row, old, new)


def test_sweep_finds_codes_and_scales_of_weights_that_lie_on_the_grid() -> None:
    random = np.random.default_rng(0)
    codes = random.integers(0, 16, (8, 64)).astype(np.uint8)
    scales = random.uniform(0.01, 0.02, (8, 4)).astype(np.float16).astype(np.float64)
    weights, hessian = reference.dequantize(codes, scales, GROUP, 4), np.diag(random.uniform(1, 9, 64))
    off = (scales * 1.03).astype(np.float16)
    found_codes, found_scales = reference.sweep(weights, codes, off, hessian, GROUP, 4)
    assert (found_codes == codes).all()
    assert (found_scales == scales).all()


def test_sweep_refuses_a_scale_beyond_a_factor_of_two() -> None:
    weights, hessian = problem(0)
    scales = reference.maximal_scales(weights, 4, GROUP)
    codes = np.clip(np.rint(weights / np.repeat(scales, GROUP, 1)) + 8, 0, 15).astype(np.uint8)
    tiny = scales.copy()
    tiny[:, 1] = (scales[:, 1] / 4).astype(np.float16)
    _, swept = reference.sweep(weights, codes, tiny, np.diag(hessian.diagonal()), GROUP, 4)
    assert (swept[:, 1] == tiny[:, 1]).all()
    assert (swept[:, [0, 2, 3]] != tiny[:, [0, 2, 3]]).any()


@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_asymmetric_target_minimises_the_error_against_the_float_inputs(damping: float) -> None:
    weights, inputs, _ = reference.random_problem(4, 32, 256, seed=0)
    float_inputs, random = inputs.T.astype(np.float64), np.random.default_rng(0)
    other_inputs = float_inputs + 0.1 * random.standard_normal(float_inputs.shape)
    hessian = other_inputs @ other_inputs.T / 256
    cross = (float_inputs - other_inputs) @ other_inputs.T / 256
    target = reference.asymmetric_target(weights, reference.damped(hessian, damping), cross)
    # Damping is a penalty on leaving W: rows of sqrt(penalty) * I appended to an ordinary least-squares problem.
    penalty = np.sqrt(256 * damping * hessian.diagonal().mean()) * np.eye(32)
    known = np.concatenate((other_inputs, penalty), axis=1)
    wanted = np.concatenate((weights @ float_inputs, weights @ penalty), axis=1)
    expected = np.linalg.lstsq(known.T, wanted.T)[0].T
    assert_close("target", target, expected, FLOAT64)
    plain, moved = (np.linalg.norm(weights @ float_inputs - q @ other_inputs) for q in (weights, target))
    assert moved < 0.9 * plain


def test_dead_inputs_get_the_mean_and_ties_keep_their_order() -> None:
    hessian = np.diag([2.0, 0.0, 4.0, 2.0])
    assert reference.damped(hessian, 0.5).diagonal().tolist() == [3.25, 3.25, 5.25, 3.25]
    assert reference.processing_order(hessian).tolist() == [2, 0, 3, 1]


def test_float32_codes_differ_from_float64_ones_only_here_and_there() -> None:
    weights, _, hessian = reference.random_problem(16, 128, 512, seed=1)
    single = reference.gptq(weights, hessian, 4, 32, DAMPING, clip="conditional", dtype=np.float32)
    double = reference.gptq(weights, hessian, 4, 32, DAMPING, clip="conditional")
    assert single[1].dtype == np.float32
    assert (single[0] != double[0]).mean() < 0.01

"""Reference tests: sums over tokens, spectra and losses against direct float64 computations. Agreement: the solver's
recipe and the best of all recipes tried one by one; activations in memory and in files."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.comparison import HESSIAN_FP32, assert_close
from vlmdeploy.calib.activations import Activations, FileActivations, MemoryActivations, Pool
from vlmdeploy.calib.hessian import HessianSum, effective_rank, largest_eigenvalue
from vlmdeploy.calib.solver import (
    DAMPINGS,
    GptqSolver,
    HeldOut,
    Problem,
    held_out_loss,
    judged_rows,
    smallest_eigenvalue,
)
from vlmdeploy.quant.gptq import (
    GptqOptions,
    asymmetric_target,
    factorize,
    filled_diagonal,
    quantize_clipped,
    quantize_gptq,
)
from vlmdeploy.quant.grid import Grid, Quantized, dequantize, quantize_rtn

Doubles = NDArray[np.float64]
GRID = Grid(4, 32)
WIDTH = 96
CONDITION_NUMBER = 0.1  # relative; few steps of power iteration, on spectra whose ends stand apart
LOSS_FP32 = 1e-4  # float32 sums of 96 x 96 products, relative to a loss that is small against them


def inputs(tokens: int, decay: float, seed: int = 0, width: int = WIDTH) -> Tensor:
    """Activations [tokens, width] whose amplitudes fall as place^-decay, in random directions."""
    random = np.random.default_rng(seed)
    rotation = np.linalg.qr(random.standard_normal((width, width)))[0]
    values = random.standard_normal((tokens, width)) * np.arange(1, width + 1) ** -decay
    return torch.from_numpy((values @ rotation).astype(np.float32))


def random_weights(rows: int = 32, width: int = WIDTH) -> Tensor:
    return torch.from_numpy(np.random.default_rng(7).standard_normal((rows, width)).astype(np.float32) / 10)


def mean_hessian(x: Tensor) -> Tensor:
    total = HessianSum(x.shape[1])
    total.add(x)
    return total.mean()


def plain_problem(tokens: int, decay: float, held_out_tokens: int = 2000, grid: Grid = GRID, rows: int = 32) -> Problem:
    """A linear with calibration tokens and, unless 0, others of the same kind that are held out."""
    x = inputs(tokens + held_out_tokens, decay)
    held_out = HeldOut(x[tokens:], held_out_tokens) if held_out_tokens else None
    return Problem("layer.q", random_weights(rows), grid, mean_hessian(x[:tokens]), tokens, 8, held_out)


def disturbed_problem(tokens: int = 1000, rows: int = 32) -> tuple[Problem, Tensor, Tensor]:
    """A linear under asymmetric calibration, and its held-out inputs: the float model's and the disturbed ones."""
    clean = inputs(2 * tokens, 0.75)
    x = clean + 0.1 * torch.from_numpy(np.random.default_rng(3).standard_normal(clean.shape, np.float32))
    weights, cross = random_weights(rows), (clean[:tokens] - x[:tokens]).T @ x[:tokens] / tokens
    held_out = HeldOut(x[tokens:], tokens, (clean[tokens:] - x[tokens:]) @ weights[judged_rows(rows)].T)
    problem = Problem("layer.q", weights, GRID, mean_hessian(x[:tokens]), tokens, 8, held_out, cross)
    return problem, clean[tokens:], x[tokens:]


def every_recipe(
    problem: Problem, clip: bool, sweeps: tuple[int, ...], dampings: tuple[float, ...]
) -> dict[str, float]:
    """The held-out loss of each recipe on its own, by a name such as "gptq 0.01 0"."""
    weights = problem.weights.numpy()
    rtn = quantize_clipped(weights, filled_diagonal(problem.hessian), problem.grid)
    losses = {"rtn None 0": held_out_loss(problem, rtn)}
    for damping in dampings:
        factor = factorize(problem.hessian, damping)
        cross = problem.cross
        target = problem.weights if cross is None else asymmetric_target(problem.weights, factor, cross)
        for count in sweeps:
            options = GptqOptions("conditional" if clip else "none", count)
            quantized = quantize_gptq(target, factor, problem.grid, options, problem.hessian)
            losses[f"gptq {damping} {count}"] = held_out_loss(problem, quantized)
    return losses


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize(("tokens", "decay"), [(2000, 1.5), (2000, 0.1), (200, 0.75), (100, 0.1), (100, 0.75)])
def test_recipe_chosen_has_the_least_held_out_loss(tokens: int, decay: float, bits: int) -> None:
    problem = plain_problem(tokens, decay, grid=Grid(bits, 32))
    quantized, report = GptqSolver().solve(problem)
    losses = every_recipe(problem, True, (0, 5 - bits), DAMPINGS)
    chosen = f"{report.method} {report.damping} {report.sweeps}"
    assert chosen == min(losses, key=lambda name: losses[name]), losses
    assert held_out_loss(problem, quantized) == pytest.approx(losses[chosen], rel=LOSS_FP32)


def test_least_damping_is_chosen_for_a_decaying_spectrum() -> None:
    _, report = GptqSolver().solve(plain_problem(800, 1.5))
    assert (report.method, report.damping, report.note) == ("gptq", 0.01, "")


def test_much_damping_or_rounding_is_chosen_for_a_flat_spectrum_with_as_many_tokens_as_inputs() -> None:
    _, report = GptqSolver().solve(plain_problem(WIDTH, 0.1))
    assert report.method == "rtn" or (report.damping is not None and report.damping >= 0.2)


def test_rounding_to_nearest_is_chosen_where_the_hessian_misleads() -> None:
    problem = plain_problem(1000, 1.0)
    other = HeldOut(inputs(1000, 1.0, seed=5), 1000)  # loud in other directions
    quantized, report = GptqSolver(dampings=(0.01, 0.05)).solve(replace(problem, held_out=other))
    expected = quantize_clipped(problem.weights.numpy(), filled_diagonal(problem.hessian), GRID)
    assert (quantized.codes == expected.codes).all()
    assert (report.method, report.damping, report.sweeps) == ("rtn", None, 0)
    assert report.note == "rounding to nearest was better on held-out tokens"


@pytest.mark.parametrize("held_out_tokens", [0, 1000])
def test_fewer_tokens_than_inputs_get_neither_sweeps_nor_clipping_and_more_damping(held_out_tokens: int) -> None:
    problem = plain_problem(WIDTH - 1, 1.5, held_out_tokens)
    quantized, report = GptqSolver(sweeps=3).solve(problem)
    assert report.method == "gptq" and report.damping is not None and report.damping >= 0.05
    assert report.sweeps == 0
    factor = factorize(problem.hessian, report.damping)
    expected = quantize_gptq(problem.weights, factor, GRID, GptqOptions("none", sweeps=0), problem.hessian)
    assert (quantized.codes == expected.codes).all()
    assert (quantized.scales == quantize_rtn(problem.weights.numpy(), GRID).scales).all()


@pytest.mark.parametrize(("bits", "sweeps"), [(3, 2), (4, 1), (8, 0)])
def test_without_held_out_tokens_damping_and_sweeps_are_the_default(bits: int, sweeps: int) -> None:
    problem = plain_problem(400, 0.1, held_out_tokens=0, grid=Grid(bits, 32))
    quantized, report = GptqSolver().solve(problem)
    assert (report.method, report.damping, report.sweeps) == ("gptq", 0.01, sweeps)
    assert (report.held_out_tokens, report.held_out_error, report.held_out_error_rtn) == (0, None, None)
    factor, options = factorize(problem.hessian, 0.01), GptqOptions("conditional", sweeps)
    assert (
        quantized.codes == quantize_gptq(problem.weights, factor, problem.grid, options, problem.hessian).codes
    ).all()


def test_options_of_the_solver_are_followed() -> None:
    problem = plain_problem(400, 0.75, held_out_tokens=0)
    quantized, report = GptqSolver(act_order=False, clip="none", sweeps=0, dampings=(0.3,)).solve(problem)
    factor = factorize(problem.hessian, 0.3, act_order=False)
    expected = quantize_gptq(problem.weights, factor, GRID, GptqOptions("none", sweeps=0), problem.hessian)
    assert (report.damping, report.sweeps) == (0.3, 0)
    assert (quantized.codes == expected.codes).all()


def test_report_says_what_was_measured() -> None:
    problem, x = plain_problem(800, 1.0, held_out_tokens=500), inputs(1300, 1.0)
    held_out = x[800:]
    quantized, report = GptqSolver().solve(problem)
    assert (report.name, report.bits, report.group_size, report.asymmetric) == ("layer.q", 4, 32, False)
    assert (report.tokens, report.samples, report.held_out_tokens, report.dead_inputs) == (800, 8, 500, 0)
    rounded = quantize_rtn(problem.weights.numpy(), GRID)
    assert report.held_out_error == pytest.approx(relative_error(problem, quantized, held_out), rel=LOSS_FP32)
    assert report.held_out_error_rtn == pytest.approx(relative_error(problem, rounded, held_out), rel=LOSS_FP32)
    assert report.calibration_error == pytest.approx(relative_error(problem, quantized, x[:800]), rel=LOSS_FP32)
    assert report.effective_rank == pytest.approx(effective_rank(problem.hessian))


def test_held_out_tokens_are_counted_even_where_only_some_of_them_judge() -> None:
    problem = plain_problem(400, 1.0)
    _, report = GptqSolver().solve(replace(problem, held_out=HeldOut(inputs(300, 1.0), tokens=90_000)))
    assert report.held_out_tokens == 90_000


@pytest.mark.parametrize("held_out_tokens", [0, 500])
def test_damping_that_had_to_be_raised_is_reported_as_used(held_out_tokens: int) -> None:
    problem = plain_problem(800, 1.0, held_out_tokens)
    values, vectors = torch.linalg.eigh(problem.hessian)
    values[0] = -0.3 * problem.hessian.diagonal().mean()  # 0.01, 0.05 and 0.2 are too little
    hessian = (vectors * values) @ vectors.T
    quantized, report = GptqSolver(sweeps=0).solve(replace(problem, hessian=hessian))
    assert report.damping is not None and report.damping > 0.3
    factor = factorize(hessian, report.damping)
    assert factor.damping == report.damping
    expected = quantize_gptq(problem.weights, factor, GRID, GptqOptions("conditional", sweeps=0), hessian)
    assert (quantized.codes == expected.codes).all()


def relative_error(problem: Problem, quantized: Quantized, x: Tensor) -> float:
    exact = x.double() @ problem.weights.double().T
    ours = x.double() @ torch.from_numpy(dequantize(quantized)).double().T
    return float((ours - exact).square().sum() / exact.square().sum())


@pytest.mark.parametrize(("tokens", "decay"), [(800, 1.5), (800, 1.0), (WIDTH, 0.75), (60, 0.2)])
def test_condition_number_is_that_of_the_damped_hessian(tokens: int, decay: float) -> None:
    problem = plain_problem(tokens, decay, held_out_tokens=0)
    _, report = GptqSolver().solve(problem)
    assert report.damping is not None and report.condition_number is not None
    damping = report.damping * float(problem.hessian.diagonal().mean())
    expected = np.linalg.cond(problem.hessian.double().numpy() + damping * np.eye(WIDTH))
    assert_close("condition number", report.condition_number / expected, 1.0, CONDITION_NUMBER)


def test_dead_inputs_are_counted_and_rounded() -> None:
    x = inputs(800, 1.0)
    x[:, [3, 50]] = 0
    problem = Problem("layer.q", random_weights(), GRID, mean_hessian(x), 800)
    quantized, report = GptqSolver().solve(problem)
    assert report.dead_inputs == 2
    distance = np.abs(dequantize(quantized) - problem.weights.numpy())[:, [3, 50]]
    assert (
        distance <= 0.51 * np.abs(quantized.scales[:, [0, 1]])
    ).mean() > 0.9  # the others are beyond a clipped range


@pytest.mark.parametrize("rows", [32, 300])
def test_held_out_loss_is_the_mean_squared_distance_to_the_float_models_outputs(rows: int) -> None:
    problem, clean, x = disturbed_problem(rows=rows)
    weights = problem.weights[judged_rows(rows)].double()
    judged = quantize_rtn(problem.weights[judged_rows(rows)].numpy(), GRID)
    distance = clean.double() @ weights.T - x.double() @ torch.from_numpy(dequantize(judged)).double().T
    expected = float(distance.square().sum() / len(x))
    assert_close("held-out loss", held_out_loss(problem, judged) / expected, 1.0, LOSS_FP32)


def test_asymmetric_recipe_has_the_least_held_out_loss_and_beats_the_plain_one() -> None:
    problem, _, _ = disturbed_problem()
    quantized, report = GptqSolver().solve(problem)
    losses = every_recipe(problem, True, (0, 1), (0.01, 0.05, 0.2))
    assert report.asymmetric
    assert f"{report.method} {report.damping} {report.sweeps}" == min(losses, key=lambda name: losses[name]), losses
    plain, _ = GptqSolver().solve(replace(problem, cross=None))
    assert held_out_loss(problem, quantized) < 0.9 * held_out_loss(problem, plain)


def test_all_rows_of_a_tall_matrix_are_quantized_by_the_recipe_of_some() -> None:
    problem = plain_problem(400, 0.75, rows=300)
    quantized, report = GptqSolver().solve(problem)
    assert quantized.codes.shape == (300, WIDTH)
    assert len(judged_rows(300)) == 256 and len(set(judged_rows(300).tolist())) == 256
    assert report.damping is not None
    factor, options = factorize(problem.hessian, report.damping), GptqOptions("conditional", report.sweeps)
    assert (quantized.codes == quantize_gptq(problem.weights, factor, GRID, options, problem.hessian).codes).all()


def test_solving_leaves_the_problem_unchanged() -> None:
    problem, _, _ = disturbed_problem()
    assert problem.cross is not None and problem.held_out is not None and problem.held_out.disturbance is not None
    tensors = [problem.weights, problem.hessian, problem.cross, problem.held_out.inputs, problem.held_out.disturbance]
    kept = [tensor.clone() for tensor in tensors]
    GptqSolver().solve(problem)
    assert all(torch.equal(now, before) for now, before in zip(tensors, kept, strict=True))


@pytest.mark.parametrize("width", [1, 5, 64, 100])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]])
def test_hessian_sum_equals_float64_in_any_order_of_chunks(order: list[int], width: int) -> None:
    x = inputs(2000, 0.75, width=width) + 0.5
    chunks = torch.tensor_split(x, [1, 700, 701])
    total = HessianSum(width)
    for place in order:
        total.add(chunks[place])
    hessian = total.mean()
    exact = x.double().T @ x.double() / 2000
    roots = exact.diagonal().sqrt()
    assert total.tokens == 2000
    assert torch.equal(hessian, hessian.T)
    assert_close("H / sqrt(H_ii H_jj)", hessian / roots / roots[:, None], exact / roots / roots[:, None], HESSIAN_FP32)


def test_sum_without_tokens_is_zero() -> None:
    assert not HessianSum(16).mean().any()


def test_effective_rank_counts_the_directions_of_equal_strength() -> None:
    assert effective_rank(torch.eye(64)) == pytest.approx(64)
    assert effective_rank(torch.diag(torch.tensor([2.0] * 5 + [0.0] * 59))) == pytest.approx(5)
    row = inputs(1, 0.0)
    assert effective_rank(mean_hessian(row.repeat(10, 1))) == pytest.approx(1, rel=1e-5)
    assert effective_rank(torch.zeros(8, 8)) == 0


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.5])
def test_effective_rank_is_the_participation_ratio_of_the_eigenvalues(decay: float) -> None:
    hessian = mean_hessian(inputs(500, decay))
    values = np.linalg.eigvalsh(hessian.double().numpy())
    assert 1 <= effective_rank(hessian) <= WIDTH
    assert effective_rank(hessian) == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-5)


def test_extreme_eigenvalues_are_found_where_they_stand_apart() -> None:
    hessian = mean_hessian(inputs(800, 1.5))
    values = np.linalg.eigvalsh(hessian.double().numpy())
    least = values[0] + 0.01 * float(hessian.diagonal().mean())
    assert largest_eigenvalue(hessian) == pytest.approx(values[-1], rel=CONDITION_NUMBER / 2)
    assert smallest_eigenvalue(factorize(hessian, 0.01)) == pytest.approx(least, rel=CONDITION_NUMBER / 2)


@pytest.fixture(params=["memory", "file"])
def activations(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Activations]:
    """Activations [10, 3] of either kind."""
    limit = 10**6 if request.param == "memory" else 0
    made = Pool(tmp_path / "spill", limit).make(10, 3)
    assert isinstance(made, MemoryActivations if request.param == "memory" else FileActivations)
    yield made
    made.close()


ROWS = [[], [4], [0, 1, 2], [7, 3, 4, 5, 0, 9], [9, 8, 7], list(range(10))]


@pytest.mark.parametrize("rows", ROWS)
def test_activations_hold_what_was_written_and_added(activations: Activations, rows: list[int]) -> None:
    random, expected = np.random.default_rng(len(rows)), np.zeros((10, 3), np.float32)
    places, everything = np.array(rows, np.int64), np.arange(10)
    start, first, second = (random.standard_normal((n, 3)).astype(np.float32) for n in (10, len(rows), len(rows)))
    assert not activations.read(everything).any()
    activations.write(everything, torch.from_numpy(start))
    activations.write(places, torch.from_numpy(first))
    activations.add(places, torch.from_numpy(second))
    expected[:] = start
    expected[rows] = first + second
    assert (activations.read(everything).numpy() == expected).all()
    assert (activations.read(places).numpy() == expected[rows]).all()


def test_rows_read_are_a_copy(activations: Activations) -> None:
    activations.read(np.array([1, 2])).fill_(5)
    assert not activations.read(np.arange(10)).any()


def test_values_in_any_memory_layout_are_written(activations: Activations) -> None:
    values = torch.arange(30.0).view(3, 10).T  # [10, 3], not contiguous
    activations.write(np.arange(10), values)
    assert torch.equal(activations.read(np.arange(10)), values)


def test_pool_makes_files_beyond_its_limit_and_memory_again_once_there_is_room(tmp_path: Path) -> None:
    pool = Pool(tmp_path / "spill", limit_bytes=2 * 10 * 3 * 4)
    first, second = pool.make(10, 3), pool.make(10, 3)
    assert isinstance(first, MemoryActivations) and isinstance(second, MemoryActivations)
    assert not pool.folder.exists()
    third, fourth = pool.make(1, 1), pool.make(10, 3)
    assert isinstance(third, FileActivations) and isinstance(fourth, FileActivations)
    assert len(list(pool.folder.iterdir())) == 2
    for each in (first, third, fourth):
        each.close()
    assert not list(pool.folder.iterdir())
    assert isinstance(pool.make(10, 3), MemoryActivations)

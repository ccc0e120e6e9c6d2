"""Reference tests: the allocation of grids against trying every combination. Agreement: the bytes that it counts with
and those of the tensors that a GPTQ file holds."""

from collections.abc import Iterable
from itertools import product

import numpy as np
import pytest

from vlmdeploy.errors import QuantizationError
from vlmdeploy.quant.allocation import GridChoice, allocate, stored_bytes
from vlmdeploy.quant.gptq_format import encode_linear
from vlmdeploy.quant.grid import Grid, quantize_rtn

GRIDS = [Grid(3, 64), Grid(4, 128), Grid(4, 64), Grid(8, 128)]
SEEDS = range(8)
Choices = dict[str, list[GridChoice]]


def random_choices(seed: int, num_matrices: int = 5) -> Choices:
    """Costs that mostly fall with the bytes, but not for every matrix, and not always by less and less."""
    random = np.random.default_rng(seed)
    return {
        f"matrix{index}": [
            GridChoice(grid, int(size * grid.bits + random.integers(9)), float(weight * 3.0**-grid.bits * noise))
            for grid, noise in zip(GRIDS, random.uniform(0.3, 3, len(GRIDS)), strict=True)
        ]
        for index, (size, weight) in enumerate(random.uniform(10, 60, (num_matrices, 2)))
    }


def total(chosen: Iterable[GridChoice]) -> tuple[int, float]:
    """Bytes and cost together."""
    parts = list(chosen)
    return sum(part.bytes for part in parts), sum(part.cost for part in parts)


def least_cost(choices: Choices, budget: int) -> float:
    """Of all combinations within the budget."""
    totals = [total(combination) for combination in product(*choices.values())]
    return min(cost for size, cost in totals if size <= budget)


def smallest(choices: Choices) -> int:
    return sum(min(option.bytes for option in options) for options in choices.values())


@pytest.mark.parametrize("seed", SEEDS)
def test_allocation_keeps_within_the_budget_and_chooses_what_was_offered(seed: int) -> None:
    choices = random_choices(seed)
    for budget in range(smallest(choices), smallest(choices) + 1000, 37):
        chosen = allocate(choices, budget)
        assert list(chosen) == list(choices)
        assert all(chosen[name] in options for name, options in choices.items())
        assert total(chosen.values())[0] <= budget


@pytest.mark.parametrize("seed", SEEDS)
def test_allocation_is_optimal_where_one_price_per_byte_spends_the_budget(seed: int) -> None:
    choices = random_choices(seed)
    for price in np.geomspace(1e-5, 10, 25):
        cheapest = [min(options, key=lambda it: it.cost + price * it.bytes) for options in choices.values()]
        budget, cost = total(cheapest)  # the corners of the convex hulls: no other budget is sure to be spent in full
        assert total(allocate(choices, budget).values())[1] == pytest.approx(cost)
        assert least_cost(choices, budget) == pytest.approx(cost)


@pytest.mark.parametrize("seed", SEEDS)
def test_allocation_is_optimal_for_every_budget_where_all_steps_take_the_same_bytes(seed: int) -> None:
    random = np.random.default_rng(seed)
    choices = {}
    for index in range(5):
        savings = np.sort(random.uniform(0, 5, 3))[::-1]  # each step saves less than the one before
        costs = 20 - np.concatenate(([0], np.cumsum(savings)))
        choices[f"matrix{index}"] = [GridChoice(GRIDS[n], 100 + 10 * n, float(cost)) for n, cost in enumerate(costs)]
    for budget in range(500, 671, 7):
        assert total(allocate(choices, budget).values())[1] == pytest.approx(least_cost(choices, budget))


@pytest.mark.parametrize("seed", SEEDS)
def test_matrices_of_equal_size_never_fare_worse_than_with_one_grid_for_all(seed: int) -> None:
    random = np.random.default_rng(seed)
    grids = [Grid(bits, 128) for bits in (3, 4, 8)]
    choices = {
        f"matrix{index}": [
            GridChoice(grid, stored_bytes(64, 256, grid), float(weight * 4.0**-grid.bits)) for grid in grids
        ]
        for index, weight in enumerate(random.lognormal(0, 2, 9))
    }
    for place in range(3):
        budget, cost = total(options[place] for options in choices.values())
        assert total(allocate(choices, budget).values())[1] <= cost * (1 + 1e-9)
    assert total(allocate(choices, budget - 1).values())[1] > cost  # the last one is all that can be spent


def test_more_bytes_at_the_same_or_a_higher_cost_are_never_spent() -> None:
    options = [
        GridChoice(GRIDS[0], 10, 3.0),
        GridChoice(GRIDS[1], 20, 3.0),
        GridChoice(GRIDS[2], 20, 4.0),
        GridChoice(GRIDS[3], 30, 5.0),
    ]
    assert allocate({"matrix": options}, 10**9) == {"matrix": options[0]}


def test_of_equal_bytes_the_lower_cost_is_chosen() -> None:
    options = [GridChoice(GRIDS[0], 10, 3.0), GridChoice(GRIDS[1], 20, 2.0), GridChoice(GRIDS[2], 20, 1.0)]
    assert allocate({"matrix": options}, 20) == {"matrix": options[2]}


def test_budget_below_the_smallest_choices_is_an_error() -> None:
    choices = {name: [GridChoice(GRIDS[0], 1000, 3.0), GridChoice(GRIDS[3], 2000, 1.0)] for name in ("first", "second")}
    assert total(allocate(choices, 2000).values()) == (2000, 6.0)
    with pytest.raises(QuantizationError, match="the smallest choices take 2,000 bytes, the budget leaves 1,999"):
        allocate(choices, 1999)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_stored_bytes_are_those_of_the_tensors_in_a_gptq_file(bits: int, group_size: int, symmetric: bool) -> None:
    grid = Grid(bits, group_size, symmetric)
    weights = np.random.default_rng(bits).standard_normal((96, 256)).astype(np.float32)
    tensors = encode_linear(quantize_rtn(weights, grid))
    counted = sum(values.nbytes for part, values in tensors.items() if part != "g_idx")
    assert stored_bytes(96, 256, grid) == counted

"""Allocate a byte budget: give each matrix a grid so that the sum of costs is low, by a greedy walk over the convex
hulls of cost over bytes. The caller measures the costs, which must be comparable."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop
from itertools import pairwise

from vlmdeploy.errors import QuantizationError
from vlmdeploy.quant.grid import Grid

SCALE_BITS = 16


@dataclass(frozen=True)
class GridChoice:
    """A candidate grid of a matrix, with its bytes and its cost."""

    grid: Grid
    bytes: int
    cost: float


def stored_bytes(out_width: int, in_width: int, grid: Grid) -> int:
    """Bytes of codes, scales and zero points in a GPTQ file (g_idx not counted)."""
    groups = in_width // grid.group_size
    return (out_width * (in_width * grid.bits + groups * (SCALE_BITS + grid.bits))) // 8


def allocate(choices: Mapping[str, Sequence[GridChoice]], budget_bytes: int) -> dict[str, GridChoice]:
    """Pick one choice per matrix, at most `budget_bytes` in total.

    Start with the smallest choices, then repeatedly take the step that saves the most cost per byte and still fits.
    Raises QuantizationError if the smallest choices do not fit.
    """
    hulls = {name: _hull(options) for name, options in choices.items()}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    used = sum(choice.bytes for choice in chosen.values())
    if used > budget_bytes:
        raise QuantizationError(f"the smallest choices take {used:,} bytes, the budget leaves {budget_bytes:,}")
    steps = [step for name, hull in hulls.items() for step in _steps(name, hull)]
    heapify(steps)
    while steps:
        _, name, place = heappop(steps)
        step = hulls[name][place]
        if hulls[name][place - 1] is not chosen[name] or used - chosen[name].bytes + step.bytes > budget_bytes:
            continue  # an earlier step of this matrix did not fit, or this one does not
        used += step.bytes - chosen[name].bytes
        chosen[name] = step
    return min([chosen, *_uniform(choices, budget_bytes)], key=lambda each: sum(item.cost for item in each.values()))


def _uniform(choices: Mapping[str, Sequence[GridChoice]], budget_bytes: int) -> Iterator[dict[str, GridChoice]]:
    """The same grid for all, wherever it fits: if one matrix dominates the model, this may beat the greedy walk."""
    by_grid = [{choice.grid: choice for choice in options} for options in choices.values()]
    shared = set.intersection(*map(set, by_grid)) if by_grid else set()
    for grid in sorted(shared, key=str):
        every = {name: options[grid] for name, options in zip(choices, by_grid, strict=True)}
        if sum(choice.bytes for choice in every.values()) <= budget_bytes:
            yield every


def _hull(options: Sequence[GridChoice]) -> list[GridChoice]:
    """The lower convex hull of cost over bytes, from the smallest choice to the cheapest one."""
    hull: list[GridChoice] = []
    for choice in sorted(options, key=lambda option: (option.bytes, option.cost)):
        if hull and choice.cost >= hull[-1].cost:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _steps(name: str, hull: list[GridChoice]) -> Iterator[tuple[float, str, int]]:
    """Every step along a hull as (-gain, matrix, place), which sorts the best step first."""
    return ((-_gain(before, after), name, place) for place, (before, after) in enumerate(pairwise(hull), 1))


def _gain(before: GridChoice, after: GridChoice) -> float:
    """Cost saved per byte spent."""
    return (before.cost - after.cost) / (after.bytes - before.bytes)

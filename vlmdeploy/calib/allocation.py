"""Choose bits and group size of every linear under a budget: measure the cost of each candidate, then allocate."""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vlmdeploy.byte_sizes import parse_size
from vlmdeploy.calib.activations import Pool
from vlmdeploy.calib.calibration_set import CalibrationSample
from vlmdeploy.calib.processes import Processes
from vlmdeploy.calib.sensitivity import ErrorMeter, measure_costs
from vlmdeploy.calib.statistics import Statistics
from vlmdeploy.calib.units import UnitRunner
from vlmdeploy.errors import ConfigError, QuantizationError
from vlmdeploy.model.checkpoint import Checkpoint
from vlmdeploy.progress import Progress
from vlmdeploy.quant.allocation import GridChoice, allocate, stored_bytes
from vlmdeploy.quant.grid import Grid
from vlmdeploy.quant.precision import BITS, GROUP_SIZES, Precision, PrecisionPlan
from vlmdeploy.spec.matrices import Matrix, matrices

CANDIDATE_BITS = (3, 4, 8)
MEASURED_SAMPLES = 64  # gradients and errors are averages over these
GRID = re.compile(rf"(?P<type>{'|'.join(BITS)}):(?P<group>[1-9]\d{{0,8}})")


@dataclass(frozen=True)
class Budget:
    """The bytes of the whole checkpoint, or the average bits per quantized weight, scales included."""

    total_bytes: int | None = None
    average_bits: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Parse a size such as "9.0GB", or a number of bits such as "4.25". Raises ConfigError."""
        try:
            bits = float(text)
        except ValueError:
            return cls(total_bytes=parse_size(text, "--budget"))
        if not 0 < bits < math.inf:
            raise ConfigError(f'--budget "{text:.80}": expected a size such as 9.0GB, or average bits such as 4.25')
        return cls(average_bits=bits)


def allocate_plan(
    checkpoint: Checkpoint,
    plan: PrecisionPlan,
    samples: tuple[CalibrationSample, ...],
    budget: Budget,
    memory_bytes: int,
    seed: int,
    progress: Progress,
    signed: bool = True,
) -> PrecisionPlan:
    """Choose bits and group size of every quantized linear by measured cost. signed: see `quant.gptq.GptqOptions`.

    Every process measures the same samples, so all choose alike. Raises QuantizationError if the budget is too small.
    """
    planned = {linear.target: (linear, plan[linear.target].grid) for linear in matrices(checkpoint.spec)}
    members = {target: linear for target, (linear, grid) in planned.items() if grid is not None}
    fixed = _fixed_bytes(checkpoint, members)
    grids = {
        target: [choice for choice in candidate_grids(linear, grid) if checkpoint.can_store(target, choice)]
        for target, (linear, grid) in planned.items()
        if grid is not None
    }
    with TemporaryDirectory() as folder:
        meter = ErrorMeter(checkpoint, Statistics(Processes()), lambda target: grids.get(target, []), signed)
        runner = UnitRunner(checkpoint, meter, Pool(Path(folder), memory_bytes))
        costs = measure_costs(runner, meter, samples[:MEASURED_SAMPLES], seed, progress)
    choices = {
        target: [
            GridChoice(
                grid, stored_bytes(linear.out_width, linear.in_width, grid), costs.get(target, {}).get(grid, 0.0)
            )
            for grid in grids[target]
        ]
        for target, linear in members.items()
    }
    try:
        chosen = allocate(choices, _budget_bytes(budget, members, fixed))
    except QuantizationError as error:
        raise QuantizationError(f"--budget: {error} beside {fixed:,} bytes of floats; give a larger budget") from error
    by_target = dict(plan.by_target)
    for target, choice in chosen.items():
        by_target[target] = Precision.of(choice.grid)
    return replace(plan, by_target=by_target)


def grids_of(plan: PrecisionPlan) -> dict[str, str]:
    """Map every quantized parameter to its type and group size, such as "int4:64"."""
    chosen = plan.by_target.items()
    return {target: f"{item.type}:{item.group_size}" for target, item in chosen if item.bits}


def with_grids(plan: PrecisionPlan, grids: Any) -> PrecisionPlan:
    """Apply the output of `grids_of`, read back from a file, to a plan. Raises ConfigError if it is malformed."""
    if not isinstance(grids, dict) or grids.keys() != grids_of(plan).keys():
        raise ConfigError("grids: expected one for every quantized linear")
    by_target = dict(plan.by_target)
    for target, text in grids.items():
        match = GRID.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ConfigError(f'grids: {target}: found {text!r:.80}, expected type and group such as "int4:64"')
        by_target[target] = Precision(match["type"], int(match["group"]), by_target[target].symmetric)
    return replace(plan, by_target=by_target)


def candidate_grids(linear: Matrix, planned: Grid) -> list[Grid]:
    """All grids of 3, 4 and 8 bits whose group size divides the width; the planned grid if none does."""
    sizes = [size for size in GROUP_SIZES if linear.in_width % size == 0 and size < linear.in_width]
    found = [Grid(bits, size, planned.symmetric) for bits in CANDIDATE_BITS for size in sizes]
    return found or [planned]


def _fixed_bytes(checkpoint: Checkpoint, members: dict[str, Matrix]) -> int:
    """Bytes of the float tensors."""
    return sum(checkpoint.stored_bytes(rule) for target, rule in checkpoint.rules.items() if target not in members)


def _budget_bytes(budget: Budget, members: dict[str, Matrix], fixed: int) -> int:
    if budget.total_bytes is not None:
        return budget.total_bytes - fixed
    assert budget.average_bits is not None, "parse sets one of them"
    return int(budget.average_bits * sum(item.values for item in members.values()) / 8)

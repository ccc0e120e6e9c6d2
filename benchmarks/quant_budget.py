"""Bits allocated by measured cost against uniform bits, at the same size, on the digits model.

    python benchmarks/quant_budget.py [--draws 3]

Quantizes every linear, also of encoder, connector and head: once uniformly at 4 bits in groups of 64, once as
`--budget` chooses for the same number of bytes. Prints KL x 1e3 and the squared error of the logits x 1e3 (see
quant_quality.py) for each calibration draw, and their ratios.
"""

import argparse
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from make_data import make_data
from quant_quality import CKPT, Damage, Judge, read_prompts

from vlmdeploy.calib.allocation import Budget, allocate_plan
from vlmdeploy.calib.calibration_set import hold_out
from vlmdeploy.calib.coverage import check_coverage
from vlmdeploy.calib.processes import Processes
from vlmdeploy.calib.run import Calibration, QuantizationRun, RunOptions
from vlmdeploy.calib.solver import GptqSolver
from vlmdeploy.model.checkpoint import Checkpoint
from vlmdeploy.quant.allocation import stored_bytes
from vlmdeploy.quant.precision import PrecisionPlan, plan_precision
from vlmdeploy.spec.matrices import matrices

MEMORY_BYTES = 8 << 30


def size_of(plan: PrecisionPlan, checkpoint: Checkpoint) -> tuple[int, float]:
    """Bytes of all codes and scales, and bits per weight."""
    total = weights = 0
    for linear in matrices(checkpoint.spec):
        grid = plan[linear.target].grid
        assert grid is not None, "everything is quantized"
        total += stored_bytes(linear.out_width, linear.in_width, grid)
        weights += linear.values
    return total, 8 * total / weights


def damage(plan: PrecisionPlan, calibration: Calibration, judge: Judge) -> Damage:
    """The damage of quantizing by a plan."""
    checkpoint, processes = judge.checkpoint, Processes()
    coverage = check_coverage(
        checkpoint.spec, plan, calibration.tokens, calibration.pictures, processes, allow_uncalibrated=False
    )
    options = RunOptions({}, memory_bytes=MEMORY_BYTES)
    with tempfile.TemporaryDirectory() as folder:
        run = QuantizationRun(
            checkpoint, plan, calibration, GptqSolver(), options, processes, coverage, lambda *_: None, Path(folder)
        )
        return judge.damage(run.in_memory()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=3, help="calibration sets")
    parser.add_argument("--samples", type=int, default=512, help="calibration samples of each set")
    parser.add_argument("--scenes", type=int, default=400, help="held-out scenes")
    options = parser.parse_args()
    checkpoint = Checkpoint(CKPT)
    parts = dict.fromkeys(("vision", "connector", "decoder", "lm_head"), "int4")
    uniform = plan_precision(checkpoint.spec, "ort-int4", parts, 64)
    size, bits = size_of(uniform, checkpoint)
    found: dict[str, list[Damage]] = {"uniform": [], "budget": []}
    with tempfile.TemporaryDirectory() as folder:
        calib, test = Path(folder) / "calib", Path(folder) / "test"
        make_data("calib", 4 * options.samples // 3, calib, 0)
        make_data("test", options.scenes, test, 0)
        judge = Judge(CKPT, read_prompts(test, 9 * options.scenes, 0))
        for draw in range(options.draws):
            calibration = Calibration.of(hold_out(read_prompts(calib, options.samples, draw)))
            budget = Budget(average_bits=bits)
            chosen = allocate_plan(
                checkpoint, uniform, calibration.samples, budget, MEMORY_BYTES, draw, lambda *_: None
            )
            for name, plan in (("uniform", uniform), ("budget", chosen)):
                found[name].append(damage(plan, calibration, judge))
            widths = Counter(plan.by_target[linear.target].type for linear in matrices(checkpoint.spec))
            print(f"draw {draw}: {size_of(chosen, checkpoint)[0]:,} of {size:,} bytes, {dict(widths)}", flush=True)
    for measure in ("kl", "logits"):
        values = {name: np.array([getattr(each, measure) for each in damages]) for name, damages in found.items()}
        ratio = values["budget"] / values["uniform"]
        print(f"{measure} x 1e3: " + "; ".join(f"{name} {np.round(each, 3)}" for name, each in values.items()))
        print(f"{measure}, budget / uniform: mean {ratio.mean():.2f}, worst {ratio.max():.2f}")


if __name__ == "__main__":
    main()

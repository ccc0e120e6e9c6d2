"""Do two implementations agree? One table of tolerances with reasons, and a gate that names the first failure.

"structure": MatMulNBits with exact float activations (accuracy_level 0) over the shipped weights, and fp16 values
widened to float32. Only the order of float32 sums differs, so a wrong expert, position, norm, activation or packing
shows.
"shipped": the graphs as they are; int8 activations cost 0.4 to 1.2 % per linear, fp16 ones 0.1 %.
Errors are root mean squares, rms(a - b) / rms(b): single values of a long sum that cancels may differ a hundred times
more than the rest, while one wrong row or column shows in the mean. The gate compares models of the same (dequantized)
weights; `diff` uses "rounded" for others.
"""

from dataclasses import dataclass

import numpy as np

from vlmdeploy.errors import ParityError
from vlmdeploy.manifest import StageVerdict
from vlmdeploy.runtime.backends.lanes import Floats


@dataclass(frozen=True)
class Tolerance:
    """The largest error that passes, and the reason."""

    bound: float
    reason: str


PREPROCESS = Tolerance(
    0.01, "Pillow rounds between its two passes: 1.3e-3 measured; Lanczos would give 0.02, bilinear 0.03"
)
EMBEDDING = Tolerance(1e-6, "the same rows of the same table, looked up by other code")
STRUCTURE = Tolerance(
    2e-5, "float32 sums in another order: 6e-7 measured; GELU by tanh, the finest fault tested, is above it"
)
STRUCTURE_END_TO_END = Tolerance(1e-4, "the same through all layers: 3e-6 measured")
SHIPPED = Tolerance(0.05, "int8 activations, a group of layers fed with its own input: up to 0.02 measured")
SHIPPED_END_TO_END = Tolerance(0.25, "the same through all layers, where errors add up and attention amplifies them")
HALF = Tolerance(5e-3, "fp16 products and KV cache, a stage fed with its own input: 4e-4 measured")
HALF_END_TO_END = Tolerance(0.05, "the same through all layers")
ROUNDED = Tolerance(
    0.25, "weights of 4 bits on one side only, a stage fed with the other's input: 0.08 measured, 0.2 on random weights"
)
ROUNDED_END_TO_END = Tolerance(0.5, "the same through all layers")
REPLAY = Tolerance(0.05, "int8 kernels of another processor round activations differently")
CLEAR_LEAD = 4  # a lead of this many error bounds (rms) is not a tie


def bound_of(check: str, is_half: bool) -> Tolerance:
    """The bound of one stage fed with the bundle's own input. is_half: the bundle computes in fp16."""
    if check == "structure":
        return STRUCTURE
    return HALF if is_half else SHIPPED


def end_to_end_bound_of(check: str, is_half: bool) -> Tolerance:
    """The bound of the whole model's logits."""
    if check == "structure":
        return STRUCTURE_END_TO_END
    return HALF_END_TO_END if is_half else SHIPPED_END_TO_END


class Gate:
    """Collects verdicts; raises at the first stage that fails."""

    def __init__(self, where: str, is_half: bool = False) -> None:
        self.where = where
        self.is_half = is_half
        self.verdicts: list[StageVerdict] = []

    def compare(self, stage: str, check: str, found: Floats, expected: Floats, tolerance: Tolerance) -> None:
        """Compare two tensors of one shape.

        Raises ParityError naming the stage, the largest difference and where it is.
        """
        if not np.isfinite(found).all():
            place = np.argwhere(~np.isfinite(found))[0].tolist()
            raise ParityError(
                f"{self.where}: {stage} ({check}) holds Inf or NaN at {place}; in fp16 that is an overflow: "
                f"{_wider(stage)}"
            )
        distance = np.abs(found - expected)
        worst = np.unravel_index(int(distance.argmax()), distance.shape)
        error = _error(found, expected)
        verdict = StageVerdict(
            stage, check, error, tolerance.bound, str([int(i) for i in worst]), error <= tolerance.bound
        )
        self.verdicts.append(verdict)
        if not verdict.passed:
            raise ParityError(
                f"{self.where}: {stage} ({check}) is the first stage that differs from PyTorch: error {error:.2e}, "
                f"allowed {tolerance.bound:.0e}; largest at {verdict.tensor}: bundle {found[worst]:.6g}, PyTorch "
                f"{expected[worst]:.6g}"
            )

    def compare_best(self, stage: str, check: str, found: Floats, expected: Floats) -> float:
        """The share of rows with the same best token, logits [rows, vocab].

        Raises ParityError where a row's best token in PyTorch leads clearly and the bundle's is another.
        """
        rows = np.arange(len(expected))
        best, chosen = expected.argmax(1), found.argmax(1)
        lead = expected[rows, best] - expected[rows, chosen]
        bound = bound_of(check, self.is_half)
        allowed = CLEAR_LEAD * bound.bound * np.sqrt(np.square(expected).mean(1))
        if (lead > allowed).any():
            row = int((lead - allowed).argmax())
            raise ParityError(
                f"{self.where}: {stage} ({check}): the best token of row {row} is {chosen[row]}, PyTorch says "
                f"{best[row]}, which leads by {lead[row]:.3g}"
            )
        return float((best == chosen).mean())


def _wider(stage: str) -> str:
    """The remedy for a stage that overflows."""
    part = stage.replace(" ", ".").split(".")[0]
    option = {"vision": "--vision", "connector": "--connector", "logits": "--lm-head"}.get(part)
    return f"keep this part in fp32 with {option} fp32" if option else "keep this part in fp32, with an ort target"


def _error(found: Floats, expected: Floats) -> float:
    """rms(found - expected) / rms(expected)."""
    power = float(np.square(expected, dtype=np.float64).mean()) if expected.size else 1.0
    return float(np.sqrt(np.square(found - expected, dtype=np.float64).mean() / max(power, 1e-12)))

"""Do two implementations agree? One table says how far they may differ and why; a gate names what does not.

"structure": MatMulNBits with exact float activations (accuracy_level 0) over the shipped weights. Only the order of
float32 sums differs, so a wrong expert, position, norm or packing shows. Errors are max|a - b| / max(1, max|b|).
"shipped": the graphs as they are. int8 activations cost 0.4 to 1.2 % per linear, so errors are root mean squares:
rms(a - b) / rms(b).
"""

from dataclasses import dataclass

import numpy as np

from vlmdeploy.bundle import StageVerdict
from vlmdeploy.errors import ParityError
from vlmdeploy.runtime.backend import Floats


@dataclass(frozen=True)
class Tolerance:
    """The largest error that passes, and why it is that large."""

    bound: float
    reason: str


PREPROCESS = Tolerance(0.02, "two grey levels of 255 (Pillow rounds between its passes) over values of up to 2.6")
EMBEDDING = Tolerance(1e-6, "the same rows of the same table, looked up by other code")
STRUCTURE = Tolerance(1e-4, "float32 sums in another order: 5e-6 measured per layer, up to 5e-5 over a group of layers")
STRUCTURE_END_TO_END = Tolerance(3e-4, "the same through all layers")
SHIPPED = Tolerance(0.05, "int8 activations, rms per layer group fed with its own input: up to 0.02 measured")
SHIPPED_END_TO_END = Tolerance(0.25, "the same through all layers, where errors add up and attention amplifies them")
REPLAY = Tolerance(0.05, "int8 kernels of another processor round activations differently")
CLEAR_LEAD = 4  # a lead of this many error bounds (rms) is not a tie


class Gate:
    """Collects verdicts and stops at the first stage that fails."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.verdicts: list[StageVerdict] = []

    def compare(self, stage: str, check: str, found: Floats, expected: Floats, tolerance: Tolerance) -> None:
        """Compare two tensors of one shape.

        Raises ParityError naming the stage, the largest difference and where it is.
        """
        if not np.isfinite(found).all():
            place = np.argwhere(~np.isfinite(found))[0].tolist()
            raise ParityError(
                f"{self.where}: {stage} ({check}) holds Inf or NaN at {place}; in fp16 that is an overflow: keep this "
                "part in fp32"
            )
        distance = np.abs(found - expected)
        worst = np.unravel_index(int(distance.argmax()), distance.shape)
        error = _error(found, expected, check)
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
        """The share of rows whose best token is the same, logits [rows, vocab].

        Raises ParityError where a row's best token in PyTorch leads clearly and the bundle's is another.
        """
        rows = np.arange(len(expected))
        best, chosen = expected.argmax(1), found.argmax(1)
        lead = expected[rows, best] - expected[rows, chosen]
        bound = STRUCTURE if check == "structure" else SHIPPED
        allowed = CLEAR_LEAD * bound.bound * np.sqrt(np.square(expected).mean(1))
        if (lead > allowed).any():
            row = int((lead - allowed).argmax())
            raise ParityError(
                f"{self.where}: {stage} ({check}): the best token of row {row} is {chosen[row]}, PyTorch says "
                f"{best[row]}, which leads by {lead[row]:.3g}"
            )
        return float((best == chosen).mean())


def _error(found: Floats, expected: Floats, check: str) -> float:
    """The measure of a check, as the top of this module defines it."""
    if check == "structure":
        return float(np.abs(found - expected).max(initial=0) / max(1.0, np.abs(expected).max(initial=0)))
    power = float(np.square(expected, dtype=np.float64).mean()) if expected.size else 1.0
    return float(np.sqrt(np.square(found - expected, dtype=np.float64).mean() / max(power, 1e-12)))

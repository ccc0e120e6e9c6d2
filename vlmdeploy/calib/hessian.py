"""The Hessian of a linear's inputs, and figures of its spectrum.

Sums are float32 and divided once, at the end. Only the upper triangle is summed, in panels of columns.
"""

import torch
from torch import Tensor

from vlmdeploy.calib.processes import Processes

PANELS = 8
POWER_STEPS = 20


class HessianSum:
    """Accumulates X^T X over tokens; x float32 [tokens, in]."""

    def __init__(self, width: int) -> None:
        self.total = torch.zeros(width, width)
        self.tokens = 0
        self.samples = 0
        size = -(-width // PANELS)
        self._panels = [(start, min(start + size, width)) for start in range(0, width, size)]

    def add(self, x: Tensor) -> None:
        """Add tokens."""
        for start, stop in self._panels:
            self.total[:stop, start:stop].addmm_(x[:, :stop].t(), x[:, start:stop])
        self.tokens += len(x)

    def reduce(self, processes: Processes) -> None:
        """Sum over all processes."""
        processes.sum_in_place(self.total)
        self.tokens, self.samples = processes.sum_counts(self.tokens, self.samples)

    def mean(self) -> Tensor:
        """The Hessian X^T X / tokens, [in, in], both triangles. Consumes the sum."""
        hessian = self.total.div_(max(1, self.tokens))
        for start, stop in self._panels:
            hessian[start:stop, :start] = hessian[:start, start:stop].t()
            block = hessian[start:stop, start:stop]
            block.copy_(block.triu() + block.triu(1).t())
        self.total = torch.empty(0)
        return hessian


def start_vector(width: int) -> Tensor:
    """A seeded random unit vector."""
    vector = torch.randn(width, generator=torch.Generator().manual_seed(0))
    return vector / vector.norm()


def effective_rank(hessian: Tensor) -> float:
    """The participation ratio, 1..in: (sum of eigenvalues)^2 / sum of their squares."""
    trace = float(hessian.diagonal().sum())
    return (trace / float(torch.linalg.vector_norm(hessian))) ** 2 if trace else 0.0


def largest_eigenvalue(hessian: Tensor) -> float:
    """By power iteration: a lower bound, a few percent off if the next eigenvalues are close."""
    vector = start_vector(len(hessian))
    value = 0.0
    for _ in range(POWER_STEPS):
        moved = hessian @ vector
        value = float(moved.norm())
        if value == 0:
            return 0.0
        vector = moved / value
    return value

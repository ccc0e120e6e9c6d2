"""Problems for the routed kernels, and the kernels run on CPU tensors by Triton's interpreter."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.reference import routed_linear as reference
from vlmdeploy.kernels import routed
from vlmdeploy.kernels.packing import pack_codes

# The one rounding at the end: to nearest, half a step, and a whole one where the interpreter cuts bfloat16 off.
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}
SUM_ROUNDING = 1e-6  # of the magnitudes that are added up in float32


@dataclass
class Problem:
    """Inputs of a routed linear. x [tokens, in]; codes [2, out, in]; scales [2, groups, out]; bias [2, out]."""

    x: Tensor
    experts: NDArray[np.int32]
    codes: NDArray[np.uint8]
    scales: NDArray[np.float16]
    bias: NDArray[np.float32]
    group_size: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Tokens, outputs and groups: the scalars of the kernels."""
        return len(self.x), self.codes.shape[1], self.scales.shape[1]

    def expected(self) -> NDArray[np.float64]:
        x = self.x.float().numpy()
        return reference.routed_linear(x, self.experts, self.codes, self.scales, self.bias, self.group_size)

    def magnitude(self) -> NDArray[np.float64]:
        """What the sum of the magnitudes of all products comes to, [tokens, out]."""
        x = np.abs(self.x.float().numpy())
        weights = [reference.weights(self.codes[i], self.scales[i], self.group_size) for i in range(2)]
        return np.stack([np.abs(weights[min(abs(int(e)), 1)]) @ row for e, row in zip(self.experts, x, strict=True)])


def make_problem(
    tokens: int, out: int, groups: int, group_size: int, vision: float, dtype: torch.dtype = torch.float16
) -> Problem:
    """Random weights and inputs; a share `vision` of the rows, at random places, belongs to expert 1."""
    rng = np.random.default_rng([tokens, out, groups, group_size])
    width = groups * group_size
    return Problem(
        x=torch.from_numpy(rng.normal(0, 1, (tokens, width)).astype(np.float32)).to(dtype),
        experts=rng.permutation(np.arange(tokens) < round(vision * tokens)).astype(np.int32),
        codes=rng.integers(0, 16, (2, out, width)).astype(np.uint8),
        scales=rng.uniform(0.001, 0.1, (2, groups, out)).astype(np.float16),
        bias=rng.normal(0, 1, (2, out)).astype(np.float32),
        group_size=group_size,
    )


def partition(experts: NDArray[np.int32], block: int = 64) -> tuple[Tensor, Tensor]:
    """What `routed_partition` writes: order [tokens] and language_count [1]."""
    order, count = torch.full((len(experts),), -1, dtype=torch.int32), torch.full((1,), -1, dtype=torch.int32)
    routed.routed_partition[(1,)](torch.from_numpy(experts), len(experts), order, count, BLOCK=block)
    return order, count


def run(kind: str, problem: Problem, block_rows: int = 16, block_columns: int = 32, tiles: int | None = None) -> Tensor:
    """What `routed_gemv` or `routed_gemm` writes into a y of NaNs, [tokens, out]; or only the first tiles of rows."""
    tokens, out, groups = problem.sizes
    packed = np.stack([pack_codes(codes, problem.group_size) for codes in problem.codes])
    weights = [torch.from_numpy(part) for part in (packed, problem.scales, problem.bias)]
    y = torch.full((tokens, out), float("nan"), dtype=problem.x.dtype)
    inputs = (problem.x, torch.from_numpy(problem.experts), *partition(problem.experts), *weights)
    columns = -(-out // block_columns)
    if kind == "gemv":
        routed.routed_gemv[(columns, tokens)](
            *inputs, tokens, out, groups, y, GROUP_SIZE=problem.group_size, BLOCK_COLUMNS=block_columns, STAGES=2
        )
    else:
        routed.routed_gemm[(columns, -(-tokens // block_rows) + 1 if tiles is None else tiles)](
            *inputs, tokens, out, groups, y, GROUP_SIZE=problem.group_size, BLOCK_ROWS=block_rows,
            BLOCK_COLUMNS=block_columns,
        )  # fmt: skip
    return y


def assert_rounded_once(found: Tensor, problem: Problem) -> None:
    """Fail unless every value is the exact one, rounded to the type of x, up to the order of summation."""
    expected = problem.expected()
    error = np.abs(found.double().numpy() - expected)
    allowed = ROUNDING[problem.x.dtype] * np.abs(expected) + SUM_ROUNDING * problem.magnitude()
    worst = np.unravel_index(np.argmax(error - allowed), error.shape)
    assert (error <= allowed).all(), f"{found[worst]} at {worst}, expected {expected[worst]:.6g}"

"""Contract tests of the PyTorch door to the routed kernels: what it takes, what it refuses, what comes out. Run on
CPU tensors by Triton's interpreter."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.routed_kernels import Problem, assert_rounded_once, make_problem
from vlmdeploy.errors import BackendError
from vlmdeploy.kernels.launch import Route, RoutedWeights, partition, routed_linear
from vlmdeploy.kernels.packing import PackedExperts, pack_codes

ROOT = Path(__file__).parents[1]


def weights_of(problem: Problem) -> RoutedWeights:
    packed = np.stack([pack_codes(codes, problem.group_size) for codes in problem.codes])
    return RoutedWeights.on("cpu", PackedExperts(packed, problem.scales, problem.bias, problem.group_size))


@pytest.mark.parametrize("tokens", [1, 2, 40])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_linear_equals_the_loops(tokens: int, dtype: torch.dtype) -> None:
    problem = make_problem(tokens, 70, 2, 64, 0.5, dtype)
    found = routed_linear(problem.x, partition(problem.experts, "cpu"), weights_of(problem))
    assert found.dtype == dtype
    assert_rounded_once(found, problem)


def test_axes_before_the_last_are_kept() -> None:
    problem = make_problem(6, 8, 1, 32, 0.5)
    route, weights = partition(problem.experts.reshape(2, 3), "cpu"), weights_of(problem)
    found = routed_linear(problem.x.view(2, 3, 32), route, weights)
    assert found.shape == (2, 3, 8)
    assert torch.equal(found.view(6, 8), routed_linear(problem.x, route, weights))


def test_rows_need_not_lie_together() -> None:
    problem = make_problem(4, 8, 1, 32, 0.5)
    route, weights = partition(problem.experts, "cpu"), weights_of(problem)
    spread = problem.x.T.contiguous().T
    assert not spread.is_contiguous()
    assert torch.equal(routed_linear(spread, route, weights), routed_linear(problem.x, route, weights))


def test_no_rows_give_no_rows() -> None:
    problem = make_problem(1, 8, 1, 32, 0)
    route = partition(torch.zeros(0, dtype=torch.int64), "cpu")
    assert routed_linear(problem.x[:0], route, weights_of(problem)).shape == (0, 8)


@pytest.mark.parametrize(
    "experts",
    [
        np.array([0, 1, 0]), np.array([0, 1, 0], np.uint8), torch.tensor([0, 1, 0]), torch.tensor([False, True, False]),
        np.array([False, True, False]),
    ],
)  # fmt: skip
def test_route_is_made_of_ids_or_a_mask(experts: torch.Tensor) -> None:
    route = partition(experts, "cpu")
    assert route.experts.tolist() == [0, 1, 0]
    assert route.order.tolist() == [0, 2, 1]
    assert route.language_count.tolist() == [2]
    assert {tensor.dtype for tensor in vars(route).values()} == {torch.int32}


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (np.array([0, 2]), r"expert ids are 0\.\.2, expected 0 \(language\) or 1 \(vision\)"),
        (np.array([-1, 1]), r"expert ids are -1\.\.1"),
        (np.array([2**32]), r"expert ids are 4294967296\.\.4294967296"),
        (np.array([0.0, 1.0]), r"expert ids are torch\.float64, expected integers or a bool mask"),
        (torch.zeros(1, dtype=torch.int32, device="meta"), "expert ids are on meta; expected them on the host"),
    ],
)
def test_other_ids_are_refused(experts: torch.Tensor, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        partition(experts, "cpu")


def refused(problem: Problem, x: torch.Tensor, message: str, route: Route | None = None) -> None:
    route = partition(problem.experts, "cpu") if route is None else route
    with pytest.raises(BackendError, match=message):
        routed_linear(x, route, weights_of(problem))


def test_inputs_that_do_not_fit_are_refused() -> None:
    problem = make_problem(4, 8, 1, 32, 0.5)
    x = problem.x
    refused(problem, x.float(), r"x is torch\.float32, expected torch\.float16 or torch\.bfloat16")
    refused(problem, x[:, :31], r"x is \[4, 31\], expected \[\.\.\., 32\] for these weights")
    refused(problem, x[:, :0], r"x is \[4, 0\], expected")
    refused(problem, x[0, 0], r"x is \[\], expected")
    refused(problem, x[:3], "x has 3 rows, the route 4")
    refused(problem, x.to("meta"), "x is on meta, the route on cpu, the weights on cpu; expected one")
    refused(problem, x.clone().requires_grad_(), "the routed kernels have no gradient")


def test_input_at_an_odd_address_is_refused() -> None:
    problem = make_problem(4, 8, 1, 32, 0.5)
    shifted = torch.zeros(129, dtype=torch.float16)[1:].view(4, 32)
    refused(problem, shifted, "x does not start at a multiple of 16 bytes")


def last_line_of(code: str, environment: dict[str, str]) -> str:
    """What a fresh process, which does not interpret kernels unless told, says last."""
    start = "import torch\nfrom vlmdeploy.kernels.launch import partition\n"
    command = [sys.executable, "-c", f"{code}\n{start}partition(torch.zeros(2, dtype=torch.bool), 'cpu')"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert result.returncode == 1
    return result.stderr.strip().splitlines()[-1]


def test_without_triton_the_message_says_what_to_install() -> None:
    line = last_line_of("import sys\nsys.modules['triton'] = None", {})
    assert line.endswith("BackendError: the routed kernels need Triton: pip install 'vlmdeploy[kernels]'")


def test_without_cuda_the_message_says_so() -> None:
    line = last_line_of("", {"TRITON_INTERPRET": "0"})
    assert "BackendError: the routed kernels need a CUDA device, not cpu (or TRITON_INTERPRET=1" in line

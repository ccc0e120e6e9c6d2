"""Reference tests: the Triton kernels, run by Triton's interpreter, against tests/reference/routed_linear.py."""

import numpy as np
import pytest
import torch

from tests.reference import routed_linear as reference
from tests.routed_kernels import Problem, assert_rounded_once, make_problem, partition, run
from vlmdeploy.kernels import routed

both_kinds = pytest.mark.parametrize("kind", ["gemv", "gemm"])
both_dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


@pytest.mark.parametrize("vision", [0, 0.1, 0.5, 1])
@pytest.mark.parametrize("tokens", [1, 2, 64, 65, 200])
def test_partition_is_a_stable_sort_by_expert(tokens: int, vision: float) -> None:
    experts = make_problem(tokens, 1, 1, 32, vision).experts
    order, count = partition(experts)
    expected_order, expected_count = reference.order(experts)
    assert order.tolist() == expected_order.tolist()
    assert int(count) == expected_count


def test_partition_counts_every_unknown_id_as_the_second_expert() -> None:
    order, count = partition(np.array([0, 7, 1, 0, -1, 0, 2**31 - 1, -(2**31)], np.int32))
    assert order.tolist() == [0, 3, 5, 1, 2, 4, 6, 7]
    assert int(count) == 3


@both_kinds
@both_dtypes
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_kernel_equals_the_loops(kind: str, dtype: torch.dtype, group_size: int) -> None:
    problem = make_problem(9, 37, 5, group_size, 0.5, dtype)
    assert_rounded_once(run(kind, problem), problem)


@both_kinds
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 17])
def test_number_of_groups_need_not_fill_a_block(kind: str, groups: int) -> None:
    problem = make_problem(3, 32, groups, 32, 0.5)
    assert_rounded_once(run(kind, problem), problem)


@both_kinds
@pytest.mark.parametrize("out", [1, 31, 33, 70])
def test_number_of_outputs_need_not_fill_a_block(kind: str, out: int) -> None:
    problem = make_problem(3, out, 2, 64, 0.5)
    assert_rounded_once(run(kind, problem), problem)


@pytest.mark.parametrize("vision", [0, 0.1, 0.5, 1])
@pytest.mark.parametrize("tokens", [1, 37, 130])
def test_rows_of_both_experts_mix_in_one_launch(tokens: int, vision: float) -> None:
    problem = make_problem(tokens, 20, 2, 32, vision)
    assert_rounded_once(run("gemm", problem), problem)


@pytest.mark.parametrize("block_rows", [16, 64])
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_language_rows_may_end_at_a_tile_and_beside_it(block_rows: int, more: int) -> None:
    problem = make_problem(2 * block_rows, 20, 1, 32, 0)
    problem.experts[block_rows + more :] = 1
    assert_rounded_once(run("gemm", problem, block_rows=block_rows), problem)


def test_tile_writes_the_rows_of_its_expert_only() -> None:
    problem = make_problem(20, 8, 1, 32, 0)
    problem.experts[5:] = 1
    written = [torch.isfinite(run("gemm", problem, tiles=tiles)[:, 0]).sum() for tiles in (1, 2, 3)]
    assert written == [5, 20, 20]


@both_kinds
@both_dtypes
def test_codes_and_scales_reach_the_output_exactly(kind: str, dtype: torch.dtype) -> None:
    problem = make_problem(96, 10, 3, 32, 0.5, dtype)
    problem.x = torch.eye(96, dtype=dtype)
    problem.scales = np.exp2(np.arange(60).reshape(2, 3, 10) % 24 - 14.0).astype(np.float16)
    problem.bias[:] = 0
    found = run(kind, problem).double().numpy()
    weights = np.stack([reference.weights(problem.codes[i], problem.scales[i], 32) for i in range(2)])
    assert (found == weights[problem.experts, :, np.arange(96)]).all()


@both_kinds
@pytest.mark.parametrize("scale", [2.0**-24, 65504.0])
def test_scale_may_be_the_smallest_and_the_largest_of_fp16(kind: str, scale: float) -> None:
    problem = make_problem(2, 8, 1, 32, 0.5, torch.bfloat16)
    problem.scales[:] = scale
    problem.bias[:] = 0
    assert_rounded_once(run(kind, problem), problem)


@both_kinds
def test_bias_is_that_of_the_expert_of_the_row(kind: str) -> None:
    problem = make_problem(4, 8, 1, 32, 0.5)
    problem.x[:] = 0
    problem.bias[0], problem.bias[1] = 1, 2
    assert (run(kind, problem)[:, 0].numpy() == 1 + problem.experts).all()


@both_kinds
def test_unknown_ids_use_the_second_expert(kind: str) -> None:
    problem = make_problem(6, 8, 1, 32, 0)
    problem.experts[:] = [0, 5, -3, 1, 2**31 - 1, -(2**31)]
    found = run(kind, problem)
    problem.experts[:] = [0, 1, 1, 1, 1, 1]
    assert_rounded_once(found, problem)


@both_kinds
def test_infinite_row_leaves_the_others_alone(kind: str) -> None:
    problem = make_problem(5, 8, 2, 32, 0.5)
    expected = run(kind, problem)
    problem.x[2, 3] = float("inf")
    with np.errstate(invalid="ignore"):
        found = run(kind, problem)
    assert torch.equal(found[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])
    assert not torch.isfinite(found[2]).all()


@both_kinds
def test_row_has_the_same_result_alone_and_among_others(kind: str) -> None:
    problem = make_problem(20, 8, 2, 64, 0.5)
    alone = Problem(
        problem.x[7:8], problem.experts[7:8], problem.codes, problem.scales, problem.bias, problem.group_size
    )
    assert torch.equal(run(kind, alone)[0], run(kind, problem)[7])


@both_kinds
def test_second_expert_may_start_beyond_two_gib(kind: str) -> None:
    out, grid = 2**25 + 16, {"gemv": (1, 1), "gemm": (1, 2)}[kind]
    codes = torch.from_numpy(np.zeros((2, out, 64), np.uint8))  # pages that nobody touches take no memory
    scales, bias = torch.from_numpy(np.zeros((2, 1, out), np.float16)), torch.from_numpy(np.zeros((2, out), np.float32))
    codes[1, :16], scales[1, 0, :16] = 0x99, 1  # every weight of the second expert is 1
    y, x = torch.from_numpy(np.zeros((1, out), np.float16)), torch.ones((1, 128), dtype=torch.float16)
    experts, order, count = (torch.tensor([value], dtype=torch.int32) for value in (1, 0, 0))
    blocks = {"STAGES": 2} if kind == "gemv" else {"BLOCK_ROWS": 16}
    kernel = getattr(routed, f"routed_{kind}")
    kernel[grid](
        x, experts, order, count, codes, scales, bias, 1, out, 1, y, GROUP_SIZE=128, BLOCK_COLUMNS=16, **blocks
    )
    assert (y[0, :16] == 128).all()
    assert not y[0, 16:32].any()


@pytest.mark.slow
@both_kinds
@both_dtypes
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("groups", [1, 3, 5])
@pytest.mark.parametrize("tokens", [1, 37, 70])
@pytest.mark.parametrize("vision", [0, 0.1, 1])
def test_kernel_equals_the_loops_at_more_shapes(
    kind: str, dtype: torch.dtype, group_size: int, groups: int, tokens: int, vision: float
) -> None:
    problem = make_problem(tokens, 45, groups, group_size, vision, dtype)
    assert_rounded_once(run(kind, problem, block_rows=64, block_columns=16), problem)

"""The script that checks and times the routed kernels on a GPU, here with a small layer, Triton's interpreter and a
clock that is told what to say: it sees wrong kernels, and its verdicts and its choice follow from the times."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_bundle import ROOT, run_process
from vlmdeploy.kernels.block_shapes import TABLE, BlockShape, shapes_from, shapes_of
from vlmdeploy.kernels.launch import Route

sys.path.append(str(ROOT / "benchmarks"))
import routed_kernel

CPU = torch.device("cpu")
TINY = routed_kernel.layer("tiny", 128, 24, 128)


def bench(clock: routed_kernel.Clock = lambda work: 1e-3) -> routed_kernel.Bench:
    return routed_kernel.Bench(CPU, clock, 1e9, shapes_of(87))


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts bfloat16 off where a GPU rounds it: twice the error."""
    monkeypatch.setattr(routed_kernel, "ROUNDING", {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7})
    monkeypatch.setattr(routed_kernel, "CHECKED_ROWS", (1, 20))


def test_right_kernels_are_found_right() -> None:
    errors = list(routed_kernel.check([TINY], bench()))
    assert len(errors) == 4 * 2 * 2 * 3
    assert all(0 < error["error"] <= 1 for error in errors)


def test_wrong_weights_are_found_wrong() -> None:
    case = routed_kernel.make_case(routed_kernel.random_weights(128, 24, CPU), 4, 0.5)
    shapes = shapes_of(87)
    assert routed_kernel.worst_error(case, shapes) <= 1
    swapped = Route(1 - case.route.experts, case.route.order, case.route.language_count)  # the gemm looks at the order
    assert routed_kernel.worst_error(replace(case, route=swapped), replace(shapes, gemv_up_to_tokens=0)) > 1


def test_fp16_pair_computes_the_same() -> None:
    for share in (0.0, 0.5, 1.0):
        case = routed_kernel.make_case(routed_kernel.random_weights(128, 24, CPU), 6, share)
        assert routed_kernel.worst_error(case, shapes_of(87)) <= 1
        assert torch.allclose(routed_kernel.fp16_pair(case)(), case.y, atol=0.01)


def test_bytes_are_those_of_the_experts_that_have_rows() -> None:
    weights = routed_kernel.random_weights(128, 24, CPU)
    one_expert = 24 * 64 + 24 * 2 + 24 * 4
    rows = 4 * (128 + 24) * 2
    assert [routed_kernel.make_case(weights, 4, share).num_bytes - rows for share in (0.0, 0.5, 1.0)] == [
        one_expert, 2 * one_expert, one_expert,
    ]  # fmt: skip


def test_shares_that_mean_the_same_rows_are_measured_once() -> None:
    assert routed_kernel.shares_of(1) == [0.0, 1.0]
    assert routed_kernel.shares_of(2) == [0.0, 0.5, 1.0]
    assert routed_kernel.shares_of(100) == [0.0, 0.1, 0.5, 0.9, 1.0]


def point(rows: int, share: float, kernel: float, pair: float) -> dict[str, Any]:
    times = {"kernel_s": kernel, "pair_s": pair, "bound_s": 1.0}
    return {"layer": "tiny", "rows": rows, "share": share, "flops": 1} | times


def test_targets_are_met_or_missed() -> None:
    lines = routed_kernel.verdicts([point(1, 0.0, 1.25, 3.0), point(2306, 0.5, 1.0, 0.9)])
    assert lines == [
        "- tiny: 0.80 of the memory bound, decode, target 0.8: met",
        "- tiny: 2.40 times the fp16 pair, decode, target 3.0: missed",
        "- tiny: 0.90 of its FLOP rate, prefill, target 0.8: met",
    ]


def test_page_has_a_row_for_each_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(routed_kernel, "PREFILL_ROWS", 4)
    assert routed_kernel.run(bench(), "Fake GPU", [TINY], tmp_path, rows=(1, 4)) == 0
    page = (tmp_path / "routed_kernel_fake_gpu.md").read_text()
    assert "(right)" in page
    assert len([line for line in page.splitlines() if line.startswith("| tiny | ")]) == 2 + 3
    assert "- tiny: 1.00 times the fp16 pair, decode, target 3.0: missed" in capsys.readouterr().out


def told_times(seconds: Callable[[str, BlockShape, int], float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a layer take what a function of kernel, shape and rows says."""

    def layer_seconds(entry: Any, rows: int, share: float, shapes: Any, bench: Any) -> float:
        kind, shape = shapes.of(rows)
        return seconds(kind, shape, rows)

    monkeypatch.setattr(routed_kernel, "layer_seconds", layer_seconds)


def test_tuning_takes_the_fastest_shapes_and_where_they_cross(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(kind: str, shape: BlockShape, rows: int) -> float:
        if kind == "gemv":
            return rows * (1 + abs(shape.block_columns - 8))
        if shape.block_rows == 16:
            return 3.5 + (rows - 1) // 16 + shape.num_warps
        return 9 + shape.block_columns / 1000

    told_times(seconds, monkeypatch)
    candidates = (routed_kernel.GEMVS, routed_kernel.SMALL_GEMMS, routed_kernel.LARGE_GEMMS)
    found = routed_kernel.tune(TINY, bench(), candidates, 64)
    assert (found.gemv.block_columns, found.small_gemm.num_warps, found.large_gemm.block_columns) == (8, 2, 64)
    assert (found.gemv_up_to_tokens, found.small_gemm_up_to_tokens) == (5, 64)


def test_layer_takes_as_long_as_its_linears() -> None:
    launched: list[float] = []

    def clock(work: Callable[[], object]) -> float:
        work()
        launched.append(1.0)
        return 2.0

    assert routed_kernel.layer_seconds(TINY, 1, 0.0, shapes_of(87), bench(clock)) == 8.0
    assert len(launched) == 4


def test_shapes_beyond_what_a_plugin_may_launch_are_not_tried() -> None:
    assert routed_kernel.fits(BlockShape(1, 32, 4, 4)) and routed_kernel.fits(BlockShape(16, 64, 4, 4))
    assert not routed_kernel.fits(BlockShape(1, 64, 4, 5))


def test_tuned_shapes_are_those_of_one_architecture(tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    shutil.copyfile(TABLE, table)
    tuned = replace(shapes_of(90), gemv_up_to_tokens=7)
    routed_kernel.write_shapes(90, tuned, table)
    content = json.loads(table.read_text())
    assert shapes_from(content["shapes"][content["architectures"]["90"]]) == tuned
    assert content["architectures"]["80"] == "datacenter"
    assert shapes_from(content["shapes"]["datacenter"]) == shapes_of(80)


def test_without_a_gpu_it_says_so_and_measures_nothing(tmp_path: Path) -> None:
    done = run_process("benchmarks/routed_kernel.py", "--out", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "There is no CUDA device here: nothing was run, nothing was measured.\n"
    assert not list(tmp_path.iterdir())

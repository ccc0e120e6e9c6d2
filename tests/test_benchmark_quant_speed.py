"""Story test: the speed benchmark of quantization runs on a small linear, without GPTQModel, and says so."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "quant_speed.py"


@pytest.mark.slow
def test_quick_run_prints_and_writes_its_tables(tmp_path: Path) -> None:
    options = ["--quick", "--rounds", "2", "--gptqmodel", str(tmp_path / "missing"), "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=True)
    tables = [line for line in done.stdout.splitlines() if line.startswith("|") and "---" not in line]
    firsts = [line.split(" | ")[0].removeprefix("| ") for line in tables]
    assert firsts == [
        "linear (in → out)", "small 256 → 384", "error on new tokens", "small",
        "peak memory of one process, GB", "small", "Hessian, width", "256",
    ]  # fmt: skip
    assert "GPTQModel is not installed" in done.stdout
    assert "Extrapolated" not in done.stdout
    rtn, ours, one_sweep = (float(cell) for cell in tables[3].strip("| ").split(" | ")[1:])
    assert one_sweep < ours < rtn
    assert (tmp_path / "quant_speed.md").read_text(encoding="utf-8") == done.stdout

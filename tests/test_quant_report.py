"""Regression tests of the report beside a quantized checkpoint: what a stranger wrote into it is typed and shown."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from vlmdeploy.errors import ConfigError
from vlmdeploy.quant.quantization_report import REPORT_NAME, read_report
from vlmdeploy.quant.quantization_table import error_rows

LINEAR = {"name": "decoder.layers.0.language.qkv.weight", "bits": 4, "group_size": 16, "method": "gptq"}
REPORT: dict[str, Any] = {
    "settings": {"parts": {}, "hessian": "routed", "quality": "default"},
    "calibration": {"data": "x", "samples": 1, "experts": []},
    "size_bytes": 1,
    "linears": [LINEAR],
}


def test_a_linear_without_its_damping_is_shown(tmp_path: Path) -> None:
    """Its line in `inspect` was a TypeError."""
    (tmp_path / REPORT_NAME).write_text(json.dumps(REPORT))
    assert [row[2] for row in error_rows(read_report(tmp_path), each=True)] == ["gptq"]


@pytest.mark.parametrize("change", [{"size_bytes": 10**400}, {"linears": [LINEAR | {"tokens": 10**400}]}])
def test_a_count_beyond_any_is_told(tmp_path: Path, change: dict[str, Any]) -> None:
    """Its mean and its megabytes were OverflowErrors."""
    (tmp_path / REPORT_NAME).write_text(json.dumps(REPORT | change))
    with pytest.raises(
        ConfigError, match=rf"{REPORT_NAME}: damaged \(.* is 1000.*, expected a whole number below 9\.2e18"
    ):
        read_report(tmp_path)


def test_a_report_larger_than_any_is_not_parsed(tmp_path: Path) -> None:
    """The linears of a report of 60 MB, listed one by one, took minutes and all memory."""
    (tmp_path / REPORT_NAME).write_text(json.dumps(REPORT) + " " * (8 << 20))
    with pytest.raises(ConfigError, match=rf"{REPORT_NAME}: damaged \(has 8\.4 MB, at most 8\.4 MB are read"):
        read_report(tmp_path)


def test_a_report_that_is_no_file_or_elsewhere_is_told(tmp_path: Path) -> None:
    """A FIFO counted as absent, so a folder was not known as quantized; a link was followed to any file."""
    folder = tmp_path / "folder"
    folder.mkdir()
    os.mkfifo(folder / REPORT_NAME)
    with pytest.raises(ConfigError, match=f"{REPORT_NAME}: damaged .is a FIFO or pipe"):
        read_report(folder)
    (folder / REPORT_NAME).unlink()
    (tmp_path / "secret").write_text(json.dumps(REPORT))
    (folder / REPORT_NAME).symlink_to(tmp_path / "secret")
    with pytest.raises(ConfigError, match=f"{REPORT_NAME}: leads out of its folder"):
        read_report(folder)
    assert read_report(folder, follow_links=True)["size_bytes"] == 1

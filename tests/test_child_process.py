"""Regression tests of child interpreters: they run our code, whatever lies in the folder that a command is given in."""

import subprocess
from pathlib import Path

import pytest

from vlmdeploy.child_process import child_process


def test_a_child_imports_nothing_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A json.py beside a downloaded data set was run by every sweep that was started there."""
    (tmp_path / "json.py").write_text("from pathlib import Path\nPath('mark').touch()\n")
    monkeypatch.chdir(tmp_path)
    with child_process("vlmdeploy.sweep.task", errors=subprocess.PIPE) as process:
        _, errors = process.communicate(b"no task")
    assert process.returncode != 0 and b"json" in errors, "it came as far as reading its task"
    assert not (tmp_path / "mark").exists()

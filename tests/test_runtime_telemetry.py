"""Regression: what opening and running a bundle leaves behind and has going on beside the answer: nothing of others."""

import ast
from pathlib import Path

import pytest

from tests.test_imports import imports_of
from tests.tiny_bundle import ROOT, run_process

# With one thread each, whoever is left beside the main thread is neither numpy's nor a session's.
RUN = """
import os, sys, vlmdeploy
session = vlmdeploy.open(sys.argv[1], threads=1)
assert len(session.generate_ids([1, 70, 71], max_new_tokens=3))
opened = [os.readlink(entry) for entry in os.scandir("/proc/self/fd") if os.path.lexists(entry)]
print(len(os.listdir("/proc/self/task")), *(name for name in opened if name.startswith("socket:")))
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads and sockets in /proc")
def test_nothing_reports_that_a_bundle_was_run(
    answering_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime kept a device id and events in the user's cache folder, and a thread looked for a host to send them
    to: whether it has found one by now is a matter of time, but without a thread nobody ever will."""
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    home = tmp_path / "home"
    folders = {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache")}
    done = run_process("-c", RUN, answering_bundle, OPENBLAS_NUM_THREADS="1", **folders)
    assert done.stdout == "1\n", f"threads and sockets: {done.stdout}{done.stderr}"
    left = [str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()]
    assert [name for name in left if not name.startswith(".cache/vlmdeploy/")] == []


def test_what_the_user_chose_stays() -> None:
    code = "from vlmdeploy.runtime.backends.ort import import_onnxruntime as load; load(); import os; print(os.environ"
    assert run_process("-c", f'{code}["ORT_DISABLE_TELEMETRY"])', ORT_DISABLE_TELEMETRY="0").stdout == "0\n"


def test_onnxruntime_is_imported_in_one_place() -> None:
    """Whoever imports it first decides."""
    found = [
        path.relative_to(ROOT)
        for folder in ("vlmdeploy", "tests", "examples", "benchmarks", "plugins")
        for path in (ROOT / folder).rglob("*.py")
        if "onnxruntime" in {each.top for each in imports_of(ast.parse(path.read_text(encoding="utf-8")))}
    ]
    assert found == [Path("vlmdeploy/runtime/backends/ort.py")]

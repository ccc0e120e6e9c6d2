"""Contract tests: signals that ask a process to end become one exception where it can be raised, and only there."""

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from tests.processes import has_ended, wait_until
from tests.tiny_bundle import ROOT, run_process
from vlmdeploy import child_process, stopping
from vlmdeploy.stopping import Stopped, ended_by_signals, stopped_by_signals, undisturbed

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
pytestmark = pytest.mark.usefixtures("own_signals")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A further signal counts at once."""
    monkeypatch.setattr(stopping, "PATIENCE_S", 0.0)


def actions() -> list[object]:
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_is_raised_and_noted(number: signal.Signals) -> None:
    with pytest.raises(Stopped), stopped_by_signals() as came:
        os.kill(os.getpid(), number)
    assert came == [number] and actions() == [signal.SIG_IGN] * 3, "a process that ends listens no more"


def test_block_without_signals_leaves_everything_as_it_was() -> None:
    before, hook = actions(), sys.unraisablehook
    with stopped_by_signals() as came:
        assert actions() != before
    assert (came, actions(), sys.unraisablehook) == ([], before, hook)


def test_ignored_signals_stay_ignored() -> None:
    """`nohup` ignores SIGHUP, a shell Ctrl-C of what it starts in the background."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    with stopped_by_signals() as came:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGTERM)
    assert came == []


def test_library_use_in_a_thread_installs_nothing() -> None:
    before, found = actions(), []

    def work() -> None:
        with stopped_by_signals():
            found.extend(actions())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == before


def test_one_of_many_processes_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun ends the others by SIGTERM; an exception would wait until they get what the failed one never sends."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with stopped_by_signals():
        assert actions()[1:] == [signal.SIG_DFL] * 2 and callable(actions()[0])


@pytest.mark.usefixtures("impatient")
def test_further_signals_do_not_disturb_the_clean_up() -> None:
    """The second Ctrl-C left a staging folder half removed."""
    done = []
    with pytest.raises(Stopped), stopped_by_signals():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            for number in SIGNALS:
                os.kill(os.getpid(), number)
            done.append("cleaned up")
    assert done


@pytest.mark.usefixtures("impatient")
def test_signal_that_a_library_swallowed_can_be_sent_again() -> None:
    with pytest.raises(Stopped), stopped_by_signals() as came:
        with suppress(BaseException):
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert came == [signal.SIGINT] * 2


def test_signal_that_ends_a_destructor_is_not_lost() -> None:
    """Python prints "Exception ignored in" then, and the command went on."""

    class Held:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped), stopped_by_signals() as came:
        held = Held()
        del held
        wait_until(lambda: len(came) > 1)
        raise AssertionError("it went on")


def test_signal_waits_for_the_end_of_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch imports modules from compiled code, which aborts the process when an exception comes through."""
    (tmp_path / "interrupted_module.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\ndone = 1")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Stopped), stopped_by_signals() as came:
        import interrupted_module  # type: ignore[import-not-found]

        assert interrupted_module.done
        wait_until(lambda: len(came) > 1)
        raise AssertionError("it went on")
    assert "interrupted_module" in sys.modules


def test_block_that_must_be_whole_is_finished_first() -> None:
    done = []
    with pytest.raises(Stopped), stopped_by_signals(), undisturbed():
        os.kill(os.getpid(), signal.SIGTERM)
        with undisturbed():
            done.append("inner")
        done.append("outer")
    assert done == ["inner", "outer"]


CHILD = """
import os, signal
from vlmdeploy.stopping import ended_by_signals
with ended_by_signals():
    try:
        os.kill(os.getpid(), signal.{number})
    finally:
        print("cleaned up", flush=True)
        {ending}
print("went on")
"""


@pytest.mark.parametrize("number", [number.name for number in SIGNALS])
@pytest.mark.parametrize("ending", ["pass", "raise ValueError('of a compiled library')"])
def test_child_cleans_up_and_ends_by_the_signal(number: str, ending: str) -> None:
    done = run_process("-c", CHILD.format(number=number, ending=ending))
    assert (done.returncode, done.stdout, done.stderr) == (-signal.Signals[number], "cleaned up\n", "")


def test_other_errors_of_a_child_pass() -> None:
    with pytest.raises(ValueError, match="our own"), ended_by_signals():
        raise ValueError("our own")


# Child processes

PARENT = """
import sys
from vlmdeploy import child_process
sys.path.insert(0, {folder!r})
child_process.GRACE_S = 0.1
with child_process.child_process("endless") as process:
    process.stdout.readline()
    print(process.pid, flush=True)
    process.wait()
"""
ENDLESS = "import signal, time\ndef main():\n    {first}\n    print(flush=True)\n    time.sleep(1000)\n"


@pytest.mark.parametrize(("first", "status"), [
    ("pass", -signal.SIGTERM), ("signal.signal(signal.SIGTERM, signal.SIG_IGN)", -signal.SIGKILL),
])  # fmt: skip
def test_child_ends_with_an_error_of_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, status: int
) -> None:
    """It is asked to, so that it can clean up, and then made to."""
    (tmp_path / "endless.py").write_text(ENDLESS.format(first=first))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(child_process, "GRACE_S", 0.1)
    with pytest.raises(ZeroDivisionError), child_process.child_process("endless") as process:
        assert process.stdout is not None
        process.stdout.readline()
        raise ZeroDivisionError
    assert process.returncode == status


STARTING = {
    "child process": """
from vlmdeploy.child_process import child_process
try:
    with child_process("vlmdeploy.bench.measure") as process:
        process.wait()
except KeyboardInterrupt:
    pass
""",
    "workers": """
from vlmdeploy.train.workers import run_workers
try:
    run_workers(print, (), 2, lambda: None)
except KeyboardInterrupt:
    pass
""",
}
SLOW_START = """
import signal, sys
if "vlmdeploy.child_process" in sys.orig_argv or "--multiprocessing-fork" in sys.orig_argv:
    print("hears" if signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set() else "deaf", file=sys.stderr, flush=True)
    signal.pause()
"""


@pytest.mark.parametrize("kind", ["child process", pytest.param("workers", marks=pytest.mark.slow)])
def test_ctrl_c_while_a_child_starts_is_not_told_by_it(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The terminal sends it to both, and Python shows what it was importing."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_START)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    command, pipe = [sys.executable, "-c", STARTING[kind]], subprocess.PIPE
    with subprocess.Popen(
        command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as process:  # fmt: skip
        assert process.stderr is not None
        assert process.stderr.readline() == "deaf\n"
        os.killpg(process.pid, signal.SIGINT)
        assert process.communicate(timeout=60)[1].replace("deaf\n", "") == ""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("first", ["pass", "signal.signal(signal.SIGTERM, signal.SIG_IGN)"], ids=["polite", "deaf"])
def test_child_never_outlives_its_parent(tmp_path: Path, sent: signal.Signals, first: str) -> None:
    (tmp_path / "endless.py").write_text(ENDLESS.format(first=first))
    command = [sys.executable, "-c", PARENT.format(folder=str(tmp_path))]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.send_signal(sent)
        process.communicate(timeout=60)
    wait_until(lambda: has_ended(child))

"""Contract tests: what libraries warn and log is one printable line on stderr, and broken standard streams end nothing
and print nothing."""

import errno
import io
import logging
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.tiny_bundle import ROOT, run_cli, run_process
from vlmdeploy.cli.console import print_answer, print_rows
from vlmdeploy.runtime.backends.ort import import_onnxruntime, session_options
from vlmdeploy.standard_streams import lines_on_stderr, logged, say

SHOWN = "decoder"  # in the help and in the description of a bundle


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> "Told":
    return Told(capsys)


class Told:
    """The lines on stderr so far."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def lines(self) -> list[str]:
        return self._capsys.readouterr().err.splitlines()


# Warnings and log records


def test_warning_of_a_library_is_one_line(told: Told) -> None:
    """Python shows file, line and source too."""
    with lines_on_stderr(), warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.warn("the first line\n  and \x1b[31mthe second", stacklevel=1)
    assert told.lines() == [r"Warning: the first line and \x1b[31mthe second"]


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning, ResourceWarning])
def test_warning_for_developers_is_not_shown(category: type[Warning], told: Told) -> None:
    with lines_on_stderr(), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("spam is going to be called eggs", category, stacklevel=1)
    assert told.lines() == []


@pytest.mark.parametrize("name", ["vlmdeploy", "some.library"])
def test_log_record_is_one_line_and_said_once(name: str, told: Told) -> None:
    before = list(logging.getLogger().handlers)
    with lines_on_stderr():
        for place in ("there", "there", "here\nand \x9b"):
            logging.getLogger(name).warning("no cache %s", place)
        logging.getLogger(name).info("nothing of interest")
    assert told.lines() == ["Warning: no cache there", r"Warning: no cache here and \x9b"]
    assert logging.getLogger().handlers == before


def test_matplotlib_does_not_tell_where_its_cache_is(told: Told) -> None:
    """Without a home it recommended to set MPLCONFIGDIR."""
    with lines_on_stderr():
        logging.getLogger("matplotlib").warning("Matplotlib created a temporary cache directory")
    assert told.lines() == []


def test_lines_of_a_training_run_are_printable(told: Told) -> None:
    logger = logging.getLogger("a.training.run")
    logger.setLevel(logging.INFO)
    with logged(logger, "at last: %(message)s", logging.INFO):
        logger.info("loss\n0.5")
    assert told.lines() == ["at last: loss 0.5"]


def test_onnxruntime_logs_nothing_beside_its_error(capfd: pytest.CaptureFixture[str]) -> None:
    """Its own coloured lines, with files and numbers of C++, stood before ours."""
    value = onnx.helper.make_tensor_value_info
    gather = onnx.helper.make_node("Gather", ["table", "place"], ["row"])
    inputs = [value("table", onnx.TensorProto.FLOAT, [2]), value("place", onnx.TensorProto.INT64, [1])]
    graph = onnx.helper.make_graph([gather], "g", inputs, [value("row", onnx.TensorProto.FLOAT, [1])])
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 21)])
    ort = import_onnxruntime()
    session = ort.InferenceSession(model.SerializeToString(), session_options(ort, 1), ["CPUExecutionProvider"])
    with pytest.raises(Exception, match="out of data bounds"):
        session.run(None, {"table": np.zeros(2, np.float32), "place": np.array([7])})
    assert capfd.readouterr() == ("", "")


# Streams that fail


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_stderr_that_fails_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal of a run may be gone long before the run is done."""
    monkeypatch.setattr(sys, "stderr", Full())
    with lines_on_stderr():
        say("nobody reads this")
        print("nor this", file=sys.stderr, flush=True)
    assert isinstance(sys.stderr, Full)


FULL = (1, "", "Error: standard output cannot be written: No space left on device\n")
UNREAD = (141, "", "")
BROKEN = [
    ("inspect {bundle} --json", ">/dev/full", FULL),
    ("inspect {bundle} --json", "| true", UNREAD),
    ("inspect {bundle} --json", ">&-", (0, "", "")),
    ("inspect {bundle} --json", "2>&-", (0, SHOWN, "")),
    ("inspect {bundle} --json", "2>/dev/full", (0, SHOWN, "")),
    ("inspect {bundle}", ">/dev/full", FULL),
    ("inspect {bundle}", "<&- >&- 2>&-", (0, "", "")),
    ("plan --help", ">/dev/full", FULL),
    ("plan --help", "| true", UNREAD),
    ("--version", ">/dev/full", FULL),
]


def in_shell(command: str, redirected: str, *options: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `vlmdeploy COMMAND` in bash, which says 128 + signal."""
    line = f"{sys.executable} {' '.join(options)} -m vlmdeploy {command} {redirected}; exit ${{PIPESTATUS[0]}}"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, env=buffered, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(("command", "redirected", "expected"), BROKEN)
def test_broken_stream_is_one_line_or_none(
    answering_bundle: Path, command: str, redirected: str, expected: tuple[int, str, str]
) -> None:
    """It was a traceback, "Exception ignored in" or exit status 120."""
    status, stdout, stderr = in_shell(command.format(bundle=answering_bundle), redirected)
    assert (status, stderr) == (expected[0], expected[2])
    assert (SHOWN in stdout) == (SHOWN in expected[1])


@pytest.mark.parametrize("redirected", ["2>/dev/full", "2>&-"])
@pytest.mark.parametrize(("command", "status"), [("verify nowhere", 1), ("inspect", 2)])
def test_error_that_cannot_be_told_keeps_its_status(command: str, status: int, redirected: str) -> None:
    assert in_shell(command, redirected) == (status, "", "")


def test_output_of_an_unbuffered_interpreter_fails_alike(answering_bundle: Path) -> None:
    assert in_shell(f"inspect {answering_bundle}", ">/dev/full", "-u") == FULL


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """What a library printed to stderr would have ended in a bundle's file."""
    (tmp_path / "script.py").write_text(f"""
import os
from vlmdeploy.standard_streams import open_missing_streams
open_missing_streams()
with open({str(tmp_path / "file")!r}, "w") as file:
    os.write(1, b"a library's words")
    os.write(2, b"a library's warning")
    assert file.fileno() > 2 and all(os.get_inheritable(number) for number in range(3))
""")
    command = f"{sys.executable} {tmp_path / 'script.py'} <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode == 0
    assert (tmp_path / "file").read_text() == ""


# What comes from outside


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    """A folder's name could recolour the terminal, or take back what was printed before."""
    evil = "\x1b[31mred\x1b]0;title\x07\x9b\u202e"
    for command in (["verify", tmp_path / evil], ["verify", f"--{evil}"], ["plan", "--family", evil, "--device", "x"]):
        result = run_cli(*command)
        assert result.exit_code in (1, 2) and result.stdout == ""
        assert not set("\x1b\x07\x9b\u202e") & set(result.stderr), result.stderr


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_answer_on_a_terminal_has_no_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may say anything; in a file or a pipe it is kept as it is."""
    for stream, expected in ((Terminal(), "a\n\tb\\x1b[2J"), (io.StringIO(), "a\n\tb\x1b[2J")):
        monkeypatch.setattr(sys, "stdout", stream)
        print_answer("a\n\tb\x1b[2J")
        assert stream.getvalue() == expected


@pytest.mark.parametrize("environment", [
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "xx_YY.nothing", "TERM": "dumb", "COLUMNS": "0"}, {"TERM": "", "COLUMNS": "nine"},
])  # fmt: skip
def test_locale_and_terminal_do_not_matter(answering_bundle: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    folder = Path(shutil.copytree(answering_bundle, tmp_path / "Bündel 漢"))
    done = run_process("-m", "vlmdeploy", "inspect", folder, **environment)
    assert (done.returncode, done.stderr) == (0, "") and SHOWN in done.stdout


def test_name_that_is_not_utf_8_is_shown_escaped(tmp_path: Path) -> None:
    done = run_process("-m", "vlmdeploy", "verify", os.fsdecode(bytes(tmp_path) + b"/\xff"), PYTHONIOENCODING="utf-8")
    assert done.returncode == 1 and "\\udcff: no such folder" in done.stderr


def test_rows_of_other_people_stay_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line break in a title or a path made two lines of one."""
    monkeypatch.setattr(sys, "stdout", shown := io.StringIO())
    print_rows("a\nb", ["c\x1b"], [["d\ne"]])
    assert "\x1b" not in shown.getvalue() and "d\ne" not in shown.getvalue()
    assert len(shown.getvalue().splitlines()) == 6

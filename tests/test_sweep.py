"""Contract tests of `vlmdeploy sweep`: points that work, fail, are killed, go on; settings that do not fit what is
there; and Ray, a made-up one quickly and the real one slowly.

Quick tests do the tasks in this process and make the measurements up; slow ones run the command as it is.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.calibration_data import messages, write_calibration_checkpoint, write_calibration_data, write_rows
from tests.gptq_checkpoint import write_gptq_checkpoint
from tests.report_example import model_result as example_result
from tests.tiny_bundle import ROOT, export, only_error_line, only_json_document, run_cli
from vlmdeploy.artifact import locked
from vlmdeploy.errors import BackendError, ConfigError, DataError, ExportError, VlmdeployError
from vlmdeploy.report import evaluator
from vlmdeploy.report import run as report_run
from vlmdeploy.report.document import read_report_json
from vlmdeploy.report.evaluator import Measured
from vlmdeploy.report.opened_models import OpenOptions
from vlmdeploy.report.run import ReportOptions, make_report
from vlmdeploy.score import intervals
from vlmdeploy.sweep import runners
from vlmdeploy.sweep.grid import Point
from vlmdeploy.sweep.run import SweepOptions, SweepResult, run_sweep
from vlmdeploy.sweep.task import Calibration, Shared, Task, perform, run_task

TWO_POINTS = 'algorithm = "rtn"\nbits = [4, 8]\ngroup = 16'
ONE_POINT = 'algorithm = "rtn"\ngroup = 16'
NAMES = ["rtn_int4_g16", "rtn_int8_g16"]
FAILS = '\n[[point]]\nname = "bad"\nalgorithm = "rtn"\nprovider = "cuda"\nkv = "fp32"'  # that provider's cache is fp16
FAST = ("--threads", 1, "--max-new-tokens", 3, "--new-tokens", 2, "--repeat", 1)
ROWS: list[dict[str, Any] | str] = [
    *({"image": f"{n}.png", "messages": messages(f"What is {n}?", f"a {n}"), "task": "vqa"} for n in range(3)),
    {"messages": messages("Is a cup blue?", "yes"), "task": "yes_no"},
]
slow = pytest.mark.slow
Sweep = Callable[..., SweepResult]


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_calibration_checkpoint(tmp_path_factory.mktemp("sweep") / "ckpt", context_tokens=256)


@pytest.fixture(scope="module")
def data(ckpt: Path) -> Path:
    return write_rows(ckpt.parent / "data", ROWS)


@pytest.fixture(scope="module")
def calib(ckpt: Path) -> Path:
    return write_calibration_data(ckpt.parent / "calib")


@dataclass
class Here:
    """Does tasks in this process; `fails` holds what to say of a point instead."""

    done: list[str] = field(default_factory=list)
    fails: dict[str, str] = field(default_factory=dict)

    def __call__(self, task: Task) -> str | None:
        self.done.append(task.point.checkpoint if task.kind == "quantize" else task.point.name)
        if task.point.name in self.fails:
            return self.fails[task.point.name]
        try:
            perform(Task.read(task.as_json()))
        except VlmdeployError as error:
            return str(error)
        return None


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Here:
    """Tasks in this process, made-up measurements, no page, few resamples."""
    here = Here()
    monkeypatch.setattr(intervals, "NUM_RESAMPLES", 100)
    monkeypatch.setattr(runners, "run_task", here)
    monkeypatch.setattr(evaluator, "measure_in_process", lambda *_: example_result(1, "made up").measurement)
    monkeypatch.setattr(report_run, "write_report", write_json_only)
    return here


def write_json_only(report: Any, folder: Path) -> list[Path]:
    for name in ("report.json", "report.html"):
        (folder / name).write_text(f"{report.title}\n")
    return []


def options_for(ckpt: Path, data: Path, out: Path, grid: str, **options: Any) -> SweepOptions:
    """Short answers and one thread; the grid's file lies beside the output."""
    path = out.with_name(f"{out.name}.toml")
    path.write_text(grid)
    tokenizer = options.pop("tokenizer", None)
    opened = OpenOptions(tokenizer=tokenizer, max_new_tokens=3, threads=1)
    asked = ReportOptions((), data, out, ckpt, asked=opened, measured=Measured(new_tokens=2, repeats=1))
    calibration = Calibration(tokenizer=tokenizer)
    defaults: dict[str, Any] = {"calibration": calibration, "threads": 1}
    return SweepOptions(ckpt, path, out, asked, **defaults | options)


@pytest.fixture
def sweep(ckpt: Path, data: Path, tmp_path: Path, here: Here) -> Sweep:
    """Runs a sweep of a grid into tmp_path / "out", unless an option says otherwise."""

    def run(grid: str, **options: Any) -> SweepResult:
        return run_sweep(options_for(**({"ckpt": ckpt, "data": data, "out": tmp_path / "out"} | options), grid=grid))

    return run


def times_of(folder: Path) -> dict[str, int]:
    """When every file below was written."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


def named(result: SweepResult) -> list[str]:
    return [each.subject.name for each in result.report.models]


# Points


def test_a_sweep_reports_what_exporting_and_asking_by_hand_do(
    ckpt: Path, data: Path, tmp_path: Path, here: Here, sweep: Sweep
) -> None:
    result = sweep(TWO_POINTS)
    assert (named(result), result.failures, here.done) == (["ckpt", *NAMES], (), NAMES)
    bundle = export(ckpt, tmp_path / NAMES[0], precisions={"decoder": "int4"}, target="ort-int4", group=16)
    opened = OpenOptions(max_new_tokens=3, threads=1)
    asked = ReportOptions((bundle,), data, tmp_path / "by_hand", ckpt, asked=opened)
    by_hand, swept = make_report(asked).models[1], result.report.models[1]
    assert (swept.agreement, swept.text_only) == (by_hand.agreement, by_hand.text_only)
    assert (swept.tasks, swept.equal_answers, swept.regressions) == (
        by_hand.tasks, by_hand.equal_answers, by_hand.regressions,
    )  # fmt: skip
    assert swept.agreement is not None and swept.agreement.kl.value > 1e-5


def test_a_point_that_fails_is_marked_and_the_others_are_there(sweep: Sweep) -> None:
    result = sweep(TWO_POINTS + FAILS)
    assert named(result) == ["ckpt", *NAMES] and len(result.points) == 3
    assert [failure.name for failure in result.failures] == ["bad"] and result.report.failures == result.failures
    assert result.failures[0].error == "--kv is fp32, but the cache of ort-int4 on this provider is fp16"


def test_points_of_a_checkpoint_that_cannot_be_made_fail_with_its_reason(
    tmp_path: Path, here: Here, sweep: Sweep
) -> None:
    texts = write_calibration_data(tmp_path / "texts", num_pictures=0)
    grid = 'algorithm = ["routed", "rtn"]\nembedding = ["int8", "fp16"]\ngroup = 16'
    result = sweep(grid, calib=texts)
    assert named(result)[1:] == ["rtn_int4_g16_embedding-int8", "rtn_int4_g16_embedding-fp16"]
    assert [failure.name for failure in result.failures] == [
        "routed_int4_g16_embedding-int8", "routed_int4_g16_embedding-fp16",
    ]  # fmt: skip
    assert len({failure.error for failure in result.failures}) == 1 and "vision" in result.failures[0].error
    assert here.done[0] == "routed_int4_g16" and len(here.done) == 3, "the checkpoint was tried once"


@slow
def test_calibrated_points_share_a_checkpoint(calib: Path, here: Here, sweep: Sweep) -> None:
    grid = 'algorithm = "routed"\ntarget = ["ort-int4"]\nembedding = ["int8", "fp16"]\ngroup = 16\nvision = "int8"'
    result = sweep(grid, calib=calib)
    assert here.done[0] == "routed_int4_g16_vision-int8" and len(here.done) == 3
    assert [model.subject.quantization for model in result.report.models] == ["none", "gptq", "gptq"]
    assert result.report.models[1].layer_errors is not None, "the bundle tells the errors of its linears"


def test_a_sweep_of_failures_alone_says_the_first(sweep: Sweep) -> None:
    with pytest.raises(ExportError, match="out: every point failed; the first: bad: --kv is fp32"):
        sweep(FAILS)


def test_progress_counts_checkpoints_and_points(
    calib: Path, ckpt: Path, data: Path, tmp_path: Path, here: Here
) -> None:
    told: list[tuple[str, int, int]] = []
    here.fails = {"routed_int4_g16": "no memory"}
    options = options_for(ckpt, data, tmp_path / "out", 'algorithm = ["routed", "rtn"]\ngroup = 16', calib=calib)
    run_sweep(options, lambda text, done, total: told.append((text, done, total)))
    assert [each for each in told if each[0].startswith(("quantized", "evaluated"))] == [
        ("quantized routed_int4_g16", 1, 3), ("evaluated rtn_int4_g16", 3, 3),
    ]  # fmt: skip


# Going on


def test_a_finished_sweep_asks_nothing_again(tmp_path: Path, sweep: Sweep) -> None:
    first = sweep(TWO_POINTS)
    before = {name: when for name, when in times_of(tmp_path / "out").items() if not name.startswith("report/")}
    assert sweep(TWO_POINTS).report.models == first.report.models
    after = {name: when for name, when in times_of(tmp_path / "out").items() if not name.startswith("report/")}
    assert {name for name in before if after[name] != before[name]} <= {"lock"} and after.keys() == before.keys()


def test_a_failed_point_is_tried_again_and_a_new_one_added(tmp_path: Path, here: Here, sweep: Sweep) -> None:
    here.fails = {NAMES[1]: "no memory"}
    first = sweep(TWO_POINTS)
    assert [failure.error for failure in first.failures] == ["no memory"]
    kept = times_of(tmp_path / "out" / "evaluations")
    here.fails = {}
    grown = 'algorithm = "rtn"\nbits = [3, 8, 4]\ngroup = 16'
    second = sweep(grown)
    assert named(second) == ["ckpt", "rtn_int3_g16", NAMES[1], NAMES[0]] and second.failures == ()
    assert kept.items() <= times_of(tmp_path / "out" / "evaluations").items()
    assert second.report.models[3] == first.report.models[1]


def test_other_questions_are_asked_of_the_same_bundles(tmp_path: Path, sweep: Sweep) -> None:
    sweep(ONE_POINT)
    bundles = times_of(tmp_path / "out" / "bundles")
    others = write_rows(tmp_path / "others", ROWS[:2])
    result = sweep(ONE_POINT, data=others)
    assert result.report.data.questions == {"vqa": 2} and times_of(tmp_path / "out" / "bundles") == bundles
    alone = sweep(ONE_POINT, data=others, out=tmp_path / "alone")
    assert [m.agreement for m in alone.report.models] == [m.agreement for m in result.report.models]


def test_another_checkpoint_is_another_sweep(ckpt: Path, tmp_path: Path, sweep: Sweep) -> None:
    own = Path(shutil.copytree(ckpt, tmp_path / "ckpt"))
    sweep(ONE_POINT, ckpt=own)
    with pytest.raises(ConfigError, match=r"out: holds a sweep whose ckpt is '.*/ckpt', now it is '.*': choose anoth"):
        sweep(ONE_POINT)
    shutil.rmtree(own)
    write_calibration_checkpoint(own, context_tokens=256, seed=5)
    with pytest.raises(ConfigError, match="out: holds a sweep whose ckpt_sha256 is"):
        sweep(ONE_POINT, ckpt=own)


def test_other_calibration_is_another_sweep(data: Path, calib: Path, sweep: Sweep) -> None:
    sweep(ONE_POINT, calib=calib)
    with pytest.raises(ConfigError, match=r"out: holds a sweep whose calib is '.*calib', now it is '.*data'"):
        sweep(ONE_POINT, calib=data)
    fewer = Calibration(samples=3)
    with pytest.raises(ConfigError, match=r"out: holds a sweep whose calibration is {'samples': '512'"):
        sweep(ONE_POINT, calib=calib, calibration=fewer)


def test_calibration_may_come_later_and_be_left_out_where_nothing_needs_it(
    data: Path, calib: Path, sweep: Sweep
) -> None:
    fewer = Calibration(samples=3)
    sweep(ONE_POINT)
    sweep(ONE_POINT, calib=calib, calibration=fewer)
    sweep(ONE_POINT)
    with pytest.raises(ConfigError, match="out: holds a sweep whose calib is"):
        sweep(ONE_POINT, calib=data)


@slow
def test_changed_calibration_data_fail_the_point(calib: Path, tmp_path: Path, sweep: Sweep) -> None:
    own = Path(shutil.copytree(calib, tmp_path / "calib"))
    grid = 'algorithm = ["routed", "rtn"]\ngroup = 16'
    assert sweep(grid, calib=own).failures == ()
    write_calibration_data(own, num_pictures=5)
    failures = sweep(grid, calib=own).failures
    assert [failure.name for failure in failures] == ["routed_int4_g16"] and "calibration" in failures[0].error


def test_a_name_does_not_change_its_meaning(sweep: Sweep) -> None:
    """The bundle made from the old settings was taken for the new ones."""
    point = '[[point]]\nname = "mine"\nalgorithm = "rtn"\ngroup = 16\nbits = {}'
    sweep(point.format(4))
    with pytest.raises(ConfigError, match='out: its point "mine" was made with bits 4, now it is 8: rename it'):
        sweep(point.format(8))


def test_a_name_that_was_never_made_is_free(sweep: Sweep) -> None:
    sweep(ONE_POINT + FAILS)
    mended = FAILS.replace('provider = "cuda"', "group = 16")
    assert sweep(ONE_POINT + mended).failures == ()


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b"\xff", b'{"ckpt": "a", "points": 4}', b'{"ckpt": "a", "points": {"a": 4}}', b"[" * 100_000],
)
def test_damaged_settings_are_named(tmp_path: Path, content: bytes, sweep: Sweep) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sweep.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"sweep\.json: is damaged"):
        sweep(ONE_POINT)


# What is refused before anything is done


def test_refused_options_leave_no_folder(ckpt: Path, tmp_path: Path, here: Here, sweep: Sweep) -> None:
    bundle, quantized = export(ckpt, tmp_path / "bundle"), write_gptq_checkpoint(tmp_path / "gptq")
    bare = Path(shutil.copytree(ckpt, tmp_path / "bare"))
    (bare / "tokenizer.json").unlink()
    refused: list[tuple[str, dict[str, object], type[VlmdeployError], str]] = [
        (ONE_POINT, {"ckpt": bundle}, ConfigError, "bundle: is a bundle, expected a float"),
        (ONE_POINT, {"ckpt": bare}, ConfigError, "bare: holds no tokenizer.json"),
        (ONE_POINT, {"ckpt": quantized}, ConfigError, "gptq: is already quantized, expected the float checkpoint"),
        (ONE_POINT, {"ckpt": tmp_path / "none"}, VlmdeployError, "none"),
        (ONE_POINT, {"calib": tmp_path / "none"}, DataError, "none: no such file"),
        (ONE_POINT, {"cpus": 2}, ConfigError, "--cpus needs --ray: leave it out"),
        ("group = 16", {}, ConfigError, "has calibrated points: give --calib"),
    ]
    for grid, options, kind, expected in refused:
        with pytest.raises(kind, match=expected):
            sweep(grid, **options)
    assert not (tmp_path / "out").exists() and here.done == []


def test_folder_of_somebody_else_is_left_as_it_is(tmp_path: Path, sweep: Sweep) -> None:
    """A lock was put into it."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"out: holds notes\.txt and is not a sweep; choose another --out"):
        sweep(ONE_POINT)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_file_in_place_of_the_output_is_refused(tmp_path: Path, sweep: Sweep) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigError, match="out: exists and is not a folder; choose another --out"):
        sweep(ONE_POINT)


def test_report_folder_of_somebody_else_is_refused_before_the_work(tmp_path: Path, here: Here, sweep: Sweep) -> None:
    sweep(ONE_POINT)
    (tmp_path / "out" / "report" / "report.json").unlink()
    here.done.clear()
    with pytest.raises(ExportError, match="report: exists and was not made by vlmdeploy"):
        sweep(ONE_POINT)
    assert here.done == []


def test_second_sweep_of_the_same_output_is_refused(tmp_path: Path, sweep: Sweep) -> None:
    with locked(tmp_path / "out"), pytest.raises(ExportError, match="out: another run is writing it"):
        sweep(ONE_POINT)


def test_command_refuses_with_one_line(ckpt: Path, data: Path, tmp_path: Path) -> None:
    grid = tmp_path / "grid.toml"
    grid.write_text("bit = [4]")
    command = ("sweep", "--ckpt", ckpt, "--grid", grid, "--data", data, "--out", tmp_path / "out")
    assert f'{grid}: key "bit" is not known: did you mean bits?' in only_error_line(run_cli(*command))
    grid.write_text("bits = [4]")
    assert f"{grid}: has calibrated points: give --calib DATA" in only_error_line(run_cli(*command))
    grid.write_text(TWO_POINTS)
    missing = ("sweep", "--ckpt", ckpt, "--grid", grid, "--data", tmp_path / "none", "--out", tmp_path / "out")
    assert f"{tmp_path / 'none'}: no such file" in only_error_line(run_cli(*missing))
    (tmp_path / "out" / "sweep.json").unlink(missing_ok=True)


def test_command_lists_points_and_warns_of_failures(ckpt: Path, data: Path, tmp_path: Path, here: Here) -> None:
    grid = tmp_path / "grid.toml"
    grid.write_text(TWO_POINTS + FAILS)
    command = ("sweep", "--ckpt", ckpt, "--grid", grid, "--data", data, "--out", tmp_path / "out", *FAST)
    result, page = run_cli(*command), tmp_path / "out" / "report" / "report.html"
    assert result.exit_code == 0 and result.stdout.startswith(f"{page}: 3 points, 1 failed\n")
    assert "bad failed: --kv is fp32" in result.stderr
    document = only_json_document(run_cli(*command, "--json"))
    assert [(point["name"], point["error"] is None) for point in document["points"]] == [
        (NAMES[0], True), (NAMES[1], True), ("bad", False),
    ]  # fmt: skip
    assert document["failures"][0]["name"] == "bad" and document["reference"] == "ckpt"


# Processes


def a_task(tmp_path: Path) -> Task:
    report = ReportOptions((), tmp_path / "data", tmp_path / "report", tmp_path / "ckpt")
    return Task("point", Point("a"), Shared(tmp_path / "ckpt", None, tmp_path, report, Calibration(), 1))


@pytest.fixture
def interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Lets tasks run this shell script instead of Python."""

    def install(script: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return install


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("kill -9 $$", "the process was killed (Killed), most likely for memory"),
        ("kill -11 $$", "the process was killed (Segmentation fault)"),
        ("echo one >&2; echo two >&2; exit 7", "the process ended with status 7: one / two"),
        ("exit 3", "the process ended with status 3: "),
        ("exit 0", None),
    ],
)
def test_a_task_that_dies_is_told_so(
    tmp_path: Path, interpreter: Callable[[str], None], script: str, expected: str | None
) -> None:
    interpreter(script)
    assert run_task(a_task(tmp_path)) == expected


NOISY = """
from vlmdeploy.sweep import task
from vlmdeploy.errors import ConfigError
def noisy(_):
    print("a library says hello")
    raise {error}
task.perform = noisy
task.main()
"""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("ConfigError('two\\nlines')", "two lines"),
        pytest.param("OSError(28, 'No space', '/a/b')", "/a/b: No space", marks=slow),
        pytest.param("ZeroDivisionError('oops')", "ZeroDivisionError: oops", marks=slow),
    ],
)
def test_the_error_of_a_task_is_told_whatever_libraries_print(
    tmp_path: Path, interpreter: Callable[[str], None], error: str, expected: str
) -> None:
    """What a library printed was read as the answer."""
    (tmp_path / "noisy.py").write_text(NOISY.format(error=error))
    interpreter(f"exec {sys.executable} {tmp_path / 'noisy.py'}")
    found = run_task(a_task(tmp_path))
    assert found is not None and found.endswith(expected) and "hello" not in found.partition(":")[0]


@slow
def test_a_task_refuses_to_run_for_a_sweep_that_is_gone(tmp_path: Path, interpreter: Callable[[str], None]) -> None:
    interpreter(f'{sys.executable} "$@"')  # the shell stands between
    found = run_task(a_task(tmp_path))
    assert found == "the process ended with status 1: the command that wanted this is gone"


def sweep_process(ckpt: Path, data: Path, grid: Path, out: Path, *more: object) -> subprocess.Popen[str]:
    command = ["sweep", "--ckpt", ckpt, "--grid", grid, "--data", data, "--out", out, *FAST, *more]
    return subprocess.Popen(
        [sys.executable, "-m", "vlmdeploy", *map(str, command)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


@slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_sweep_that_was_stopped_redoes_no_finished_point(
    ckpt: Path, data: Path, tmp_path: Path, number: signal.Signals
) -> None:
    grid, out = tmp_path / "grid.toml", tmp_path / "out"
    grid.write_text(TWO_POINTS + FAILS)
    with sweep_process(ckpt, data, grid, out) as process:
        wait_for(lambda: len(list(out.glob("evaluations/*.json"))) == 2, process)
        os.killpg(process.pid, number) if number == signal.SIGINT else process.kill()
        _, errors = process.communicate()
    assert number == signal.SIGKILL or errors.splitlines()[-1] == "Error: interrupted"
    kept = times_of(out / "evaluations")
    result = run_sweep(options_for(ckpt, data, out, TWO_POINTS + FAILS))
    assert len(kept) == 2 and kept.items() <= times_of(out / "evaluations").items()
    assert named(result) == ["ckpt", *NAMES] and [failure.name for failure in result.failures] == ["bad"]
    whole = run_sweep(options_for(ckpt, data, tmp_path / "whole", TWO_POINTS))
    for one, other in zip(result.report.models, whole.report.models, strict=True):
        assert (one.tasks, one.agreement, one.equal_answers) == (other.tasks, other.agreement, other.equal_answers)
    assert read_report_json(out / "report" / "report.json") == result.report


def wait_for(is_there: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until something is there, a minute at most, while the process runs."""
    end = time.monotonic() + 60
    while not is_there():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


# Ray


class FakeRayError(Exception):
    """What Ray raises."""


class FakeRay(SimpleNamespace):
    """As much of Ray as a sweep uses: tasks run when they are waited for; `lost` ones raise."""

    def __init__(self, refuses: Exception | None = None, lost: dict[str, Exception] | None = None) -> None:
        super().__init__(refuses=refuses, lost=lost or {}, calls=[], exceptions=SimpleNamespace(RayError=FakeRayError))

    def init(self, **options: Any) -> None:
        self.calls.append(("init", options["address"]))
        if self.refuses is not None:
            raise self.refuses

    def shutdown(self) -> None:
        self.calls.append(("shutdown",))

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {"Alive": True, "Resources": {"CPU": 4.0}},
            {"Alive": False, "Resources": {"CPU": 64.0}},
            {"Alive": True, "Resources": {}},
        ]

    def remote(self, **options: Any) -> Callable[..., Any]:
        self.calls.append(("cpus", options["num_cpus"]))
        return lambda function: SimpleNamespace(remote=lambda task: FakeReference(function, task))

    def wait(self, references: list["FakeReference"]) -> tuple[list["FakeReference"], list["FakeReference"]]:
        return references[-1:], references[:-1]

    def get(self, reference: "FakeReference") -> str | None:
        if reference.task.point.name in self.lost:
            raise self.lost[reference.task.point.name]
        return reference.function(reference.task)


@dataclass(frozen=True, eq=False)
class FakeReference:
    function: Callable[[Task], str | None]
    task: Task


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    return fake


def test_points_on_a_cluster_are_reported_in_the_order_of_the_grid(here: Here, ray: FakeRay, sweep: Sweep) -> None:
    result = sweep(TWO_POINTS, ray="auto")
    assert named(result) == ["ckpt", *NAMES] and here.done == NAMES[::-1]
    assert ray.calls == [("init", "auto"), ("cpus", 4), ("cpus", 4), ("shutdown",)]


@pytest.mark.parametrize(
    ("error", "expected"),
    [(FakeRayError("worker died\nat once"), "Ray lost it: worker died"), (FakeRayError(), "Ray lost it: FakeRayError")],
)
def test_a_task_that_ray_loses_is_a_failed_point(ray: FakeRay, error: Exception, expected: str, sweep: Sweep) -> None:
    ray.lost[NAMES[0]] = error
    result = sweep(TWO_POINTS, ray="auto", cpus=2)
    assert [(failure.name, failure.error) for failure in result.failures] == [(NAMES[0], expected)]
    assert ("cpus", 2) in ray.calls


@pytest.mark.parametrize(
    "error", [ConnectionError("nobody\nthere"), ValueError("nobody"), RuntimeError("nobody"), OSError("nobody")]
)
def test_a_cluster_that_is_not_there_is_one_line(
    tmp_path: Path, here: Here, ray: FakeRay, error: Exception, sweep: Sweep
) -> None:
    ray.refuses = error
    with pytest.raises(BackendError, match=r"--ray auto: cannot connect to a cluster \(nobody\): start one with `ray"):
        sweep(ONE_POINT, ray="auto")
    assert here.done == [] and not (tmp_path / "out" / "evaluations").exists()


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://localhost:{}", "[::1]:{}"])
def test_an_address_where_nobody_listens_is_told_at_once(ray: FakeRay, address: str, sweep: Sweep) -> None:
    """Ray itself tries for minutes."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        where = address.format(closed.getsockname()[1])
    with pytest.raises(BackendError, match=re.escape(f"--ray {where}: cannot connect to a cluster (")):
        sweep(ONE_POINT, ray=where)
    assert ray.calls == []


def test_an_address_where_somebody_listens_is_left_to_ray(ray: FakeRay, sweep: Sweep) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = f"127.0.0.1:{server.getsockname()[1]}"
        sweep(ONE_POINT, ray=where)
    assert ray.calls[0] == ("init", where)


def test_more_cpus_than_any_machine_has_are_refused(ray: FakeRay, sweep: Sweep) -> None:
    """Ray would wait for such a machine for ever."""
    with pytest.raises(ConfigError, match="--cpus is 5, and the largest machine of the cluster has 4"):
        sweep(ONE_POINT, ray="auto", cpus=5)
    assert ray.calls[-1] == ("shutdown",)


def test_an_empty_address_is_refused(ray: FakeRay, sweep: Sweep) -> None:
    with pytest.raises(ConfigError, match="--ray is empty, expected an address, auto or local"):
        sweep(ONE_POINT, ray=" ")
    assert ray.calls == []


def test_without_ray_the_extra_is_named(
    ckpt: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    grid = tmp_path / "grid.toml"
    grid.write_text(ONE_POINT)
    command = ("sweep", "--ckpt", ckpt, "--grid", grid, "--data", data, "--out", tmp_path / "out", "--ray", "auto")
    assert only_error_line(run_cli(*command)) == 'Error: ray is not installed: pip install "vlmdeploy[sweep]"'


@slow
def test_points_run_on_a_local_ray_cluster(ckpt: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    grid, out = tmp_path / "grid.toml", tmp_path / "out"
    grid.write_text(TWO_POINTS + FAILS)
    with sweep_process(ckpt, data, grid, out, "--ray", "local", "--json") as process:
        written, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    document = json.loads(written)
    assert [failure["name"] for failure in document["failures"]] == ["bad"]
    report = read_report_json(out / "report" / "report.json")
    assert [model.subject.name for model in report.models] == ["ckpt", *NAMES]
    assert all(model.measurement is not None for model in report.models[1:])

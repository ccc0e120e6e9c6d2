"""Contract tests of interrupted calibration: a run killed at any moment goes on with the unit it was in and ends in the
same bytes, damaged or foreign states are refused by name, and two processes give the result of one.

Runs that are killed are children of a fork server that has the imports ready: they are the command line all the same.
"""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.calibration_data import (
    FAST,
    messages,
    overflow_for_pictures,
    quantize,
    refusal,
    write_calibration_checkpoint,
    write_calibration_data,
    write_changed_checkpoint,
    write_rows,
)
from tests.stored_linears import gptq_linears
from tests.tiny_bundle import ROOT, content_of, flip_byte, run_cli
from vlmdeploy.artifact import locked, partial_folder
from vlmdeploy.bundle import hash_file
from vlmdeploy.calib.request import QuantizeOptions, quantize_checkpoint
from vlmdeploy.manifest import FileEntry
from vlmdeploy.progress import no_progress

UNITS = ["vision.embed", "vision.layers.0", "connector", "prompts", "decoder.layers.0", "decoder.layers.1", "head"]
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
SETTINGS = "settings.json"
slow = pytest.mark.slow
children = multiprocessing.get_context("forkserver")
children.set_forkserver_preload(["tests.test_calib_resume", "vlmdeploy.cli", "vlmdeploy.calib.run"])


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_calibration_checkpoint(tmp_path_factory.mktemp("resume") / "ckpt", vision_layers=1, seed=8)


@pytest.fixture(scope="module")
def data(ckpt: Path) -> Path:
    return write_calibration_data(ckpt.parent / "data", num_pictures=5, num_texts=3)


@dataclass(frozen=True)
class Whole:
    """An uninterrupted run: what it wrote, how often it changed a folder, and how long it took."""

    content: dict[str, bytes]
    changes: int
    seconds: float


@pytest.fixture(scope="module")
def whole(ckpt: Path, data: Path) -> Whole:
    out = ckpt.parent / "whole" / "out"
    start = time.monotonic()
    child = started(ckpt, data, out)
    child.join(60)
    assert child.exitcode == 0
    changes = int((out.parent / "changes").read_text())
    return Whole(content_of(out), changes, time.monotonic() - start)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def started(ckpt: Path, data: Path, out: Path, kill_at: int = 0) -> Any:
    """`vlmdeploy quantize` in a process of its own, its units noted in a file beside `out`."""
    out.parent.mkdir(exist_ok=True)
    arguments = ["quantize", "--ckpt", ckpt, "--calib", data, "--out", out, *FAST]
    child = children.Process(target=command, args=([str(argument) for argument in arguments], out, kill_at))
    with pytest.MonkeyPatch.context() as patch:  # the server's socket lies there, and its path has 107 bytes at most
        patch.setattr("tempfile.tempdir", "/tmp")
        child.start()
    return child


def command(arguments: list[str], out: Path, kill_at: int) -> None:
    """The command line; it kills itself at the `kill_at`-th change of a file or folder, and counts the changes."""
    from vlmdeploy.cli import main, models

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    count = 0

    def note(event: str, details: tuple[Any, ...]) -> None:
        nonlocal count
        is_change = event in CHANGES or (event == "open" and details[2] & (os.O_WRONLY | os.O_RDWR))
        is_inside = is_change and (str(details[0]).startswith(str(out.parent)) or is_removal_by_rmtree(event, details))
        if is_inside and Path(str(details[0])).name not in ("units", "changes"):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    @contextmanager
    def noted() -> Iterator[Callable[[str, int, int], None]]:
        with (out.parent / "units").open("a", buffering=1) as log:
            yield lambda unit, done, total: print(unit, file=log) if unit in UNITS else None

    setattr(models, "progress_bar", noted)  # noqa: B010  # the module's own type is a function of another kind
    sys.addaudithook(note)
    main(arguments, standalone_mode=False)
    (out.parent / "changes").write_text(str(count))


def is_removal_by_rmtree(event: str, details: tuple[Any, ...]) -> bool:
    """That function names files by the open folder they are in."""
    return event in ("os.remove", "os.rmdir") and details[1] >= 0


def units_run(out: Path) -> list[str]:
    log = out.parent / "units"
    return log.read_text().split() if log.is_file() else []


def records(out: Path) -> list[str]:
    """The units that OUT.partial holds as finished."""
    return [unit for unit in UNITS if (partial_folder(out) / f"{unit}.json").is_file()]


def assert_continues(ckpt: Path, data: Path, out: Path, whole: Whole) -> None:
    """The same command ends in the same bytes, begins behind what is finished, and leaves nothing beside its output."""
    finished, before = records(out), units_run(out)
    is_done = out.exists()
    child = started(ckpt, data, out)
    child.join(60)
    assert child.exitcode == 0
    assert units_run(out)[len(before) :] == ([] if is_done else UNITS[len(finished) :])
    assert content_of(out) == whole.content
    assert {path.name for path in out.parent.iterdir()} - {"units", "changes"} == {out.name}


@pytest.mark.parametrize("rounds", [3, pytest.param(20, marks=slow)])
def test_run_killed_at_random_changes_redoes_at_most_one_unit(
    ckpt: Path, data: Path, whole: Whole, tmp_path: Path, rounds: int
) -> None:
    moments = random.Random(rounds)
    for number in range(rounds):
        out = tmp_path / str(number) / "out"
        child = started(ckpt, data, out, kill_at=moments.randrange(1, whole.changes + 1))
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
        begun = len(units_run(out))
        assert out.exists() or begun - len(records(out)) in (0, 1)
        assert_continues(ckpt, data, out, whole)


@slow
def test_run_killed_again_and_again_ends_in_the_same_bytes(
    ckpt: Path, data: Path, whole: Whole, tmp_path: Path
) -> None:
    """At random times, which may lie inside compiled code, until a run comes through."""
    moments, out, kills = random.Random(1), tmp_path / "0" / "out", 0
    while kills < 20:
        child = started(ckpt, data, out)
        child.join(moments.uniform(0, whole.seconds))
        child.kill()
        child.join()
        kills += 1
        if out.exists():
            assert_continues(ckpt, data, out, whole)
            out = tmp_path / str(kills) / "out"
    assert_continues(ckpt, data, out, whole)


@pytest.mark.parametrize("from_the_end", [1, 8, 25])
def test_run_killed_while_it_publishes_leaves_nothing_beside_its_output(
    ckpt: Path, data: Path, whole: Whole, tmp_path: Path, from_the_end: int
) -> None:
    out = tmp_path / "run" / "out"
    child = started(ckpt, data, out, kill_at=whole.changes - from_the_end + 1)
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert_continues(ckpt, data, out, whole)


def interrupted(ckpt: Path, data: Path, out: Path, at: str = "decoder.layers.0", **options: Any) -> Path:
    """A run that is interrupted when unit `at` begins; its OUT.partial."""

    def stop(unit: str, done: int, total: int) -> None:
        if unit == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(ckpt, out, QuantizeOptions(data, group=16, **options), stop)
    return partial_folder(out)


def test_interrupted_run_has_no_output_and_continues_in_another_process(
    ckpt: Path, data: Path, whole: Whole, tmp_path: Path
) -> None:
    out = tmp_path / "run" / "out"
    out.parent.mkdir()
    interrupted(ckpt, data, out)
    assert not out.exists() and records(out) == UNITS[: UNITS.index("decoder.layers.0")]
    assert_continues(ckpt, data, out, whole)


@pytest.mark.parametrize(("quality", "units"), [
    ("high", ["decoder.layers.1"]),
    ("best", ["float.decoder.layers.1", "gradient.head", "gradient.decoder.layers.0", "vision.embed", "head"]),
])  # fmt: skip
def test_every_quality_is_continued(ckpt: Path, data: Path, tmp_path: Path, quality: str, units: list[str]) -> None:
    for unit in units:
        interrupted(ckpt, data, tmp_path / "killed", unit, quality=quality)
    for name in ("killed", "whole"):
        options = ("--quality", quality, "--max-memory", "1KB" if name == "whole" else "1GB")
        quantize(ckpt, data, tmp_path / name, *options)
    assert content_of(tmp_path / "killed") == content_of(tmp_path / "whole")


def test_shards_of_a_run_are_read_back_once_at_most(
    ckpt: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every shard was hashed a second time when the last unit was done: tens of gigabytes of a large model."""
    hashed: list[str] = []

    def noted(path: Path) -> FileEntry:
        hashed.append(path.name)
        return hash_file(path)

    monkeypatch.setattr("vlmdeploy.calib.state.hash_file", noted)
    quantize_checkpoint(ckpt, tmp_path / "out", QuantizeOptions(data, group=16), no_progress)
    assert sorted(hashed) == sorted(f"{unit}.safetensors" for unit in UNITS)


def test_rows_of_the_unit_before_are_deleted_when_a_unit_is_finished(ckpt: Path, data: Path, tmp_path: Path) -> None:
    partial = interrupted(ckpt, data, tmp_path / "out", "decoder.layers.1")
    assert [path.name for path in partial.glob("*.flow")] == ["decoder.layers.0.0.0.flow"]


@pytest.mark.parametrize(("unit", "kept"), [
    ("float.decoder.layers.1", ["float.decoder.layers.0", "float.prompts"]),
    ("gradient.decoder.layers.0", ["float.prompts", "gradient.decoder.layers.1"]),
    ("vision.embed", ["gradient.decoder.layers.0"]),
])  # fmt: skip
def test_float_rows_are_kept_until_the_backward_pass_has_used_them(
    ckpt: Path, data: Path, tmp_path: Path, unit: str, kept: list[str]
) -> None:
    partial = interrupted(ckpt, data, tmp_path / "out", unit, quality="best")
    assert sorted(path.name for path in partial.glob("*.flow")) == [f"{name}.0.0.flow" for name in kept]


def test_leftovers_of_an_interrupted_unit_are_removed(ckpt: Path, data: Path, tmp_path: Path) -> None:
    partial = interrupted(ckpt, data, tmp_path / "out")
    before = {path.name for path in partial.iterdir()}
    for name in ("decoder.layers.0.safetensors", "decoder.layers.0.0.0.flow.new", "decoder.layers.0.json.new"):
        (partial / name).write_bytes(b"half")
    (partial / "spill0").mkdir(exist_ok=True)
    (partial / "spill0" / "7.spill").write_bytes(b"rows")
    interrupted(ckpt, data, tmp_path / "out")
    assert {path.name for path in partial.iterdir()} - {"spill0"} == before - {"spill0"}
    assert list((partial / "spill0").iterdir()) == []


@pytest.mark.parametrize("name", ["connector.safetensors", "vision.embed.safetensors", "prompts.0.0.flow"])
@pytest.mark.parametrize("damage", [flip_byte, Path.unlink])
def test_damaged_state_is_named(
    ckpt: Path, data: Path, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    partial = interrupted(ckpt, data, tmp_path / "out")
    damage(partial / name)
    error = refusal(ckpt, data, tmp_path / "out")
    assert str(partial / name) in error and "damaged or missing" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("unit", "name"), [
    ("gradient.decoder.layers.0", "float.prompts.0.0.flow"),
    ("decoder.layers.0", "gradient.decoder.layers.1.0.weights"),
])  # fmt: skip
def test_damaged_state_of_the_backward_pass_is_named(
    ckpt: Path, data: Path, tmp_path: Path, unit: str, name: str
) -> None:
    path = interrupted(ckpt, data, tmp_path / "out", unit, quality="best") / name
    flip_byte(path)
    assert f"{path}: damaged or missing" in refusal(ckpt, data, tmp_path / "out", "--quality", "best")


@pytest.mark.parametrize("name", ["connector.json", SETTINGS])
def test_state_that_is_no_json_is_named(ckpt: Path, data: Path, tmp_path: Path, name: str) -> None:
    partial = interrupted(ckpt, data, tmp_path / "out")
    (partial / name).write_text("{")
    assert str(partial / name) in refusal(ckpt, data, tmp_path / "out")


RECORD: dict[str, Any] = {"files": {}, "linears": []}


@pytest.mark.parametrize("content", [
    None, [], "text", 7, {}, {"files": {}}, {**RECORD, "files": []}, {**RECORD, "files": {"a": {"bytes": 1}}},
    {**RECORD, "files": {"a": None}}, {**RECORD, "linears": {}}, {**RECORD, "linears": [None]},
    {**RECORD, "linears": [{"name": "head"}]},
], ids=json.dumps)  # fmt: skip
def test_record_of_another_shape_is_named(ckpt: Path, data: Path, tmp_path: Path, content: Any) -> None:
    """It was an error of Python that named nothing."""
    record = interrupted(ckpt, data, tmp_path / "out", "vision.layers.0") / "vision.embed.json"
    record.write_text(json.dumps(content))
    error = refusal(ckpt, data, tmp_path / "out")
    assert f"{record}: damaged (" in error and f"remove {record.parent} to start over" in error


@pytest.mark.parametrize("content", [b"null", b"[]", b'"text"', b"[" * 20000])
def test_settings_of_another_shape_are_named(ckpt: Path, data: Path, tmp_path: Path, content: bytes) -> None:
    partial = interrupted(ckpt, data, tmp_path / "out", "vision.layers.0")
    (partial / SETTINGS).write_bytes(content)
    assert f"{partial / SETTINGS}: damaged (" in refusal(ckpt, data, tmp_path / "out")


def test_settings_without_their_keys_are_another_run(ckpt: Path, data: Path, tmp_path: Path) -> None:
    partial = interrupted(ckpt, data, tmp_path / "out", "vision.layers.0")
    (partial / SETTINGS).write_text("{}")
    assert "is None there" in refusal(ckpt, data, tmp_path / "out")


@pytest.mark.parametrize(
    "grids", [None, [], {}, "int4:64", {"lm_head.weight": "int4:16"}, "every int4", "every int9:16"]
)
def test_damaged_choice_of_an_unfinished_run_is_named(ckpt: Path, data: Path, tmp_path: Path, grids: Any) -> None:
    path = interrupted(ckpt, data, tmp_path / "out", "vision.embed", budget="6") / SETTINGS
    settings = json.loads(path.read_text())
    is_text = isinstance(grids, str) and grids.startswith("every ")
    settings["grids"] = dict.fromkeys(settings["grids"], grids.removeprefix("every ")) if is_text else grids
    path.write_text(json.dumps(settings))
    error = refusal(ckpt, data, tmp_path / "out", "--budget", 6)
    assert f"{path}: damaged (grids: " in error and f"remove {path.parent}" in error


@pytest.mark.parametrize(("options", "message"), [
    (("--bits", 8), "\"parts.decoder\" is 'int4' there and 'int8' now"),
    (("--hessian", "pooled"), "\"hessian\" is 'routed' there and 'pooled' now"),
    (("--quality", "high"), '"quality"'), (("--samples", 6), '"calibration_sha256"'),
    (("--group", 32), '"group_sizes.decoder"'),
])  # fmt: skip
def test_unfinished_run_of_other_settings_is_refused_and_the_key_named(
    ckpt: Path, data: Path, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    partial = interrupted(ckpt, data, tmp_path / "out", "connector")
    error = refusal(ckpt, data, tmp_path / "out", *options)
    assert message in error and str(partial) in error and "--force" in error
    assert records(tmp_path / "out") == UNITS[:2], "nothing was thrown away"


def test_force_starts_over_with_other_settings(ckpt: Path, data: Path, tmp_path: Path) -> None:
    interrupted(ckpt, data, tmp_path / "out")
    for name in ("out", "fresh"):
        options = ("--bits", 8, "--force")
        quantize(ckpt, data, tmp_path / name, *options)
    assert content_of(tmp_path / "out") == content_of(tmp_path / "fresh")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "out"]


@pytest.mark.parametrize("removed", [1, 5, 9])
def test_force_killed_while_it_clears_can_be_given_again(
    ckpt: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: int
) -> None:
    """The settings went first, or in the middle: what was left was "not an unfinished run". Then they went last, and
    what was left was a run whose files were "damaged or missing"."""
    partial, unlink, calls = interrupted(ckpt, data, tmp_path / "out"), Path.unlink, count(1)

    def killed(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        if next(calls) == removed:
            raise KeyboardInterrupt

    options = ("--bits", 8, "--force")
    files = [path.name for path in partial.iterdir() if path.is_file()]
    assert len(files) - 2 == 9, "beside lock and settings: records, shards and rows"
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", killed)
        assert refusal(ckpt, data, tmp_path / "out", *options) == "Error: interrupted"
    quantize(ckpt, data, tmp_path / "out", *options)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_changed_checkpoint_or_picture_is_another_run(ckpt: Path, data: Path, tmp_path: Path) -> None:
    ours, theirs = (Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in (ckpt, data))
    interrupted(ours, theirs, tmp_path / "out", "connector")
    flip_byte(ours / "model.safetensors")
    assert '"checkpoint_sha256"' in refusal(ours, theirs, tmp_path / "out")
    flip_byte(ours / "model.safetensors")
    shutil.copy(data / "1.png", theirs / "0.png")
    assert '"calibration_sha256"' in refusal(ours, theirs, tmp_path / "out")


def test_second_run_of_the_same_output_is_refused(ckpt: Path, data: Path, tmp_path: Path) -> None:
    with locked(partial_folder(tmp_path / "out")):
        assert "another run is writing it" in refusal(ckpt, data, tmp_path / "out")
        assert "another run is writing it" in refusal(ckpt, data, tmp_path / "out", "--force")


def test_folder_that_is_no_unfinished_run_is_left_alone(ckpt: Path, data: Path, tmp_path: Path) -> None:
    foreign = partial_folder(tmp_path / "out")
    foreign.mkdir()
    (foreign / "letter.txt").write_text("dear")
    for options in ((), ("--force",)):
        assert "move it away" in refusal(ckpt, data, tmp_path / "out", *options)
    assert (foreign / "letter.txt").read_text() == "dear"


# Two processes


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`vlmdeploy ARGUMENTS` in two processes that calibrate together; ends by itself within a minute or fails."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vlmdeploy")
    return subprocess.run(
        [sys.executable, *launcher, *map(str, arguments)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


FIRST_LINEARS = {
    "default": r"model\.vision\.|layers\.0\.self_attn\..*query_key_value",
    "high": r"vision\.transformer\.layers\.0\.attention\.query_key_value",
    "best": r"vision\.transformer\.layers\.0\.attention\.query_key_value",
}


@slow
@pytest.mark.parametrize("quality", FIRST_LINEARS)
def test_two_processes_choose_the_codes_of_one(ckpt: Path, tmp_path: Path, quality: str) -> None:
    """Up to float ties. Behind the first linears one flipped code changes every later Hessian, and under asymmetric
    calibration every later target: there only the errors must be alike.
    """
    data = write_calibration_data(tmp_path / "data", num_pictures=18, num_texts=18)
    options = ("--ckpt", ckpt, "--calib", data, *FAST, "--tokens", 10000, "--quality", quality, "--json")
    done = torchrun("quantize", "--out", tmp_path / "two", *options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["message"] == "quantized", "one document: only the first process prints"
    assert run_cli("quantize", "--out", tmp_path / "one", *options).exit_code == 0
    one, two = (gptq_linears(tmp_path / name) for name in ("one", "two"))
    assert set(one) == set(two)
    equal = {name: np.mean(one[name][0] == two[name][0]) for name in one}
    first = FIRST_LINEARS[quality]
    assert min(share for name, share in equal.items() if re.search(first, name)) >= 0.995, equal
    reports = [json.loads((tmp_path / name / "quantization_report.json").read_text()) for name in ("one", "two")]
    assert reports[0]["calibration"] == reports[1]["calibration"]
    counted = ("name", "tokens", "samples", "held_out_tokens", "method")
    linears = [[[linear[key] for key in counted] for linear in report["linears"]] for report in reports]
    assert linears[0] == linears[1]
    errors = [[linear["held_out_error"] or 0.0 for linear in report["linears"]] for report in reports]
    assert np.allclose(errors[0], errors[1], rtol=0.2, atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "one", "two"]


@slow
def test_error_in_the_first_process_ends_both_with_one_line(ckpt: Path, data: Path, tmp_path: Path) -> None:
    interrupted(ckpt, data, tmp_path / "out")
    done = torchrun("quantize", "--ckpt", ckpt, "--calib", data, "--out", tmp_path / "out", *FAST)
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert done.returncode != 0 and len(lines) == 1 and '"processes" is 1 there and 2 now' in lines[0], done.stderr


@slow
def test_run_of_another_process_count_that_writes_there_is_refused(ckpt: Path, data: Path, tmp_path: Path) -> None:
    with locked(partial_folder(tmp_path / "out")):
        done = torchrun("quantize", "--ckpt", ckpt, "--calib", data, "--out", tmp_path / "out", *FAST)
    assert done.returncode != 0 and done.stderr.count("another run is writing it") == 1


@slow
def test_error_in_one_process_alone_ends_both(tmp_path: Path) -> None:
    """The only picture goes to the second process, where activations overflow; the first one waits for its sums."""
    ckpt = write_changed_checkpoint(tmp_path / "ckpt", overflow_for_pictures, vision_layers=1, image_px=12)
    rows: list[Any] = [{"messages": messages(f"Why {number}?", "over the tree")} for number in range(4)]
    rows.insert(1, {"image": "0.png", "messages": messages("What?", "It")})
    options = ("--calib", write_rows(tmp_path / "data", rows), "--connector", "fp32", *FAST)
    done = torchrun("quantize", "--ckpt", ckpt, "--out", tmp_path / "out", *options)
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert done.returncode != 0 and len(lines) == 1 and "0.png" in lines[0] and "Inf or NaN" in lines[0], done.stderr

"""Contract tests: an output folder is whole or absent, and what stood there before is kept or replaced in one step."""

import errno
import os
import subprocess
from pathlib import Path
from typing import BinaryIO

import pytest

from vlmdeploy import artifact
from vlmdeploy.artifact import as_umask_says, check_not_read, is_aside, remove_output, staged_folder, write_file
from vlmdeploy.errors import ExportError, ParityError


def is_ours(folder: Path) -> bool:
    return (folder / "manifest.json").is_file()


def write(out: Path, text: str, force: bool = False) -> None:
    with staged_folder(out, force, is_ours) as staging:
        (staging / "manifest.json").write_text(text)


def content(out: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in out.iterdir()}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "bundle"


def test_finished_folder_holds_exactly_what_was_written(out: Path) -> None:
    write(out, "new")
    assert content(out) == {"manifest.json": "new"}
    assert list(out.parent.iterdir()) == [out]


def test_output_appears_only_when_the_block_ends(out: Path) -> None:
    with staged_folder(out, False, is_ours) as staging:
        assert staging.parent == out.parent, "the same file system, so that the last step is a rename"
        assert not out.exists()
    assert out.is_dir()


def test_missing_parents_are_made(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b" / "bundle", "new")
    assert content(tmp_path / "a" / "b" / "bundle") == {"manifest.json": "new"}


@pytest.mark.parametrize("error", [ParityError("differs"), KeyboardInterrupt(), SystemExit(1), MemoryError()])
@pytest.mark.parametrize("old", [None, "old"])
def test_stopped_run_leaves_nothing_and_keeps_the_old_folder(out: Path, error: BaseException, old: str | None) -> None:
    if old:
        write(out, old)
    with pytest.raises(type(error)), staged_folder(out, True, is_ours) as staging:
        (staging / "manifest.json").write_text("half")
        raise error
    assert list(out.parent.iterdir()) == ([out] if old else [])
    assert not old or content(out) == {"manifest.json": old}


def test_full_disk_is_an_export_error_and_leaves_nothing(out: Path) -> None:
    with (
        pytest.raises(ExportError, match="cannot be written: No space left on device"),
        staged_folder(out, False, is_ours),
    ):
        raise OSError(28, os.strerror(28), "graph.onnx")
    assert list(out.parent.iterdir()) == []


def test_unwritable_parent_is_an_export_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="cannot be written"):
        write(tmp_path / "file" / "bundle", "new")


def test_existing_folder_is_refused_without_force(out: Path) -> None:
    write(out, "old")
    with pytest.raises(ExportError, match="exists already; choose another output or replace it with --force"):
        write(out, "new")
    assert content(out) == {"manifest.json": "old"}


def test_force_replaces_the_whole_folder(out: Path) -> None:
    write(out, "old")
    (out / "only_in_the_old_one").touch()
    write(out, "new", force=True)
    assert content(out) == {"manifest.json": "new"}
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("force", [False, True])
def test_folder_of_somebody_else_is_never_replaced(out: Path, force: bool) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("three years")
    with pytest.raises(ExportError, match="was not made by vlmdeploy" if force else "exists already"):
        write(out, "new", force)
    assert content(out) == {"thesis.tex": "three years"}


@pytest.mark.parametrize("kind", ["file", "link_to_folder", "dangling_link"])
def test_only_a_real_folder_is_replaced(out: Path, kind: str) -> None:
    target = out.parent / "target"
    if kind == "file":
        out.touch()
    else:
        out.symlink_to(target)
    if kind == "link_to_folder":
        write(target, "old")
    with pytest.raises(ExportError, match="is not a folder"):
        write(out, "new", force=True)
    assert out.is_symlink() == (kind != "file")


def test_old_output_comes_back_if_a_kill_left_none(out: Path) -> None:
    """Where folders cannot be exchanged it has no name for a moment; a run killed then lost it to the next one."""
    write(out, "old")
    out.rename(out.with_name(f".{out.name}.0123abcd.old.staging"))
    with pytest.raises(ParityError), staged_folder(out, True, is_ours):
        raise ParityError("differs")
    assert content(out) == {"manifest.json": "old"}
    assert list(out.parent.iterdir()) == [out]


def test_old_output_is_put_back_if_the_new_one_cannot_take_its_place(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where folders cannot be exchanged it stayed under a hidden name, and the next run removed it."""
    write(out, "old")
    rename = Path.rename

    def refused(path: Path, target: Path) -> Path:
        if target == out and ".old." not in path.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    monkeypatch.setattr("vlmdeploy.artifact._exchange", lambda first, second: False)
    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(ExportError, match="cannot be written: Input/output error"):
        write(out, "new", force=True)
    assert content(out) == {"manifest.json": "old"}
    assert list(out.parent.iterdir()) == [out]


def test_removal_that_was_interrupted_is_finished_by_the_next_run(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was left of OUT.quantized, without its report, counted as somebody else's and could not be replaced."""
    write(out, "old")
    (out / "model.safetensors").touch()
    unlink = Path.unlink

    def interrupted(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        if path.name == "manifest.json":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "unlink", interrupted)
        remove_output(out)
    write(out, "new", force=True)
    assert content(out) == {"manifest.json": "new"}
    assert list(out.parent.iterdir()) == [out]


def leave_behind(out: Path) -> Path:
    """What a killed run leaves: a copy of a staging folder while it is being filled."""
    with staged_folder(out, False, is_ours) as staging:
        left = staging.with_name(f".{out.name}.0123abcd.staging")
        subprocess.run(["cp", "-r", staging, left], check=True)
    subprocess.run(["rm", "-r", out], check=True)
    return left


def test_leftover_of_a_killed_run_is_removed_by_the_next(out: Path) -> None:
    left = leave_behind(out)
    (left / "graph.onnx").touch()
    write(out, "new")
    assert not left.exists()
    assert content(out) == {"manifest.json": "new"}


def test_old_output_that_a_killed_run_had_replaced_is_removed_by_the_next(out: Path) -> None:
    write(out, "old")
    old = out.rename(out.with_name(f".{out.name}.0123abcd.staging"))
    write(out, "new")
    assert not old.exists()


def test_folder_of_a_running_export_is_left_alone(out: Path) -> None:
    """Two runs to one output, also in containers where both have the same process id: the first to finish wins, the
    other says so and leaves it as it is."""
    with pytest.raises(ExportError, match="another one wrote it"), staged_folder(out, False, is_ours) as staging:
        (staging / "manifest.json").write_text("second")
        write(out, "first")
        assert staging.is_dir()
    assert content(out) == {"manifest.json": "first"}
    assert [path.name for path in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("can_exchange", [False, True])
def test_folder_that_appears_while_we_write_is_never_deleted(
    out: Path, force: bool, can_exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was only looked for at the start, then exchanged and removed, whatever it was by then."""
    if not can_exchange:
        monkeypatch.setattr("vlmdeploy.artifact._exchange", lambda first, second: False)
    if force:
        write(out, "old")
    with pytest.raises(ExportError, match="changed while this command ran"), staged_folder(out, force, is_ours) as new:
        (new / "manifest.json").write_text("new")
        subprocess.run(["rm", "-rf", out], check=True)
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")
    assert content(out) == {"thesis.txt": "years of work"}
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_foreign_folder_stays_even_if_putting_it_back_fails(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The staging folder is removed at the end, unless it has become what was exchanged for it."""
    calls: list[Path] = []

    def exchange_once(first: Path, second: Path) -> bool:
        calls.append(first)
        return len(calls) == 1 and really_exchange(first, second)

    really_exchange = artifact._exchange
    monkeypatch.setattr(artifact, "_exchange", exchange_once)
    write(out, "old")
    with pytest.raises(ExportError), staged_folder(out, True, is_ours) as new:
        (new / "manifest.json").write_text("new")
        subprocess.run(["rm", "-rf", out], check=True)
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")
    assert "years of work" in [path.read_text() for path in out.parent.rglob("thesis.txt")]


# What a command reads


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of data, a file of it under two other names, and a folder to write to that holds a file of data."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "data.jsonl").write_text("rows")
    (tmp_path / "link.jsonl").symlink_to(folder / "data.jsonl")
    (tmp_path / "hard.jsonl").hardlink_to(folder / "data.jsonl")
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "mine.jsonl").write_text("rows")
    return folder


@pytest.mark.parametrize("out", ["data/data.jsonl", "link.jsonl", "hard.jsonl", "data/../data/data.jsonl"])
@pytest.mark.parametrize("read", ["data", "data/data.jsonl"])
def test_file_that_is_read_is_not_written(data: Path, out: str, read: str) -> None:
    """Answers were written over the questions."""
    with pytest.raises(ExportError, match=r"is or belongs to .*data.*, which this command reads; choose another outp"):
        check_not_read(data.parent / out, (None, data.parent / read))


@pytest.mark.parametrize("read", ["bundle", "bundle/mine.jsonl"])
def test_folder_that_holds_what_is_read_is_not_replaced(data: Path, read: str) -> None:
    """With --force, all that the old output held went with it."""
    with pytest.raises(ExportError, match=r"bundle: holds .*, which this command reads"):
        check_not_read(data.parent / "bundle", (data.parent / read,))


def test_other_places_are_free(data: Path) -> None:
    (data / "answers.jsonl").write_text("of an earlier run")
    for out in ("data/answers.jsonl", "data/new.jsonl", "nowhere/new.jsonl", "bundle"):
        check_not_read(data.parent / out, (data / "data.jsonl", data.parent / "nowhere", None))


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_file_is_written_only_over_a_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "answers.jsonl"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/null")
    else:
        path.mkdir()
    with pytest.raises(ExportError, match="expected a file or a name that is free"):
        write_file(path, lambda file: file.write(b"new"))
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_file_that_cannot_be_finished_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    write_file(path, lambda file: file.write(b"old"))

    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_file(path, fail)
    assert content(tmp_path) == {path.name: "old"}


def test_what_a_killed_run_left_of_a_file_is_removed_by_the_next(tmp_path: Path) -> None:
    left = tmp_path / ".answers.0123abcd.new.jsonl"
    left.write_text("half")
    assert is_aside(left)
    write_file(tmp_path / "answers.jsonl", lambda file: file.write(b"new"))
    assert content(tmp_path) == {"answers.jsonl": "new"}


def test_link_is_kept_and_what_it_names_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "answers.jsonl")
    write_file(tmp_path / "link.jsonl", lambda file: file.write(b"new"))
    assert (tmp_path / "link.jsonl").is_symlink()
    assert (tmp_path / "answers.jsonl").read_text() == "new"


def test_files_respect_the_umask(tmp_path: Path) -> None:
    """Files of the tensor library were readable by their owner only, then by everyone, whatever the umask said."""
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "a", lambda file: file.write(b""))
        (tmp_path / "b").touch(0o600)
        as_umask_says(tmp_path / "b")
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()} == {"0o640"}


def test_leftover_is_found_whatever_the_name_holds(tmp_path: Path) -> None:
    out = tmp_path / "int4 [g=128] *"
    left = leave_behind(out)
    write(out, "new")
    assert not left.exists()

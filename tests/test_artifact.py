"""Contract tests: an output folder is whole or absent, and what stood there before is kept or replaced in one step."""

import os
import subprocess
from pathlib import Path

import pytest

from vlmdeploy.artifact import staged_folder
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


def leave_behind(out: Path, process_id: int) -> Path:
    """What a killed run with that process id leaves: a copy of a staging folder while it is being filled."""
    with staged_folder(out, False, is_ours) as staging:
        left = out.with_name(staging.name.replace(str(os.getpid()), str(process_id)) + ".copy")
        subprocess.run(["cp", "-r", staging, left], check=True)
    subprocess.run(["rm", "-r", out], check=True)
    return left.rename(left.with_suffix(""))


def dead_process_id() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_leftover_of_a_killed_run_is_removed_by_the_next(out: Path) -> None:
    left = leave_behind(out, dead_process_id())
    write(out, "new")
    assert not left.exists()


def test_leftover_with_our_own_process_id_is_removed(out: Path) -> None:
    """Process ids repeat in containers: the killed run may have had the number that this one has."""
    left = leave_behind(out, os.getpid())
    (left / "graph.onnx").touch()
    write(out, "new")
    assert not left.exists()
    assert content(out) == {"manifest.json": "new"}


def test_folder_of_a_running_export_is_left_alone(out: Path) -> None:
    left = leave_behind(out, os.getppid())
    write(out, "new")
    assert left.is_dir()


def test_leftover_is_found_whatever_the_name_holds(tmp_path: Path) -> None:
    out = tmp_path / "int4 [g=128] *"
    left = leave_behind(out, dead_process_id())
    write(out, "new")
    assert not left.exists()

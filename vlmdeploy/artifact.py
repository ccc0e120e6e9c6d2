"""Publish an output folder atomically: write a staging folder, then rename it. An existing folder is replaced only with
`force`, and only if vlmdeploy made it.

Long runs keep their finished parts in OUT.partial, which one run at a time may use."""

import ctypes
import fcntl
import glob
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from vlmdeploy.errors import ExportError, VlmdeployError
from vlmdeploy.records import Config, first_difference, read_object

_STAGING_SUFFIX = ".staging"
_MARKER = ".vlmdeploy-staging"
LOCK = "lock"
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_AT_FDCWD = -100


def check_output(out: Path, force: bool, is_ours: Callable[[Path], bool]) -> None:
    """Raise ExportError unless a folder may be written at `out`."""
    check_name(out)
    if not (out.exists() or out.is_symlink()):
        return
    if not out.is_dir() or out.is_symlink():
        raise ExportError(f"{out}: exists and is not a folder; choose another output")
    if not force:
        raise ExportError(f"{out}: exists already; choose another output or replace it with --force")
    if not is_ours(out):
        raise ExportError(f"{out}: exists and was not made by vlmdeploy, so --force does not replace it")


def check_name(out: Path) -> None:
    """Raise ExportError for a path that is not UTF-8, which the tensor and graph libraries reject only at the end."""
    try:
        str(out.absolute()).encode()
    except UnicodeEncodeError as error:
        raise ExportError(f"{out}: the path is not valid UTF-8; choose another output") from error


@contextmanager
def staged_folder(out: Path, force: bool, is_ours: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield a staging folder that becomes `out` if the block succeeds and is removed if it fails.

    First removes what killed runs left. Raises ExportError if `out` may not or cannot be written.
    """
    check_output(out, force, is_ours)
    out = out.absolute()
    _remove_leftovers(out, is_ours)
    staging = out.with_name(f".{out.name}.{os.getpid()}{_STAGING_SUFFIX}")
    try:
        staging.mkdir(parents=True)
        (staging / _MARKER).touch()
        yield staging
        (staging / _MARKER).unlink()
        _publish(staging, out)
    except OSError as error:
        where = str(error.filename or staging).replace(str(staging), str(out))
        raise ExportError(f"{out}: cannot be written: {error.strerror or error} ({where})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _remove_leftovers(out: Path, is_ours: Callable[[Path], bool]) -> None:
    """Delete what killed runs left: a staging folder, or the old output that it was exchanged for."""
    for folder in out.parent.glob(f".{glob.escape(out.name)}.*{_STAGING_SUFFIX}"):
        owner = folder.name[len(out.name) + 2 : -len(_STAGING_SUFFIX)]
        is_leftover = (folder / _MARKER).is_file() or is_ours(folder) or not any(folder.iterdir())
        if is_leftover and owner.isdigit() and not _is_another_process(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_another_process(process_id: int) -> bool:
    """Whether another process has this id. In containers a killed run often had our own id."""
    return process_id != os.getpid() and Path(f"/proc/{process_id}").exists()


def _publish(staging: Path, out: Path) -> None:
    """Rename the finished folder. An old one is exchanged atomically and then lies at `staging`."""
    if not out.exists():
        staging.rename(out)
    elif not _exchange(staging, out):
        old = staging.with_name(staging.name + ".old")
        out.rename(old)
        staging.rename(out)
        shutil.rmtree(old)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders atomically; False if the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    return int(renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _EXCHANGE)) == 0


def partial_folder(out: Path) -> Path:
    """The folder of an unfinished run's state."""
    return out.with_name(out.name + ".partial")


def open_partial(folder: Path, name: str, settings: Config, force: bool, error: type[VlmdeployError]) -> None:
    """Prepare OUT.partial, which is locked, to start a run or to continue one whose `name` holds the same settings.

    Raises `error`, naming the key, for an unfinished run with other settings; `force` discards that run.
    """
    path = folder / name
    if path.is_file():
        difference = first_difference(settings, read_state(path, error))
        if difference is None:
            return
        if not force:
            key, ours, theirs = difference
            raise error(
                f'{folder}: holds an unfinished run with other settings: "{key}" is {theirs!r} there and {ours!r} now; '
                "continue with the old settings, or start over with --force"
            )
        empty_partial(folder, name)
    elif any(item.name not in (LOCK, f"{name}.new") for item in folder.iterdir()):
        raise error(f"{folder}: exists and holds no {name}: not an unfinished run; move it away")
    write_file(path, lambda file: file.write(json.dumps(settings, indent=1).encode()))


def read_state(path: Path, error: type[VlmdeployError]) -> Config:
    """Read a JSON object of OUT.partial. Raises `error`, which says how to start over."""
    with damage_explained(path, error):
        return read_object(path, error)


@contextmanager
def damage_explained(path: Path, error: type[VlmdeployError]) -> Iterator[None]:
    """Append to an error about a file of OUT.partial how to start over."""
    try:
        yield
    except error as problem:
        found = str(problem).removeprefix(f"{path}: ")
        raise error(f"{path}: damaged ({found}); remove {path.parent} to start over") from problem


def empty_partial(folder: Path, last: str) -> None:
    """Empty an unfinished run's folder, except for its lock. The settings file `last` goes last: until then, a killed
    clean-up still looks like an unfinished run."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (last, LOCK):
            path.unlink()
    (folder / last).unlink(missing_ok=True)


def remove_partial(folder: Path, last: str) -> None:
    """Remove an unfinished run's folder, in the order of `empty_partial`."""
    empty_partial(folder, last)
    (folder / LOCK).unlink(missing_ok=True)
    folder.rmdir()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create the folder if needed and lock it against other runs. Raises ExportError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("wb")
    except OSError as error:
        raise ExportError(f"{folder}: cannot be written: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ExportError(f"{folder}: another run is writing it") from error
        yield


def write_file(path: Path, write: Callable[[BinaryIO], Any], sync: bool = True) -> None:
    """Replace a file atomically. sync: return only once it is on the disk."""
    aside = path.with_name(path.name + ".new")
    with aside.open("wb") as file:
        write(file)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    aside.replace(path)


@contextmanager
def unwritable_reported(path: Path) -> Iterator[None]:
    """Turn system errors about `path`, or without a file name (a full disk), into an ExportError about `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and not Path(error.filename).is_relative_to(path):
            raise
        raise ExportError(f"{path}: cannot be written: {error.strerror or error}") from error

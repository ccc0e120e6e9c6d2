"""Publish an output atomically and durably: write it aside, sync it, rename it, sync the folder that names it; only
then drop what it replaces. An existing folder is replaced only with `force`, and only if vlmdeploy made it.

After a kill or a power cut at any moment the old output is whole, or the new one. Long runs keep their finished parts
in OUT.partial, which one run at a time may use."""

import ctypes
import fcntl
import glob
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from vlmdeploy.errors import ExportError, VlmdeployError
from vlmdeploy.input_files import kind_of
from vlmdeploy.records import Config, first_difference, read_object
from vlmdeploy.stopping import undisturbed

_STAGING_SUFFIX = ".staging"
_OLD = f".old{_STAGING_SUFFIX}"
_MARKER = ".vlmdeploy-staging"
_ASIDE = ".new"
LOCK, DISCARDED = "lock", "discarded"  # in OUT.partial
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_AT_FDCWD = -100

Place = tuple[int, int] | None  # device and inode of what lies at a path; None: nothing


def check_output(out: Path, force: bool, is_ours: Callable[[Path], bool]) -> Place:
    """Raise ExportError unless a folder may be written at `out`; returns what may be replaced there."""
    check_name(out)
    place = _place(out)
    if place is None:
        return None
    if not out.is_dir() or out.is_symlink():
        raise ExportError(f"{out}: exists and is not a folder; choose another output")
    if not force:
        raise ExportError(f"{out}: exists already; choose another output or replace it with --force")
    if not is_ours(out):
        raise ExportError(f"{out}: exists and was not made by vlmdeploy, so --force does not replace it")
    return place


def check_file(path: Path) -> None:
    """Raise ExportError unless a file may be written at `path`, or to what the link there names."""
    with suppress(FileNotFoundError):
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise ExportError(f"{path}: is {kind_of(mode)}, expected a file or a name that is free")


def check_not_read(out: Path, inputs: Iterable[Path | None]) -> None:
    """Raise ExportError if writing `out` would replace what the command reads: one of these files, under whatever name,
    or one in these folders; if `out` is a folder, what lies in it."""
    for path in inputs:
        if path is not None and out.exists() and _is_replaced(path, out):
            held = "holds" if out.is_dir() else "is or belongs to"
            raise ExportError(f"{out}: {held} {path}, which this command reads; choose another output")


def _is_replaced(path: Path, out: Path) -> bool:
    if out.is_dir():
        return path.resolve().is_relative_to(out.resolve())
    files = path.rglob("*") if path.is_dir() else (path,)
    return any(each.is_file() and each.samefile(out) for each in files)


def check_name(out: Path) -> None:
    """Raise ExportError for a path that is not UTF-8, which the tensor and graph libraries reject only at the end."""
    try:
        str(out.absolute()).encode()
    except UnicodeEncodeError as error:
        raise ExportError(f"{out}: the path is not valid UTF-8; choose another output") from error


def _place(path: Path) -> Place:
    try:
        status = path.lstat()
    except OSError:  # absent, or not to be reached: writing will say why
        return None
    return status.st_dev, status.st_ino


@contextmanager
def staged_folder(out: Path, force: bool, is_ours: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield a staging folder that becomes `out` if the block succeeds and is removed if it fails.

    First removes what killed runs left. Raises ExportError if `out` may not or cannot be written, and if something
    appeared there in the meantime.
    """
    _remove_leftovers(out.absolute(), is_ours)
    replaced = check_output(out, force, is_ours)
    out = out.absolute()
    staging = _staging_of(out)
    ours: Place = None
    try:
        with undisturbed():
            make_folder(out.parent)
            staging.mkdir()
            ours = _place(staging)
        with _held(staging):
            _mark(staging)
            yield staging
            sync_tree(staging)
            with undisturbed():
                (staging / _MARKER).unlink()
                sync_folder(staging)
                _publish(staging, out, replaced, is_ours)
    except OSError as error:
        where = str(error.filename or staging).replace(str(staging), str(out))
        raise ExportError(f"{out}: cannot be written: {error.strerror or error} ({where})") from error
    finally:
        if ours is not None and _place(staging) == ours:
            with undisturbed():
                _remove_tree(staging)


def _staging_of(out: Path) -> Path:
    """A free name beside `out`, which the next run of the same command recognizes."""
    return out.with_name(f".{out.name}.{secrets.token_hex(4)}{_STAGING_SUFFIX}")


def _mark(staging: Path) -> None:
    """Mark a folder as one that may be removed, before anything in it changes."""
    (staging / _MARKER).touch()
    sync_folder(staging)


def make_folder(folder: Path) -> None:
    """Create a folder and those above it, and return once their names are on the disk."""
    for missing in [path for path in (*reversed(folder.parents), folder) if not path.exists()]:
        missing.mkdir(exist_ok=True)
        sync_folder(missing.parent)


def remove_output(out: Path) -> None:
    """Remove a folder that `staged_folder` wrote. If that is interrupted, the next run to `out` removes the rest."""
    with suppress(OSError):
        staging = out.rename(_staging_of(out))
        sync_folder(out.parent)
        _remove_tree(staging)


def _remove_tree(staging: Path) -> None:
    """Remove a staging folder as far as possible, its mark last; what a single failure leaves goes in a second pass."""
    for _ in range(2):
        with suppress(OSError):
            _mark(staging)
        with suppress(OSError):
            for path in staging.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name != _MARKER:
                    path.unlink()
            sync_folder(staging)
            (staging / _MARKER).unlink(missing_ok=True)
            staging.rmdir()


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Lock a folder itself, so that other runs see that its owner lives; False if another run holds it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _remove_leftovers(out: Path, is_ours: Callable[[Path], bool]) -> None:
    """Delete what killed runs left: a staging folder, or the old output, unless it is the only one."""
    for folder in out.parent.glob(f".{glob.escape(out.name)}.*{_STAGING_SUFFIX}"):
        with suppress(OSError), _held(folder) as is_free:
            if is_free and _place(out) is None and folder.name.endswith(_OLD) and is_ours(folder):
                folder.rename(out)
                sync_folder(out.parent)
            elif is_free and ((folder / _MARKER).is_file() or is_ours(folder) or not any(folder.iterdir())):
                _remove_tree(folder)


def _publish(staging: Path, out: Path, replaced: Place, is_ours: Callable[[Path], bool]) -> None:
    """Give the synced folder its name, in place of what `check_output` allowed to go. Raises ExportError if anything
    else lies there now, which stays."""
    if replaced is None:
        _rename_to_new(staging, out)
        with _undone_on_error(lambda: out.rename(staging), out.parent):
            sync_folder(out.parent)
        return
    old = staging if _exchange(staging, out) else _renamed_away(staging, out)
    with _undone_on_error(lambda: _put_back(staging, out, old), out.parent):
        if _place(old) != replaced or not is_ours(old):  # systems give the number of a deleted folder to a new one
            raise _appeared(out)
        sync_folder(out.parent)
    _remove_tree(old)


@contextmanager
def _undone_on_error(undo: Callable[[], object], folder: Path) -> Iterator[None]:
    """Undo renames in `folder` if the block fails, durably, because what they replaced may be removed next."""
    try:
        yield
    except BaseException:
        undo()
        sync_folder(folder)
        raise


def _rename_to_new(staging: Path, out: Path) -> None:
    """Rename to a name that is free; the system refuses to put a folder over a file or a folder that is not empty."""
    try:
        staging.rename(out)
    except OSError as error:
        if _place(out) is None:
            raise
        raise _appeared(out) from error


def _appeared(out: Path) -> ExportError:
    return ExportError(
        f"{out}: changed while this command ran: another one wrote it; it stays, and this result is discarded"
    )


def _renamed_away(staging: Path, out: Path) -> Path:
    """Two renames, where the system cannot exchange; returns the place of the old output."""
    old = staging.with_name(staging.name.removesuffix(_STAGING_SUFFIX) + _OLD)
    out.rename(old)
    try:
        staging.rename(out)
    except BaseException:
        old.rename(out)
        raise
    return old


def _put_back(staging: Path, out: Path, old: Path) -> None:
    """Undo an exchange, or the two renames. Raises ExportError, saying where the old folder lies, if that fails."""
    if old == staging and _exchange(out, staging):
        return
    try:
        out.rename(staging)  # refused if the old folder is there
        old.rename(out)
    except OSError as error:
        raise ExportError(f"{out}: cannot be put back ({error.strerror}): it lies at {old}") from error


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders atomically; False if the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    return int(renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _EXCHANGE)) == 0


def sync_tree(folder: Path) -> None:
    """Return once every file below a folder, and every name, is on the disk."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            sync_tree(path)
        else:
            sync_file(path)
    sync_folder(folder)


def sync_file(path: Path) -> None:
    """Return once a file's content is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Return once the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def as_umask_says(path: Path) -> None:
    """Give a file that a library wrote for its owner alone the mode of every other new file."""
    mask = os.umask(0o077)  # cannot be read without being set
    os.umask(mask)
    path.chmod(0o666 & ~mask)


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
    elif (folder / DISCARDED).is_file():
        empty_partial(folder, name)
    elif any(item.name != LOCK and not is_aside(item) for item in folder.iterdir()):
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


def empty_partial(folder: Path, name: str) -> None:
    """Empty an unfinished run's folder, except for its lock. The file `name`, without which the rest means nothing,
    first gets a name that says so until the rest has gone: what a kill in between leaves is no unfinished run."""
    with suppress(FileNotFoundError):
        (folder / name).replace(folder / DISCARDED)
    sync_folder(folder)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (DISCARDED, LOCK):
            path.unlink()
    sync_folder(folder)
    (folder / DISCARDED).unlink(missing_ok=True)


def remove_partial(folder: Path, name: str) -> None:
    """Remove an unfinished run's folder, as `empty_partial` empties it."""
    empty_partial(folder, name)
    (folder / LOCK).unlink(missing_ok=True)
    folder.rmdir()


def remove_finished(folder: Path, name: str, settings: Config, error: type[VlmdeployError]) -> None:
    """Remove what a run with these settings left that was killed right after it had published its result."""
    if not folder.is_dir():
        return
    found = {path.name for path in folder.iterdir()}
    is_ours = name in found and read_state(folder / name, error) == settings
    if is_ours or DISCARDED in found or found <= {LOCK}:
        with locked(folder), unwritable_reported(folder):
            remove_partial(folder, name)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create the folder if needed and lock it against other runs. Raises ExportError."""
    try:
        make_folder(folder)
        lock = (folder / LOCK).open("wb")
    except OSError as error:
        with suppress(OSError):
            folder.rmdir()  # unless another run holds it
        raise ExportError(f"{folder}: cannot be written: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ExportError(f"{folder}: another run is writing it") from error
        yield


def write_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Replace a file atomically, and return once it is on the disk; on an error, nothing is left.

    Raises ExportError for a path that holds anything but a regular file; what a link names is replaced, not the link.
    """
    with written_aside(path) as aside, aside.open("wb") as file:
        write(file)


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` for a library to write to, which then replaces it as `write_file` does."""
    check_file(path)
    path = path.resolve()
    start, end = f".{path.stem[:100]}.", f"{_ASIDE}{path.suffix}"
    for left in path.parent.glob(f"{glob.escape(start)}????????{glob.escape(end)}"):
        _remove_if_free(left)
    aside = path.with_name(f"{start}{secrets.token_hex(4)}{end}")
    with aside.open("xb") as held:
        with suppress(OSError):  # where files cannot be locked, none is removed as a leftover
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield aside
            sync_file(aside)
            aside.replace(path)
            sync_folder(path.parent)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise


def _remove_if_free(aside: Path) -> None:
    """Remove what a killed run left of a file; a run that still writes it holds its lock."""
    with suppress(OSError), aside.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        aside.unlink()


def is_aside(path: Path) -> bool:
    """Whether `write_file` was killed while it wrote this file."""
    return path.name.startswith(".") and _ASIDE in path.suffixes[-2:]


@contextmanager
def unwritable_reported(path: Path) -> Iterator[None]:
    """Turn system errors about `path`, or without a file name (a full disk), into an ExportError about `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and not Path(error.filename).is_relative_to(path):
            raise
        raise ExportError(f"{path}: cannot be written: {error.strerror or error}") from error

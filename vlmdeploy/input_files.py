"""Open what came from outside: regular files only, opened once, of bounded size, inside the folder that names them."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from vlmdeploy.byte_sizes import shown_size
from vlmdeploy.errors import VlmdeployError, shown

NOTHING_THERE = "no such file"
MOST_JSON_BYTES = 64 << 20  # of one config, index, report or tokenizer

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO or pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def given_path(value: object, error: type[VlmdeployError], expected: str) -> Path:
    """A caller's path. Raises `error` for a value of another kind."""
    if isinstance(value, str | os.PathLike) and isinstance(path := os.fspath(value), str) and "\0" not in path:
        return Path(path)
    raise error(f"found {shown(value)}, expected {expected}")


def open_input(path: Path, error: type[VlmdeployError], expected: str = "") -> BinaryIO:
    """Open a regular file to read its bytes. Raises `error` for any other kind of file, and for one that is absent.

    expected: what should be there, for the message. Never waits: a FIFO is refused, a device is not even opened.
    """
    wanted = expected and f"; expected {expected}"
    try:
        _require_regular(path.stat(), path, error, expected)
        stream = open(path, "rb", opener=_open_without_waiting)  # noqa: SIM115  # returned
    except FileNotFoundError as problem:
        raise error(f"{path}: no such file{wanted}") from problem
    except (OSError, ValueError) as problem:  # ValueError: a zero byte in the name
        raise error(f"{path}: cannot be read ({getattr(problem, 'strerror', problem)}){wanted}") from problem
    try:
        _require_regular(os.fstat(stream.fileno()), path, error, expected)  # what was opened, not what was there before
    except VlmdeployError:
        stream.close()
        raise
    return stream


def read_input(path: Path, error: type[VlmdeployError], most_bytes: int, expected: str = "") -> bytes:
    """The content of a regular file. Raises `error` as `open_input` does, and for a file of more than `most_bytes`."""
    with open_input(path, error, expected) as stream:
        size = os.fstat(stream.fileno()).st_size
        with _named(path, error):
            content = (stream.read(most_bytes + 1) or b"") if size <= most_bytes else b""  # None: nothing there yet
    if max(size, len(content)) > most_bytes:
        found, wanted = shown_size(max(size, len(content))), expected and f"; expected {expected}"
        raise error(f"{path}: has {found}, at most {shown_size(most_bytes)} are read{wanted}")
    return content


def input_lines(path: Path, error: type[VlmdeployError], longest_bytes: int, expected: str = "") -> Iterator[bytes]:
    """The lines of a regular file, ends included. Raises `error` as `open_input` does, and for a longer line."""
    number = 0
    with open_input(path, error, expected) as stream, _named(path, error):
        while line := stream.readline(longest_bytes + 1):
            number += 1
            if len(line) > longest_bytes:
                raise error(
                    f"{path}:{number}: is longer than {shown_size(longest_bytes)}, the most that a line may have"
                )
            yield line


def why_unreadable(path: Path) -> str:
    """What keeps a path from being opened as a regular file, such as NOTHING_THERE; "" for such a file."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return NOTHING_THERE
    except (OSError, ValueError) as problem:  # a name too long, a folder that may not be entered, a zero byte
        return f"cannot be read ({getattr(problem, 'strerror', problem)})"
    return "" if stat.S_ISREG(mode) else f"is {kind_of(mode)}"


def is_plain_name(name: str) -> bool:
    """Whether a string names an entry of a folder itself: no path, no hidden file, nothing unprintable."""
    return name.isprintable() and not name.startswith(".") and "/" not in name and 0 < len(os.fsencode(name)) < 256


def inside(folder: Path, name: str, error: type[VlmdeployError], follow_links: bool = False) -> Path:
    """The path of the file `name` of a folder that came from outside.

    Raises `error` if the name or a link leads out of the folder. In the cache of Hugging Face
    (models--*/snapshots/REVISION) files are links into its own `blobs`: those are followed, as all are with
    `follow_links`.
    """
    path = folder / name
    if follow_links:
        return path
    try:
        root, target = folder.resolve(), path.resolve()
    except (OSError, RuntimeError, ValueError) as problem:  # a link to itself, a zero byte
        raise error(f"{path}: cannot be followed ({getattr(problem, 'strerror', None) or problem})") from problem
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(target.is_relative_to(place) for place in allowed):
        raise error(f"{path}: leads out of its folder, to {target}; --follow-links allows it")
    return path


def find_inside(folder: Path, name: str, error: type[VlmdeployError], follow_links: bool = False) -> Path | None:
    """`inside` for a file that may be absent: None if the folder has no entry of this name, not even a broken link."""
    return inside(folder, name, error, follow_links) if os.path.lexists(folder / name) else None


def kind_of(mode: int) -> str:
    """What a file is that is no regular one, from its st_mode."""
    return _KINDS.get(stat.S_IFMT(mode), "no regular file")


@contextmanager
def _named(path: Path, error: type[VlmdeployError]) -> Iterator[None]:
    """Turn the system's errors while reading an open file into `error`."""
    try:
        yield
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror})") from problem


def _require_regular(status: os.stat_result, path: Path, error: type[VlmdeployError], expected: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise error(f"{path}: is {kind_of(status.st_mode)}, expected {expected or 'a file'}")


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)

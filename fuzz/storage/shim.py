"""Compiles and drives shim.c, which sees and fails what this process does to the files of one folder."""

import ctypes
import errno
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

KINDS = (
    "create", "truncate", "write", "sync", "rename", "exchange", "unlink", "mkdir", "rmdir", "link", "symlink", "chmod",
    "allocate",
)  # fmt: skip
HEADER = struct.Struct("=10q")
SHORT_WRITE = -1  # instead of an error number


@dataclass(frozen=True)
class Operation:
    """One operation, as shim.c saw it. Files and folders go by inode numbers, which the system uses again.

    size: the new length of a file, the mode of what is made, or how much was to be written. error: 0 if it succeeded.
    """

    kind: str
    error: int
    inode: int
    folder: int
    to_folder: int
    offset: int
    size: int
    name: str
    to_name: str
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class Fault:
    """The operation with number `at` fails with `error`, or is a short write; for_good: the disk stays full."""

    at: int = -1
    error: int = 0
    for_good: bool = False
    can_exchange: bool = True  # whether folders can be exchanged in one step

    def in_words(self) -> str:
        """What happens at that operation."""
        if self.error == SHORT_WRITE:
            return "half"
        return f"{errno.errorcode[self.error]}{' from then on' if self.for_good else ''}"


class Shim:
    """The library, loaded into this process for the rest of its life."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self._library = ctypes.CDLL(str(compile_shim(Path(folder))))
        self._library.shim_stop.restype = ctypes.POINTER(ctypes.c_char)
        self._library.shim_count.restype = ctypes.c_long
        self.operations: list[Operation] = []
        error = self._library.shim_install()
        if error:
            raise OSError(error, f"seccomp filters: {os.strerror(error)}")

    @contextmanager
    def watching(self, root: Path, fault: Fault) -> Iterator[None]:
        """See what the block does below `root`; afterwards `operations` holds it."""
        arguments = (ctypes.c_long(fault.at), ctypes.c_long(fault.error), fault.for_good, fault.can_exchange)
        self._library.shim_start(os.fsencode(root.resolve()), *arguments)
        try:
            yield
        finally:
            length = ctypes.c_size_t()
            start = self._library.shim_stop(ctypes.byref(length))
            self.operations = list(read_log(ctypes.string_at(start, length.value)))

    def count(self) -> int:
        """How many operations there have been so far."""
        return int(self._library.shim_count())


def compiler() -> str | None:
    """The C compiler of this machine."""
    return shutil.which("gcc") or shutil.which("cc")


def compile_shim(folder: Path) -> Path:
    """Compile shim.c into a folder; returns the library's path."""
    library, found = folder / "shim.so", compiler()
    assert found is not None, "the callers look for a compiler first"
    flags = ("-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")
    subprocess.run([found, *flags, "-o", library, Path(__file__).with_name("shim.c")], check=True)
    return library


def read_log(content: bytes) -> Iterator[Operation]:
    """The operations of a log of shim.c."""
    start = 0
    while start < len(content):
        kind, error, inode, folder, to_folder, offset, size, *lengths = HEADER.unpack_from(content, start)
        start += HEADER.size
        parts = []
        for length in lengths:
            parts.append(content[start : start + length])
            start += length
        name, to_name, data = parts
        yield Operation(
            KINDS[kind], error, inode, folder, to_folder, offset, size, os.fsdecode(name), os.fsdecode(to_name), data
        )

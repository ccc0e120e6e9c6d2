"""Activations of all calibration tokens, one row per token, in memory or in a file.

Files are read and written, not mapped: mapped pages would count as this process's memory.
"""

import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmdeploy.overriding import override

Ints = NDArray[np.int64]
FLOAT_BYTES = 4


class Activations(Protocol):
    """float32 [tokens, width]."""

    width: int

    def read(self, rows: Ints) -> Tensor:
        """Copy some rows, [rows, width]."""

    def write(self, rows: Ints, values: Tensor) -> None:
        """Replace some rows."""

    def add(self, rows: Ints, values: Tensor) -> None:
        """Add to some rows."""

    def close(self) -> None:
        """Free the memory or the file. Closing twice is harmless."""


class MemoryActivations(Activations):
    """Activations in memory."""

    def __init__(self, tokens: int, width: int, pool: "Pool") -> None:
        self.width = width
        self.values = torch.zeros(tokens, width)
        self._pool = pool

    @override
    def read(self, rows: Ints) -> Tensor:
        return self.values[torch.from_numpy(rows)]

    @override
    def write(self, rows: Ints, values: Tensor) -> None:
        self.values[torch.from_numpy(rows)] = values

    @override
    def add(self, rows: Ints, values: Tensor) -> None:
        self.values.index_add_(0, torch.from_numpy(rows), values)

    @override
    def close(self) -> None:
        self._pool.used_bytes -= self.values.numel() * FLOAT_BYTES
        self.values = torch.empty(0)


class FileActivations(Activations):
    """Activations in a file, deleted on close."""

    def __init__(self, path: Path, tokens: int, width: int) -> None:
        self.width = width
        self.path = path
        self._is_open = True
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.posix_fallocate(self._file, 0, max(1, tokens * width * FLOAT_BYTES))  # a full disk fails here

    @override
    def read(self, rows: Ints) -> Tensor:
        values = np.empty((len(rows), self.width), np.float32)
        for start, stop in _runs(rows):
            _read_into(self._file, values[start:stop], self._offset(rows[start]))
        return torch.from_numpy(values)

    @override
    def write(self, rows: Ints, values: Tensor) -> None:
        content = np.ascontiguousarray(values.numpy(), np.float32)
        for start, stop in _runs(rows):
            _write_all(self._file, content[start:stop], self._offset(rows[start]))

    @override
    def add(self, rows: Ints, values: Tensor) -> None:
        self.write(rows, self.read(rows).add_(values))

    @override
    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            os.close(self._file)
            self.path.unlink(missing_ok=True)

    def _offset(self, row: np.int64) -> int:
        return int(row) * self.width * FLOAT_BYTES


def _runs(rows: Ints) -> list[tuple[int, int]]:
    """Ranges of `rows` that hold consecutive row numbers."""
    edges = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    return [(start, stop) for start, stop in pairwise(edges) if start < stop]


def _read_into(file: int, values: NDArray[np.float32], offset: int) -> None:
    view = memoryview(values.view(np.uint8).reshape(-1).data)
    done = 0
    while done < len(view):
        count = os.preadv(file, [view[done:]], offset + done)
        assert count, "the file was allocated in full"
        done += count


def _write_all(file: int, values: NDArray[np.float32], offset: int) -> None:
    view = memoryview(values.view(np.uint8).reshape(-1).data)
    done = 0
    while done < len(view):
        done += os.pwrite(file, view[done:], offset + done)


@dataclass
class Pool:
    """Allocates activations: up to `limit_bytes` in memory, the rest as files in `folder`."""

    folder: Path
    limit_bytes: int
    used_bytes: int = 0
    made: int = 0

    def make(self, tokens: int, width: int) -> Activations:
        """Allocate rows of zeros."""
        size = tokens * width * FLOAT_BYTES
        self.made += 1
        if self.used_bytes + size <= self.limit_bytes:
            self.used_bytes += size
            return MemoryActivations(tokens, width, self)
        self.folder.mkdir(exist_ok=True)
        return FileActivations(self.folder / f"{self.made}.spill", tokens, width)

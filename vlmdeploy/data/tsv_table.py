"""Tables of questions as tab-separated values with base64 pictures, the format of VLMEvalKit's data sets.

Quoting follows pandas (RFC 4180 with tabs). Rows are read one by one and keep only the place of their pictures, so
memory is bounded by the texts and the largest row. `vlmevalkit` interprets the columns.
"""

import ast
import csv
import hashlib
import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from vlmdeploy.byte_sizes import shown_size
from vlmdeploy.data.stored_picture import LONGEST_TEXT, StoredPicture
from vlmdeploy.errors import DataError
from vlmdeploy.input_files import input_lines

LONGEST_CELL = LONGEST_TEXT  # characters; an unclosed quote would read the rest of the file into one cell
LONGEST_ROW_BYTES = 2**29
MOST_TABS = 100_000  # of a row, those in texts included
LONGEST_LITERAL = 2**16  # characters of a list that Python's parser reads; lists of plain texts may be longer
LONGEST_INDEX = 64  # an image cell up to this length names another row, whose picture it shares
MISSING = frozenset(("", "nan"))  # an empty cell, also after str()
REFERENCE = "\0index "  # marks the name of another row until all rows are read; no path can start like this
IMAGE, IMAGE_PATH, INDEX = "image", "image_path", "index"

PLAIN_TEXT = re.compile(r"""'[^'"\\\r\n]*+'|"[^'"\\\r\n]*+\"""")
PLAIN_LIST = re.compile(rf"\[\s*+(?:{PLAIN_TEXT.pattern})(?:\s*+,\s*+(?:{PLAIN_TEXT.pattern}))*+\s*+,?\s*+\]")

Cells: TypeAlias = dict[str, str]


@dataclass(frozen=True)
class TableRow:
    """One question: its cells without the image; `pictures` in order, as places or paths."""

    line: int
    cells: Cells
    pictures: tuple[StoredPicture | str, ...]

    @property
    def index(self) -> str:
        """The question's name."""
        return self.cells[INDEX]

    def text(self, column: str) -> str | None:
        """A cell's raw text; None if the column or the cell is missing."""
        cell = self.cells.get(column, "")
        return None if cell.strip() in MISSING else cell


@dataclass(frozen=True)
class Table:
    """Columns without the image, and rows; without_picture: how many rows were dropped for lack of a picture."""

    path: Path
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]
    without_picture: int = 0


def literal_list(cell: str) -> list[str] | None:
    """The items, as texts, of a cell that holds a Python list literal; None for any other cell."""
    if not (cell.startswith("[") and cell.endswith("]")):
        return None
    if PLAIN_LIST.fullmatch(cell):
        return [text[1:-1] for text in PLAIN_TEXT.findall(cell)]
    try:
        items = ast.literal_eval(cell) if len(cell) <= LONGEST_LITERAL else None
        texts = [str(item) for item in items] if isinstance(items, list) else None
        "".join(texts or ()).encode()  # escapes may stand for what is no text
        return texts
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def read_table(path: Path) -> Table:
    """Read a table. Drops and counts rows without a picture if others have one, as VLMEvalKit does.

    Raises DataError, naming file and line, for text that is not UTF-8 or not a table, a missing or repeated index, an
    image cell that names no picture, and an empty picture column.
    """
    with LONG_CELLS:
        found = read_rows(path)
        columns = _columns(path, next(found, RowOfCells(1, [])).cells)
        rows = _by_index(path, (_row(path, row, columns) for row in found if row.cells))
    if not rows:
        raise DataError(f"{path}: holds no rows, only a header")
    shown = tuple(column for column in columns if column != IMAGE)
    resolved = [_with_pictures(path, row, rows) for row in rows.values()]
    kept = tuple(row for row in resolved if row.pictures)
    for column in (IMAGE, IMAGE_PATH):
        if column in columns and not kept:
            raise DataError(f'{path}: column "{column}" is empty in every row; remove it if the rows are text only')
    return Table(path, shown, kept or tuple(resolved), len(resolved) - len(kept) if kept else 0)


def _by_index(path: Path, rows: Iterable[TableRow]) -> dict[str, TableRow]:
    by_index: dict[str, TableRow] = {}
    for row in rows:
        if row.index in by_index:
            first = by_index[row.index].line
            raise DataError(f'{path}:{row.line}: index "{row.index:.200}" is already in line {first}')
        by_index[row.index] = row
    return by_index


@dataclass(frozen=True)
class RowOfCells:
    """One row of tab-separated values: the number of its first line, its cells, its place in the file and its bytes."""

    line: int
    cells: list[str]
    start: int = 0
    content: bytes = b""


def read_rows(path: Path) -> Iterator[RowOfCells]:
    """The rows of a file, header first, one by one; the caller holds LONG_CELLS. Raises DataError, naming the row's
    first line."""
    lines = _Lines(path)
    reader = csv.reader(lines, delimiter="\t", strict=True)
    try:
        for cells in reader:
            yield RowOfCells(lines.row_line, cells, lines.row_start, lines.row())
            lines.start_row()
    except csv.Error as error:
        found = f"cannot be read as tab-separated values ({error}); are quotes doubled and closed?"
        raise DataError(f"{path}:{lines.row_line}: {found}") from error


class _LongCells(AbstractContextManager[None]):
    """Raises the process's limit of a cell while any thread reads, and restores what it was."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_readers = self._limit = 0

    def __enter__(self) -> None:
        with self._lock:
            if self._num_readers == 0:
                self._limit = csv.field_size_limit(LONGEST_CELL)
            self._num_readers += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_readers -= 1
            if self._num_readers == 0:
                csv.field_size_limit(self._limit)


LONG_CELLS = _LongCells()


class _Lines(Iterator[str]):
    """The file's lines as text; tracks the start and the bytes of the current row."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines = input_lines(path, DataError, LONGEST_ROW_BYTES)
        self._end = self._line = 0
        self.start_row()

    def __next__(self) -> str:
        line = next(self._lines)
        self._parts.append(line)
        self._end += len(line)
        self._line += 1
        self._tabs += line.count(b"\t")
        if self._end - self.row_start > LONGEST_ROW_BYTES or self._tabs > MOST_TABS:
            expected = f"at most {shown_size(LONGEST_ROW_BYTES)} and {MOST_TABS} tabs are read"
            raise DataError(f"{self._path}:{self.row_line}: the row is too long, {expected}; is a quote not closed?")
        try:
            return line.decode("utf-8-sig" if self._line == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{self._path}:{self._line}: not UTF-8 ({error.reason} at byte {error.start})") from error

    def start_row(self) -> None:
        """The next line starts a new row."""
        self._parts: list[bytes] = []
        self._tabs = 0
        self.row_start, self.row_line = self._end, self._line + 1

    def row(self) -> bytes:
        """The bytes of the row read last."""
        return b"".join(self._parts)


def _columns(path: Path, header: list[str]) -> list[str]:
    columns = [name.strip() for name in header]
    doubled = sorted(name for name, count in Counter(columns).items() if count > 1)
    if doubled:
        raise DataError(f'{path}:1: column "{doubled[0]:.200}" is twice in the header')
    for name in (INDEX, "question"):
        if name not in columns:
            found = ", ".join(columns)[:200] or "nothing"
            raise DataError(f'{path}:1: has no column "{name}"; the first line holds {found}, expected a header')
    return columns


def _row(path: Path, row: RowOfCells, columns: list[str]) -> TableRow:
    where = f"{path}:{row.line}"
    if len(row.cells) != len(columns):
        raise DataError(f"{where}: has {len(row.cells)} cells, the header {len(columns)}")
    named = dict(zip(columns, row.cells, strict=True))
    named[INDEX] = named[INDEX].strip()
    if named[INDEX] in MISSING:
        raise DataError(f"{where}: has no index")
    image = named.pop(IMAGE, "").strip()
    if image in MISSING:
        return TableRow(row.line, named, tuple(_items(named.get(IMAGE_PATH, "").strip())))
    name = f'{path.name}, index "{named[INDEX]}"'
    return TableRow(row.line, named, tuple(_pictures(path, row, _items(image), name)))


def _items(cell: str) -> list[str]:
    if cell in MISSING:
        return []
    items = literal_list(cell)
    return [cell] if items is None else items


def _pictures(path: Path, row: RowOfCells, texts: list[str], name: str) -> Iterator[StoredPicture | str]:
    """The places of pictures' texts in the file; a short text is a reference to another row."""
    end = 0
    for text in texts:
        if len(text) <= LONGEST_INDEX:
            yield f"{REFERENCE}{text.strip()}"
            continue
        encoded = text.encode()
        place = row.content.find(encoded, end)  # they stand in the same order
        if place < 0:  # the text has escapes, which base64 never has
            raise DataError(f"{path}:{row.line}: its image is not base64, it starts with {text[:40]!r}")
        end = place + len(encoded)
        yield StoredPicture(path, hashlib.sha256(encoded).hexdigest(), row.start + place, len(encoded), name)


def _with_pictures(path: Path, row: TableRow, rows: dict[str, TableRow]) -> TableRow:
    return replace(row, pictures=tuple(_resolved(path, row, picture, rows) for picture in row.pictures))


def _resolved(
    path: Path, row: TableRow, picture: StoredPicture | str, rows: dict[str, TableRow]
) -> StoredPicture | str:
    if isinstance(picture, StoredPicture) or not picture.startswith(REFERENCE):
        return picture
    name = picture.removeprefix(REFERENCE)
    pictures = rows[name].pictures if name in rows else ()
    if len(pictures) != 1 or not isinstance(pictures[0], StoredPicture):
        raise DataError(f'{path}:{row.line}: its image "{name}" names no row that holds a picture')
    return pictures[0]

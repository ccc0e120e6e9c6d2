"""Tables of questions as tab-separated values with base64 pictures, the format of VLMEvalKit's data sets.

Quoting follows pandas (RFC 4180 with tabs). Rows are read one by one and keep only the place of their pictures, so
memory is bounded by the texts and the largest row. `vlmevalkit` interprets the columns.
"""

import ast
import csv
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, TypeAlias

from vlmdeploy.data.stored_picture import StoredPicture
from vlmdeploy.errors import DataError

LONGEST_CELL = 2**28  # characters; an unclosed quote would read the rest of the file into one cell
LONGEST_INDEX = 64  # an image cell up to this length names another row, whose picture it shares
MISSING = frozenset(("", "nan"))  # an empty cell, also after str()
REFERENCE = "\0index "  # marks the name of another row until all rows are read; no path can start like this
IMAGE, IMAGE_PATH, INDEX = "image", "image_path", "index"

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
    try:
        items = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return [str(item) for item in items] if isinstance(items, list) else None


def read_table(path: Path) -> Table:
    """Read a table. Drops and counts rows without a picture if others have one, as VLMEvalKit does.

    Raises DataError, naming file and line, for text that is not UTF-8 or not a table, a missing or repeated index, an
    image cell that names no picture, and an empty picture column.
    """
    limit = csv.field_size_limit(LONGEST_CELL)
    try:
        with path.open("rb") as file:
            return _read(path, file)
    finally:
        csv.field_size_limit(limit)


def _read(path: Path, file: BinaryIO) -> Table:
    lines = _Lines(path, file)
    cells_of_rows = _cells(path, lines)
    columns = _columns(path, next(cells_of_rows, []))
    rows: dict[str, TableRow] = {}
    for cells in cells_of_rows:
        if cells:
            row = _row(path, lines, columns, cells)
            if row.index in rows:
                first = rows[row.index].line
                raise DataError(f'{path}:{row.line}: index "{row.index}" is already in line {first}')
            rows[row.index] = row
    if not rows:
        raise DataError(f"{path}: holds no rows, only a header")
    shown = tuple(column for column in columns if column != IMAGE)
    found = [_with_pictures(path, row, rows) for row in rows.values()]
    kept = tuple(row for row in found if row.pictures)
    for column in (IMAGE, IMAGE_PATH):
        if column in columns and not kept:
            raise DataError(f'{path}: column "{column}" is empty in every row; remove it if the rows are text only')
    return Table(path, shown, kept or tuple(found), len(found) - len(kept) if kept else 0)


def _cells(path: Path, lines: "_Lines") -> Iterator[list[str]]:
    """The cells of each row, header first; an error names the row's first line."""
    reader = csv.reader(lines, delimiter="\t", strict=True)
    try:
        for cells in reader:
            yield cells
            lines.start_row()
    except csv.Error as error:
        found = f"cannot be read as tab-separated values ({error}); are quotes doubled and closed?"
        raise DataError(f"{path}:{lines.row_line}: {found}") from error


class _Lines(Iterator[str]):
    """The file's lines as text; tracks the start and the bytes of the current row."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._end = self._line = 0
        self.start_row()

    def __next__(self) -> str:
        line = next(self._file)
        self._parts.append(line)
        self._end += len(line)
        self._line += 1
        try:
            return line.decode("utf-8-sig" if self._line == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{self._path}:{self._line}: not UTF-8 ({error.reason} at byte {error.start})") from error

    def start_row(self) -> None:
        """The next line starts a new row."""
        self._parts: list[bytes] = []
        self.row_start, self.row_line = self._end, self._line + 1

    def row(self) -> bytes:
        """The bytes of the row read last."""
        return b"".join(self._parts)


def _columns(path: Path, header: list[str]) -> list[str]:
    columns = [name.strip() for name in header]
    doubled = sorted({name for name in columns if columns.count(name) > 1})
    if doubled:
        raise DataError(f'{path}:1: column "{doubled[0]}" is twice in the header')
    for name in (INDEX, "question"):
        if name not in columns:
            found = ", ".join(columns)[:200] or "nothing"
            raise DataError(f'{path}:1: has no column "{name}"; the first line holds {found}, expected a header')
    return columns


def _row(path: Path, lines: _Lines, columns: list[str], cells: list[str]) -> TableRow:
    where = f"{path}:{lines.row_line}"
    if len(cells) != len(columns):
        raise DataError(f"{where}: has {len(cells)} cells, the header {len(columns)}")
    named = dict(zip(columns, cells, strict=True))
    named[INDEX] = named[INDEX].strip()
    if named[INDEX] in MISSING:
        raise DataError(f"{where}: has no index")
    image = named.pop(IMAGE, "").strip()
    if image in MISSING:
        return TableRow(lines.row_line, named, tuple(_items(named.get(IMAGE_PATH, "").strip())))
    name = f'{path.name}, index "{named[INDEX]}"'
    pictures = tuple(_picture(path, lines, item, name) for item in _items(image))
    return TableRow(lines.row_line, named, pictures)


def _items(cell: str) -> list[str]:
    if cell in MISSING:
        return []
    items = literal_list(cell)
    return [cell] if items is None else items


def _picture(path: Path, lines: _Lines, text: str, name: str) -> StoredPicture | str:
    """The place of a picture's text in the file; a short text is a reference to another row."""
    if len(text) <= LONGEST_INDEX:
        return f"{REFERENCE}{text.strip()}"
    encoded = text.encode()
    place = lines.row().find(encoded)
    if place < 0:  # the text has escapes, which base64 never has
        raise DataError(f"{path}:{lines.row_line}: its image is not base64, it starts with {text[:40]!r}")
    return StoredPicture(path, hashlib.sha256(encoded).hexdigest(), lines.row_start + place, len(encoded), name)


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

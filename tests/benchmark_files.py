"""Small files in the forms of public benchmarks, for the tests of their readers and of `validate`."""

import base64
import csv
import io
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

Row = Mapping[str, object]


def png(color: str = "red", size: tuple[int, int] = (40, 20)) -> bytes:
    """A picture's file."""
    content = io.BytesIO()
    Image.new("RGB", size, color).save(content, "PNG")
    return content.getvalue()


def picture_cell(color: str = "red") -> str:
    """A picture as VLMEvalKit stores it."""
    return base64.b64encode(png(color)).decode()


def write_tsv(path: Path, *rows: Row, quoting: int = csv.QUOTE_MINIMAL) -> Path:
    """A table as pandas writes it: the columns of all rows, cells quoted where needed, missing ones empty."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter="\t", quoting=quoting, lineterminator="\n")  # type: ignore[arg-type]
    writer.writerow(columns)
    writer.writerows([row.get(column, "") for column in columns] for row in rows)
    path.write_bytes(text.getvalue().encode())
    return path

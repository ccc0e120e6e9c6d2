"""Output of the command line: results on stdout, progress and warnings on stderr, one line per error."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

ReportProgress = Callable[[str, int, int], None]
UNWRAPPED = 2**20  # columns, wider than any row
stderr = Console(stderr=True, soft_wrap=True, highlight=False)


def print_json(value: Any) -> None:
    """Print one JSON document, in ASCII if stdout cannot show all of it (file names that are not UTF-8)."""
    text = json.dumps(value, indent=1, ensure_ascii=False, default=_plain)
    print(text if _showable(text) == text else json.dumps(value, indent=1, default=_plain))


def _showable(text: str) -> str:
    """The text with backslash escapes for characters that stdout's encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value)


def print_headline(text: str) -> None:
    """Print a command's result on stdout in whole lines, never wrapped or cut."""
    print(_showable(text))


def print_rows(headline: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a headline and a table on stdout. A terminal wraps long cells; in a file or pipe each row is one line."""
    print_headline(headline)
    table = Table()
    for column in columns:
        table.add_column(Text(column), overflow="fold")
    for row in rows:
        table.add_row(*(Text(_showable(cell)) for cell in row))
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else UNWRAPPED, highlight=False).print(table)


def warn(message: str) -> None:
    """Print one warning line on stderr."""
    print(f"Warning: {message}", file=sys.stderr)


@contextmanager
def progress_bar() -> Iterator[ReportProgress]:
    """Yields a function (stage, done, total) that draws a bar on a terminal and does nothing elsewhere."""
    if not stderr.is_terminal:
        yield lambda stage, done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda stage, done, total: bar.update(task, description=stage, completed=done, total=total or None)

"""Output of the command line: results on stdout, progress and warnings on stderr, one line per error.

What comes from outside, such as paths and titles, is printed with its control characters as escapes.
"""

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

from vlmdeploy.errors import VlmdeployError, escaped
from vlmdeploy.standard_streams import WARNING, say, silence

ReportProgress = Callable[[str, int, int], None]
UNWRAPPED = 2**20  # columns, wider than any row


class OutputError(VlmdeployError):
    """Standard output cannot be written; number: of the system's error."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"standard output cannot be written: {error.strerror}")
        self.number = error.errno


@contextmanager
def output_reported() -> Iterator[None]:
    """Turn the errors of a block that writes nothing but stdout into OutputError."""
    try:
        yield
    except OSError as error:
        silence(sys.stdout)
        raise OutputError(error) from error


def write(text: str) -> None:
    """Write to stdout at once, with backslash escapes for characters that its encoding lacks. Raises OutputError."""
    with output_reported():
        sys.stdout.write(_encodable(text))
        sys.stdout.flush()


def _encodable(text: str) -> str:
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def print_json(value: Any) -> None:
    """Print one JSON document, in ASCII if not all of it can be shown (file names that are not UTF-8)."""
    text = json.dumps(value, indent=1, ensure_ascii=False, default=_plain)
    is_shown = escaped(text, kept="\n") == _encodable(text) == text
    write(f"{text if is_shown else json.dumps(value, indent=1, default=_plain)}\n")


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value)


def print_answer(piece: str) -> None:
    """Print a piece of a model's answer; on a terminal, which would obey them, its control characters as escapes."""
    write(escaped(piece, kept="\n\t") if sys.stdout.isatty() else piece)


def print_headline(text: str) -> None:
    """Print one line of a command's result on stdout, never wrapped or cut."""
    write(f"{escaped(text)}\n")


def print_rows(headline: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a headline and a table on stdout. A terminal wraps long cells; in a file or pipe each row is one line."""
    print_headline(headline)
    table = Table()
    for column in columns:
        table.add_column(Text(escaped(column)), overflow="fold")
    for row in rows:
        table.add_row(*(Text(_encodable(escaped(cell))) for cell in row))
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else UNWRAPPED, highlight=False)
    with console.capture() as captured:
        console.print(table)
    write(captured.get())


def warn(message: str) -> None:
    """Print one warning line on stderr."""
    say(f"{WARNING}{message}")


@contextmanager
def progress_bar() -> Iterator[ReportProgress]:
    """Yields a function (stage, done, total) that draws a bar on a terminal and does nothing elsewhere."""
    stderr = Console(stderr=True, soft_wrap=True, highlight=False)
    if not stderr.is_terminal:
        yield lambda stage, done, total: None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda stage, done, total: bar.update(
            task, description=escaped(stage), completed=done, total=total or None
        )

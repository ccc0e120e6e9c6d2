"""Standard streams that are open and never fail, with every warning and log record as one printable line on stderr,
whichever library it comes from."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from vlmdeploy.errors import one_line
from vlmdeploy.overriding import override

WARNING = "Warning: "  # begins a line on stderr
FOR_DEVELOPERS = (DeprecationWarning, FutureWarning, ImportWarning, PendingDeprecationWarning, ResourceWarning)
ONLY_ERRORS = ("matplotlib",)  # its warnings are about caches and fonts


def open_missing_streams() -> None:
    """Open on /dev/null what the caller closed of stdin, stdout and stderr: the next file that anybody opens would get
    its number, and what libraries print would end in that file."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is the missing one
            os.set_inheritable(nowhere, True)
            setattr(sys, name, os.fdopen(nowhere, mode))


def say(line: str) -> None:
    """Print one printable line on stderr."""
    print(one_line(line), file=sys.stderr, flush=True)


def silence(stream: TextIO) -> None:
    """Send what is written to a broken stream from now on, and what it still holds, to nowhere."""
    with suppress(OSError):  # no file of the system
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextmanager
def lines_on_stderr() -> Iterator[None]:
    """In the block stderr never fails, not even on a full disk or when its terminal is gone; warnings and log records
    are lines there."""
    with _unfailing_stderr(), warnings.catch_warnings(), logged(logging.getLogger(), f"{WARNING}%(message)s"):
        warnings.showwarning = cast(Any, _show_warning)
        for name in ONLY_ERRORS:
            logging.getLogger(name).setLevel(logging.ERROR)
        yield


@contextmanager
def logged(logger: logging.Logger, form: str, level: int = logging.WARNING) -> Iterator[None]:
    """Print the records of a logger and those below it, one line each and each once. form: of `logging.Formatter`."""
    handler = _LineHandler(level)
    handler.setFormatter(logging.Formatter(form, "%H:%M:%S"))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _LineHandler(logging.Handler):
    def __init__(self, level: int) -> None:
        super().__init__(level)
        self._said: set[str] = set()

    @override
    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        if line not in self._said:  # every answer would repeat the warnings about its picture
            self._said.add(line)
            say(line)


def _show_warning(message: Warning | str, category: type[Warning], *where: Any) -> None:
    if not issubclass(category, FOR_DEVELOPERS):
        say(f"{WARNING}{message}")


@contextmanager
def _unfailing_stderr() -> Iterator[None]:
    before = sys.stderr
    sys.stderr = cast(TextIO, _Unfailing(before))
    try:
        yield
    finally:
        sys.stderr = before


class _Unfailing:
    """A stream that drops what it cannot write."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text, if that is possible."""
        try:
            return self._stream.write(text)
        except OSError:
            silence(self._stream)
            return len(text)

    def flush(self) -> None:
        """Write what is held back, if that is possible."""
        try:
            self._stream.flush()
        except OSError:
            silence(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

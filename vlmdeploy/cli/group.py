"""The group of all commands: prints errors as one line, tracebacks only with --debug, and handles Ctrl-C."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click

import vlmdeploy
from vlmdeploy.errors import VlmdeployError

EXTRAS = {
    "sklearn": "digits",
    "onnxruntime": "cpu",
    "jinja2": "report",
    "matplotlib": "report",
    "openpyxl": "report",
    "ray": "sweep",
}  # extra that installs a module, if not the toolchain


class Group(click.Group):
    """Prints our errors as one line on stderr and exits with status 1; --debug shows the traceback."""

    def invoke(self, context: click.Context) -> Any:
        """Run the command."""
        with noted_interrupts() as interrupts:
            try:
                return super().invoke(context)
            except (Exception, KeyboardInterrupt) as error:
                is_interrupt = bool(interrupts) or isinstance(error, (KeyboardInterrupt, click.Abort))
                line = "interrupted" if is_interrupt else error_line(error)
                if line is None or (context.params.get("debug") and not is_interrupt):
                    raise
                if not getattr(error, "is_reported_elsewhere", False):
                    print(f"Error: {line}", file=sys.stderr)
                context.exit(1)


def error_line(error: BaseException) -> str | None:
    """The message for an error that the user can solve; None for click's errors and our bugs."""
    if isinstance(error, VlmdeployError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("vlmdeploy"):
        return f'{error.name} is not installed: pip install "vlmdeploy[{EXTRAS.get(error.name, "cpu,toolchain")}]"'
    return None


@contextmanager
def noted_interrupts() -> Iterator[list[int]]:
    """Record every Ctrl-C in the list, and raise KeyboardInterrupt as usual.

    Compiled libraries turn that exception into misleading errors; the list shows the real cause.
    """
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        raise KeyboardInterrupt

    is_ours = threading.current_thread() is threading.main_thread()
    if not (is_ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
        yield noted  # another handler is installed, or Ctrl-C is ignored
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(vlmdeploy.__version__, prog_name="vlmdeploy")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Put a vision-language model of the CogVLM kind on a small device: exact, verified, small and fast."""

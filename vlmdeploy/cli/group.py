"""The group of all commands: prints errors as one line, tracebacks only with --debug, and ends by signals cleanly."""

import errno
import io
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

import vlmdeploy
from vlmdeploy.cli.console import OutputError, output_reported
from vlmdeploy.errors import VlmdeployError
from vlmdeploy.standard_streams import lines_on_stderr, open_missing_streams, say
from vlmdeploy.stopping import Stopped, stopped_by_signals

EXTRAS = {
    "sklearn": "digits",
    "onnxruntime": "cpu",
    "jinja2": "report",
    "matplotlib": "report",
    "openpyxl": "report",
    "ray": "sweep",
}  # extra that installs a module, if not the toolchain


class Command(click.Command):
    """Tells when stdout cannot take its help."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parse the options."""
        with output_reported():
            return super().make_context(*args, **kwargs)


class Group(Command, click.Group):
    """Prints our errors as one line on stderr and exits with status 1; --debug shows the traceback."""

    command_class = Command

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line and exit with its status."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        open_missing_streams()
        with lines_on_stderr(), stopped_by_signals() as signals:
            try:
                status = super().main(args, prog_name, complete_var, standalone_mode=False, obj=signals, **extra)
            except click.ClickException as error:
                status = error.exit_code
                for line in _lines_of(error):
                    say(line)
            except (VlmdeployError, click.Abort, KeyboardInterrupt, Stopped) as error:
                status = reported(error, signals)
            sys.exit(status)

    def invoke(self, context: click.Context) -> Any:
        """Run the command."""
        signals = [] if context.obj is None else context.obj
        try:
            return super().invoke(context)
        except (Exception, KeyboardInterrupt, Stopped) as error:
            is_stopped = bool(signals) or isinstance(error, KeyboardInterrupt)
            if context.params.get("debug") and not is_stopped and error_line(error) is not None:
                traceback.print_exc()
                context.exit(1)
            status = reported(error, signals)
            if status is None:
                raise
            context.exit(status)


def _lines_of(error: click.ClickException) -> list[str]:
    """Click's usage and message."""
    shown = io.StringIO()
    error.show(file=shown)
    return shown.getvalue().splitlines()


def reported(error: BaseException, signals: list[int]) -> int | None:
    """Print the line of an error; returns the exit status, or None for click's errors and our bugs.

    signals: those that came, which decide what to tell.
    """
    if signals and signals[0] != signal.SIGINT:
        say(f"Error: stopped by {signal.Signals(signals[0]).name}")
        return 128 + signals[0]
    if signals or isinstance(error, KeyboardInterrupt | click.Abort):
        say("Error: interrupted")
        return 1
    if isinstance(error, OutputError) and error.number == errno.EPIPE:
        return 128 + signal.SIGPIPE  # the reader has enough, as in `| head`
    line = error_line(error)
    if line is None:
        return None
    if not getattr(error, "is_reported_elsewhere", False):
        say(f"Error: {line}")
    return 1


def error_line(error: BaseException) -> str | None:
    """The message for an error that the user can solve; None for click's errors and our bugs."""
    if isinstance(error, VlmdeployError):
        return str(error)
    if isinstance(error, OSError) and error.strerror is not None:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("vlmdeploy"):
        return f'{error.name} is not installed: pip install "vlmdeploy[{EXTRAS.get(error.name, "cpu,toolchain")}]"'
    return None


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(vlmdeploy.__version__, prog_name="vlmdeploy")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Put a vision-language model of the CogVLM kind on a small device: exact, verified, small and fast."""

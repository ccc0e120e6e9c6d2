"""The command line: each command parses, calls one function and prints its result. Heavy imports stay inside commands,
so that `--help` and `run` work where torch is not installed."""

from vlmdeploy.cli import judging, models, using
from vlmdeploy.cli.group import error_line, main

__all__ = ["error_line", "judging", "main", "models", "using"]

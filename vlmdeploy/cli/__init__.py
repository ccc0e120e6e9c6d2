"""The command line: each command parses, calls one function and prints its result. Commands import heavy modules
themselves, so `--help` and `run` work without torch."""

from vlmdeploy.cli import judging, models, using
from vlmdeploy.cli.group import error_line, main

__all__ = ["error_line", "judging", "main", "models", "using"]

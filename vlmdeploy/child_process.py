"""Runs work in a child interpreter, so that a crash or lack of memory ends only that; it never outlives the command
that started it."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

PR_SET_PDEATHSIG = 1  # of prctl(2)


@contextmanager
def child_process(
    module: str, errors: int | None = None, start_new_session: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """A fresh interpreter that runs one of our modules, with pipes to and from it. Any exception in the block,
    including Ctrl-C, kills it. errors: Popen's stderr."""
    command = [sys.executable, "-P", "-m", module]  # -P: no module of the current folder, which may hold anything
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # it finds what this process found
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment,
        start_new_session=start_new_session,
    ) as process:  # fmt: skip
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def end_with_parent() -> None:
    """Call first in the child: the system kills it when its parent ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

"""Runs work in a child interpreter, so that a crash or lack of memory ends only that; it never outlives the command
that started it."""

import ctypes
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from vlmdeploy.standard_streams import lines_on_stderr

PR_SET_PDEATHSIG = 1  # of prctl(2)
GRACE_S = 5.0  # for a child that cleans up


@contextmanager
def child_process(module: str, errors: int | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A fresh interpreter that runs `main` of one of our modules, with pipes to and from it. Any exception in the
    block, including Ctrl-C, ends it. errors: Popen's stderr."""
    # -P: no module of the current folder, which may hold anything.
    command = [sys.executable, "-P", "-m", __name__, module, str(os.getpid())]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # it finds what this process found
    with born_deaf():
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment
        )
    with process:
        try:
            yield process
        except BaseException:
            _end(process)
            raise


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    finally:
        process.kill()


@contextmanager
def born_deaf() -> Iterator[None]:
    """What the block starts hears Ctrl-C only after `end_with_parent`: Python would show where it was interrupted."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(parent: int) -> None:
    """Call first in a child of the process `parent`: the system kills it when its parent ends, and Ctrl-C, which the
    terminal sends to both, ends it without a word."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the command that wanted this is gone")
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))


def main() -> None:
    """The child process."""
    module, parent = sys.argv[1:]
    end_with_parent(int(parent))
    with lines_on_stderr():
        importlib.import_module(module).main()


if __name__ == "__main__":
    main()

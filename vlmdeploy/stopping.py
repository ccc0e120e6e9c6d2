"""Ctrl-C, SIGTERM and SIGHUP end a command as an exception does, so that whatever cleans up after errors cleans up."""

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)
PATIENCE_S = 1.0
AGAIN_S = 0.05
_IMPORT = "<frozen importlib._bootstrap>"
_undisturbed: list[list[int]] = []  # what came in each block of that name


class Stopped(BaseException):
    """A signal asks this process to end."""


@contextmanager
def stopped_by_signals() -> Iterator[list[int]]:
    """Raise Stopped in the block when a signal asks to end; yields the numbers of those that came, to read later:
    compiled libraries turn the exception into misleading errors. If any came, the process ignores more afterwards, for
    it is about to end.

    Signals that are ignored (nohup) or have another handler stay so. Outside the main thread nothing is installed.
    """
    handler = _Handler()
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in _asking_to_end() if is_main}
    taken = {number: action for number, action in before.items() if action in DEFAULTS}
    with _none_lost(handler):
        try:
            for number in taken:
                signal.signal(number, handler)
            yield handler.came
        finally:
            for number, action in taken.items():
                signal.signal(number, signal.SIG_IGN if handler.came else action)


def _asking_to_end() -> tuple[signal.Signals, ...]:
    """The signals to take. torchrun ends its other processes by SIGTERM when one fails; they wait for that one in
    compiled code, where no exception can be raised, so there the signal goes on ending them at once."""
    is_one_of_many = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return (signal.SIGINT,) if is_one_of_many else (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Handler:
    """Raises Stopped where that does no harm."""

    def __init__(self) -> None:
        self.came: list[int] = []
        self._first_s = self._raised_s = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        self._first_s = self._first_s if self.came else now_s
        self.came.append(number)
        if _undisturbed:
            _undisturbed[-1].append(number)
        elif self._is_cleaning_up(now_s):
            return
        elif _is_importing(frame) and now_s - self._first_s < PATIENCE_S:
            _send_later(number)  # compiled code that imports a module may abort on an exception
        else:
            self._raised_s = now_s
            raise Stopped(number)

    def _is_cleaning_up(self, now_s: float) -> bool:
        """Whether an earlier signal seems to be at work. Compiled code may also have dropped its exception."""
        return self._raised_s > 0 and (now_s - self._raised_s < PATIENCE_S or sys.exception() is not None)

    def dropped(self, number: int) -> None:
        """Take an exception that Python dropped as not raised."""
        self._raised_s = 0.0
        _send_later(number)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_filename != _IMPORT:
        frame = frame.f_back
    return frame is not None


def _send_later(number: int) -> None:
    def send() -> None:
        time.sleep(AGAIN_S)
        os.kill(os.getpid(), number)

    _thread.start_new_thread(send, ())


@contextmanager
def _none_lost(handler: _Handler) -> Iterator[None]:
    """Raise once more what leaves a destructor or a callback, where Python drops exceptions."""
    before = sys.unraisablehook

    def hook(dropped: "sys.UnraisableHookArgs") -> None:
        if isinstance(dropped.exc_value, Stopped):
            handler.dropped(dropped.exc_value.args[0])
        else:
            before(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextmanager
def undisturbed() -> Iterator[None]:
    """Postpone Stopped to the end of a block that must not be left half done and takes only moments."""
    came: list[int] = []
    _undisturbed.append(came)
    try:
        yield
    finally:
        _undisturbed.remove(came)
        if came:
            signal.raise_signal(came[0])


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """As `stopped_by_signals`, in a child process: after the clean-up the signal ends it, so that its parent sees
    which."""
    with stopped_by_signals() as signals:
        try:
            yield
        except BaseException:
            if not signals:
                raise
    if signals:
        signal.signal(signals[0], signal.SIG_DFL)
        signal.raise_signal(signals[0])

"""Tracks memory and energy of each phase of a run, and a clock that excludes the tracking itself."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from vlmdeploy.bench.energy import Meter
from vlmdeploy.bench.measurement import PhaseMemory
from vlmdeploy.bench.memory_use import KernelPeak, SampledPeak, resident


@dataclass(frozen=True)
class Spent:
    """The totals of all occurrences of a phase."""

    seconds: float = 0.0
    joules: float = 0.0


class PhaseWatch:
    """phases: the largest memory of each phase over all its occurrences; spent: their energy and time; device_use:
    bytes in use on the GPU, read at the end of a phase and by `look`."""

    def __init__(self, peak: KernelPeak | SampledPeak, energy: Meter | None = None) -> None:
        self.phases: dict[str, PhaseMemory] = {}
        self.spent: dict[str, Spent] = {}
        self.device_use: Callable[[], int] | None = None
        self._peak = peak
        self._energy = energy
        self._phase: str | None = None
        self._device_peak: int | None = None
        self._begun = (0.0, 0.0)  # seconds and joules
        self._aside_s = 0.0

    @property
    def method(self) -> str:
        """How memory peaks are measured."""
        return self._peak.method

    def now(self) -> float:
        """Seconds, excluding the time of the tracking."""
        return time.perf_counter() - self._aside_s

    @contextmanager
    def _aside(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._aside_s += time.perf_counter() - start

    def begin(self, phase: str) -> None:
        """End the current phase and begin this one."""
        self.end()
        with self._aside():
            self._phase, self._device_peak = phase, None
            self._peak.reset()
            self._begun = self._counters()

    def look(self) -> None:
        """Sample GPU memory."""
        if self.device_use is not None:
            with self._aside():
                self._device_peak = max(self._device_peak or 0, self.device_use())

    def end(self) -> None:
        """End the phase; what follows belongs to none."""
        if self._phase is None:
            return
        with self._aside():
            self._note_spent(self._phase)
        self.look()
        with self._aside():
            self._note_memory(self._phase)
            self._phase = None

    def forget_spent(self) -> None:
        """Reset `spent`. Call between phases."""
        self.spent.clear()

    def close(self) -> None:
        """Release the memory meter; drops an unfinished phase."""
        self._peak.close()

    def _counters(self) -> tuple[float, float]:
        return time.perf_counter(), self._energy.joules() if self._energy is not None else 0.0

    def _note_spent(self, phase: str) -> None:
        (start, before), (stop, after) = self._begun, self._counters()
        known = self.spent.get(phase, Spent())
        self.spent[phase] = Spent(known.seconds + stop - start, known.joules + after - before)

    def _note_memory(self, phase: str) -> None:
        held = resident()
        found = PhaseMemory(self._peak.read(), held.total, held.anonymous, held.file, self._device_peak)
        before = self.phases.get(phase)
        self.phases[phase] = found if before is None else _larger(found, before)


def _larger(first: PhaseMemory, second: PhaseMemory) -> PhaseMemory:
    """The maximum of both peaks, and the pages of the one with more at its end."""
    held = max(first, second, key=lambda phase: phase.end_bytes)
    on_device = [peak for peak in (first.device_peak_bytes, second.device_peak_bytes) if peak is not None]
    return PhaseMemory(
        max(first.peak_bytes, second.peak_bytes), held.end_bytes, held.end_anonymous_bytes, held.end_file_bytes,
        max(on_device, default=None),
    )  # fmt: skip

"""Memory by phase: what one phase takes is seen in that phase and in no other, by the kernel's count or by samples.
Needs no torch; sizes are of memory that the tests themselves take."""

import mmap
from pathlib import Path
from types import SimpleNamespace

import pytest

from vlmdeploy.bench.memory_use import KernelPeak, SampledPeak, peak_meter, resident
from vlmdeploy.bench.phase_watch import PhaseWatch
from vlmdeploy.errors import BackendError

BLOCK_BYTES, ALMOST = 50 << 20, 45 << 20


def own_kernel_peak() -> KernelPeak:
    meter = peak_meter()
    if not isinstance(meter, KernelPeak):
        meter.close()
        pytest.skip("this kernel does not let a process reset its VmHWM")
    return meter


def taken(size: int) -> mmap.mmap | None:
    """Memory of this size in use, which goes back to the system with its last reference, whatever the process did."""
    if size == 0:
        return None
    block = mmap.mmap(-1, size)
    block[:: mmap.PAGESIZE] = b"\1" * -(-size // mmap.PAGESIZE)
    return block


def test_peak_of_a_phase_is_seen_there_and_not_in_the_next() -> None:
    watch = PhaseWatch(own_kernel_peak())
    for phase, size in (("before", 0), ("large", BLOCK_BYTES), ("after", 0)):
        watch.begin(phase)
        block = taken(size)
        del block
    watch.end()
    peak = {phase: memory.peak_bytes for phase, memory in watch.phases.items()}
    assert list(peak) == ["before", "large", "after"]
    assert peak["large"] - peak["before"] > ALMOST and peak["large"] - peak["after"] > ALMOST
    assert watch.phases["large"].end_bytes < peak["large"] - ALMOST, "it was given back before the end"


def test_largest_of_several_times_counts() -> None:
    watch = PhaseWatch(own_kernel_peak())
    for size in (0, BLOCK_BYTES, 0):
        watch.begin("again")
        block = taken(size)
        watch.end()
        del block
    kept = watch.phases["again"]
    assert (
        kept.peak_bytes >= kept.end_bytes and kept.end_anonymous_bytes is not None and kept.end_file_bytes is not None
    )
    assert kept.end_anonymous_bytes > BLOCK_BYTES and kept.peak_bytes - resident().total > ALMOST


def test_what_is_between_phases_belongs_to_none() -> None:
    watch = PhaseWatch(own_kernel_peak())
    watch.begin("one")
    watch.end()
    between = taken(BLOCK_BYTES)
    del between
    watch.begin("two")
    watch.end()
    assert abs(watch.phases["two"].peak_bytes - watch.phases["one"].peak_bytes) < ALMOST


def test_samples_keep_the_highest_until_they_are_reset() -> None:
    meter = SampledPeak("told by a test")
    before = meter.read()
    block = taken(BLOCK_BYTES)
    meter.read()
    del block
    assert meter.read() - before > ALMOST
    meter.reset()
    assert meter.read() - before < ALMOST
    meter.close()


def test_refused_reset_falls_back_to_samples_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t  30 kB\nVmRSS:\t  20 kB\n")
    (tmp_path / "clear_refs").mkdir()
    meter = peak_meter(tmp_path)
    meter.close()
    assert "sampled every 2 ms because VmHWM cannot be reset here (Is a directory)" in meter.method
    assert meter.read() == 20 << 10


def test_kernel_that_keeps_no_peak_falls_back_too(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("Name:\t\udcff 7\nVmRSS:\t20 kB\n", errors="surrogateescape")
    meter = peak_meter(tmp_path)
    meter.close()
    assert isinstance(meter, SampledPeak) and "has no VmHWM" in meter.method


def test_system_that_tells_no_memory_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("Name:\tpython\n")
    with pytest.raises(BackendError, match=r"status: has no VmRSS"):
        resident(tmp_path)


def test_resident_splits_pages_where_the_system_does(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("VmRSS:\t20 kB\nRssAnon:\t12 kB\nRssFile:\t8 kB\n")
    held = resident(tmp_path)
    assert (held.total, held.anonymous, held.file) == (20 << 10, 12 << 10, 8 << 10)


def test_device_peak_is_the_highest_look() -> None:
    watch = PhaseWatch(own_kernel_peak())
    taken = iter([5, 9, 7, 3])
    watch.device_use = lambda: next(taken)
    watch.begin("one")
    watch.look()
    watch.look()
    watch.end()  # a third look
    watch.begin("two")
    watch.end()
    assert [phase.device_peak_bytes for phase in watch.phases.values()] == [9, 3]


def test_watching_does_not_move_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(seconds=0.0)

    class SlowMeter:
        method = "five seconds for each reading"

        def joules(self) -> float:
            clock.seconds += 5
            return float(clock.seconds)

        def close(self) -> None: ...

    monkeypatch.setattr("vlmdeploy.bench.phase_watch.time", SimpleNamespace(perf_counter=lambda: clock.seconds))
    watch = PhaseWatch(own_kernel_peak(), SlowMeter())
    watch.begin("one")
    clock.seconds += 2
    watch.end()
    assert (watch.now(), clock.seconds) == (2, 12)
    assert (watch.spent["one"].seconds, watch.spent["one"].joules) == (7, 7), "from reading to reading"

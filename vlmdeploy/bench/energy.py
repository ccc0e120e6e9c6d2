"""Energy meters: the supply rails of a Jetson (INA3221, hwmon), the counter of an NVIDIA GPU (NVML), or the counters of
Intel and AMD processors (RAPL, powercap).

Each meter says which part of the machine it covers. Sources: the kernel's Documentation/hwmon/ina3221.rst and
Documentation/power/powercap; NVIDIA's NVML and Jetson Linux manuals.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from vlmdeploy.errors import BackendError
from vlmdeploy.overriding import override

Clock = Callable[[], float]  # seconds

SYS = Path("/sys")
POWER_EVERY_S = 0.02  # sampling interval of power
POWER_EVERY_MS = round(1000 * POWER_EVERY_S)
COUNTER_EVERY_S = 10.0  # reading interval of counters: none wraps twice in between
IDLE_S = 1.0
WHOLE_MODULE = ("VDD_IN", "POM_5V_IN")  # a rail that feeds all others
SEPARATE_RAILS = {"VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"}  # AGX Orin has no rail for all; these add up


class Meter(Protocol):
    """Counts joules since its creation. method: which part of the machine it covers, and how."""

    method: str

    def joules(self) -> float:
        """Joules so far. Raises BackendError if the sensor stopped answering."""

    def close(self) -> None:
        """Release the sensor."""


@dataclass(frozen=True)
class Unknown:
    """Why there is no meter."""

    reason: str


def find_meter(uses_gpu: bool, root: Path = SYS) -> Meter | Unknown:
    """The meter for what will run: a Jetson's module, else the GPU's board or the processors. root: of sysfs."""
    module = jetson_meter(root)
    if module is not None:
        return module
    return _gpu_meter() if uses_gpu else rapl_meter(root)


def idle_watts(meter: Meter, seconds: float = IDLE_S) -> float:
    """Mean power while this process waits."""
    start, before = time.perf_counter(), meter.joules()
    time.sleep(seconds)
    return (meter.joules() - before) / (time.perf_counter() - start)


class Every:
    """Repeats an action in a thread until closed, or until an OSError or ValueError."""

    def __init__(self, seconds: float, action: Callable[[], object]) -> None:
        self._seconds = seconds
        self._action = action
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._is_over.wait(self._seconds):
            try:
                self._action()
            except (OSError, ValueError):
                return  # the next caller gets the same error in its own thread

    def close(self) -> None:
        """End the thread."""
        self._is_over.set()
        self._thread.join()


class Integral:
    """Joules as the trapezoidal integral of sampled watts. now: seconds."""

    def __init__(self, watts: Callable[[], float], now: Clock = time.perf_counter) -> None:
        self._watts = watts
        self._now = now
        self._lock = threading.Lock()
        self._joules = 0.0
        self._last = (now(), watts())

    def read(self) -> float:
        """Take a sample; joules since the first one."""
        with self._lock:
            sample = (self._now(), self._watts())
            before, self._last = self._last, sample
            self._joules += (sample[0] - before[0]) * (sample[1] + before[1]) / 2
            return self._joules


class Count:
    """Joules of a counter in units of `unit_j` that wraps to 0 after `highest` (None: never)."""

    def __init__(self, read: Callable[[], int], unit_j: float, highest: int | None = None) -> None:
        self._read_counter = read
        self._unit_j = unit_j
        self._highest = highest
        self._lock = threading.Lock()
        self._joules = 0.0
        self._last = read()

    def read(self) -> float:
        """Joules since the first reading; the counter has wrapped at most once since the last one."""
        with self._lock:
            value = self._read_counter()
            steps = value - self._last
            if steps < 0 and self._highest is not None:
                steps += self._highest + 1
            self._last = value
            self._joules += max(0, steps) * self._unit_j
            return self._joules


class ReadMeter(Meter):
    """A sum of integrals or counters that a thread reads often enough."""

    def __init__(self, method: str, sources: list[Integral] | list[Count], every_s: float) -> None:
        self.method = method
        self._sources = sources
        self._every = Every(every_s, self._read)

    def _read(self) -> float:
        return sum(source.read() for source in self._sources)

    @override
    def joules(self) -> float:
        try:
            return self._read()
        except (OSError, ValueError) as error:
            raise BackendError(f"energy: {self.method}: the sensor stopped answering ({error})") from error

    @override
    def close(self) -> None:
        self._every.close()


def _number(path: Path) -> int:
    """An integer in a sysfs file; raises OSError, or ValueError naming the file."""
    text = path.read_text(errors="replace").strip()
    try:
        return int(text)
    except ValueError:
        raise ValueError(f'{path}: found "{text:.40}", expected a whole number') from None


def _text(path: Path) -> str:
    """A line in a sysfs file; empty if it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def jetson_meter(root: Path = SYS, now: Clock = time.perf_counter) -> Meter | Unknown | None:
    """The power of a Jetson's module, from its INA3221 sensors; None without such sensors."""
    rails: dict[str, tuple[Path, int]] = {}
    for chip in sorted((root / "class/hwmon").glob("hwmon*")):
        if _text(chip / "name") == "ina3221":
            labels = {channel: _text(chip / f"in{channel}_label") for channel in (1, 2, 3)}
            rails |= {label: (chip, channel) for channel, label in labels.items() if label}
    if not rails:
        return None
    whole = [name for name in WHOLE_MODULE if name in rails]
    chosen = whole[:1] or sorted(SEPARATE_RAILS)
    if not set(chosen) <= set(rails):
        expected = f"{' or '.join(WHOLE_MODULE)}, or all of {', '.join(sorted(SEPARATE_RAILS))}"
        return Unknown(f"INA3221 rails {', '.join(sorted(rails))} are not known to add up; expected {expected}")
    try:
        power = Integral(lambda: sum(_rail_watts(*rails[name]) for name in chosen), now)
    except (OSError, ValueError) as error:
        return Unknown(_refusal(error))
    covers = "of the module" if whole else "of the module's supplies"
    method = f"power {covers}, {' + '.join(chosen)} (INA3221), sampled every {POWER_EVERY_MS} ms"
    return ReadMeter(method, [power], POWER_EVERY_S)


def _rail_watts(chip: Path, channel: int) -> float:
    """A channel's volts times amperes."""
    return _number(chip / f"in{channel}_input") * _number(chip / f"curr{channel}_input") / 1e6


def rapl_meter(root: Path = SYS) -> Meter | Unknown:
    """All processor packages, and their memory if it is counted.

    Excludes cores and graphics, which are parts of a package, and psys, which contains it. Memory ("dram") is not part
    of a package, although sysfs shows it below one.
    """
    zones = {zone: _text(zone / "name") for zone in sorted((root / "class/powercap").glob("intel-rapl:*"))}
    counted = {zone: name for zone, name in zones.items() if name.startswith("package") or name == "dram"}
    if not any(name.startswith("package") for name in counted.values()):
        return Unknown("this machine offers no energy counter: neither RAPL of a processor nor INA3221 of a Jetson")
    try:
        counts = [
            Count(partial(_number, zone / "energy_uj"), 1e-6, _number(zone / "max_energy_range_uj")) for zone in counted
        ]
    except (OSError, ValueError) as error:
        return Unknown(_refusal(error))
    method = f"RAPL counters of the processors, {' + '.join(counted.values())}; nothing else of the machine"
    return ReadMeter(method, counts, COUNTER_EVERY_S)


def _refusal(error: OSError | ValueError) -> str:
    """Why a sensor cannot be read."""
    if isinstance(error, PermissionError):
        return f"{error.filename}: only root may read it here"
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)


def _gpu_meter() -> Meter | Unknown:
    try:
        import pynvml
    except ImportError as error:
        return Unknown(f'pynvml cannot be imported ({error}): pip install "vlmdeploy[energy]"')
    return nvml_meter(pynvml)


def nvml_meter(nvml: Any, now: Clock = time.perf_counter) -> Meter | Unknown:
    """The board of the machine's only GPU: its counter, else sampled power. nvml: the module."""
    try:
        nvml.nvmlInit()
        num_gpus = nvml.nvmlDeviceGetCount()
        if num_gpus != 1:
            return Unknown(f"NVML sees {num_gpus} GPUs and cannot tell which one CUDA uses; expected 1")
        gpu = nvml.nvmlDeviceGetHandleByIndex(0)
        board = f"the board, {nvml.nvmlDeviceGetName(gpu)}"
    except nvml.NVMLError as error:
        return Unknown(f"NVML: {error}")

    def ask(name: str) -> int:
        try:
            return int(getattr(nvml, name)(gpu))
        except nvml.NVMLError as error:
            raise ValueError(f"NVML: {error}") from error

    try:
        count = Count(lambda: ask("nvmlDeviceGetTotalEnergyConsumption"), 1e-3)
        return ReadMeter(f"NVML's energy counter of {board}", [count], COUNTER_EVERY_S)
    except ValueError:
        pass  # a GPU before Volta counts no energy
    try:
        power = Integral(lambda: ask("nvmlDeviceGetPowerUsage") / 1e3, now)
    except ValueError as error:
        return Unknown(str(error))
    return ReadMeter(f"NVML's power of {board}, sampled every {POWER_EVERY_MS} ms", [power], POWER_EVERY_S)

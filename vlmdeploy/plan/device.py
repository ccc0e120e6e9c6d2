"""A device for the planner: its usable memory and its rates. From the device table, this machine, or a profile file:

name = "my-board"            # name, kind, memory and bandwidth_gb_s are required
kind = "jetson"              # jetson, rtx, datacenter or cpu
memory = "16GB"              # as the system counts it; powers of ten
usable = "13.5GB"            # left for us  [default: memory less a reserve]
bandwidth_gb_s = 102.4
fp16_tflops = 15.0           # dense, tensor cores, float32 accumulation
cpu_gflops = 120.0           # float32, for targets that run on the CPU
"""

import difflib
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vlmdeploy import devices
from vlmdeploy.byte_sizes import parse_size
from vlmdeploy.errors import ConfigError
from vlmdeploy.records import read_toml, record_of
from vlmdeploy.runtime.memory import total_bytes

HOST = "host"
HOST_RESERVE_BYTES = 10**9
PROBE_VALUES = 1 << 25  # 128 MiB of float32: beyond any cache
PROBE_WIDTH = 1024


@dataclass(frozen=True)
class PlanDevice:
    """A device as the planner sees it. Unknown rates are None. source: where the figures come from, in words."""

    name: str
    title: str
    kind: str
    memory_bytes: int
    usable_bytes: int
    bandwidth_bytes_per_s: float
    fp16_flop_per_s: float | None
    cpu_flop_per_s: float | None
    source: str

    @property
    def is_unified(self) -> bool:
        """Whether the CPU uses the same memory."""
        return self.kind in ("jetson", "cpu")

    @property
    def engine(self) -> devices.Engine:
        """The library that runs engines there."""
        return "tensorrt_rtx" if self.kind == "rtx" else "tensorrt"


def plan_device(text: str, power_mode: str | None = None) -> PlanDevice:
    """The device of this name, of a profile file (a name ending in .toml), or this machine ("host").

    Raises ConfigError listing the known names, or naming a profile's file, key and the known keys.
    """
    if text.lower() == HOST:
        found = _host()
    elif text.endswith(".toml"):
        found = _read_profile(Path(text))
    else:
        return _of_table(text, power_mode)
    if power_mode is not None:
        raise ConfigError(f'--power-mode "{power_mode}": device {found.name} has no power modes that we know')
    return found


def _of_table(name: str, power_mode: str | None) -> PlanDevice:
    if name.lower() not in devices.names():
        close = difflib.get_close_matches(name.lower(), devices.names(), 1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        known = ", ".join((*devices.names(), HOST))
        raise ConfigError(f'device "{name}" is not known{meant}: choose one of {known}, or give a profile file.toml')
    device = devices.device(name)
    source = f"vlmdeploy.devices: {device.title}"
    found = PlanDevice(
        device.name, device.title, device.kind, device.visible_bytes, device.usable_bytes,
        device.bandwidth_bytes_per_s, device.fp16_flop_per_s, None, source,
    )  # fmt: skip
    return found if power_mode is None else _in_mode(found, device, power_mode)


def _in_mode(found: PlanDevice, device: devices.Device, power_mode: str) -> PlanDevice:
    modes = {mode.name.lower(): mode for mode in device.power_modes}
    mode = modes.get(power_mode.lower())
    if mode is None:
        known = ", ".join(item.name for item in device.power_modes) or "none"
        raise ConfigError(f'--power-mode "{power_mode}" is not one of {device.name}: it has {known}')
    return replace(
        found,
        title=f"{found.title}, {mode.name}",
        bandwidth_bytes_per_s=mode.bandwidth_bytes_per_s or found.bandwidth_bytes_per_s,
        fp16_flop_per_s=mode.fp16_flop_per_s,
    )


@dataclass(frozen=True)
class _Profile:
    """What a profile file says; sizes in bytes, or as texts such as "16GB"."""

    name: str
    kind: Literal["jetson", "rtx", "datacenter", "cpu"]
    memory: int | str
    bandwidth_gb_s: float
    usable: int | str | None = None
    fp16_tflops: float | None = None
    cpu_gflops: float | None = None


def _read_profile(path: Path) -> PlanDevice:
    profile = record_of(_Profile, read_toml(path, "a device profile"), str(path), unknown="refused")
    for key in ("bandwidth_gb_s", "fp16_tflops", "cpu_gflops"):
        rate = getattr(profile, key)
        if rate is not None and not 1e-3 <= rate <= 1e9:
            raise ConfigError(f'{path}: "{key}" is {rate}, expected 0.001 to 1e9')
    memory = _size(profile.memory, f'{path}: "memory"')
    reserve = devices.RESERVED_UNIFIED_BYTES if profile.kind in ("jetson", "cpu") else devices.RESERVED_CARD_BYTES
    usable = max(0, memory - reserve) if profile.usable is None else _size(profile.usable, f'{path}: "usable"')
    if usable > memory:
        raise ConfigError(f'{path}: "usable" is {usable} bytes, more than "memory", {memory}')
    return PlanDevice(
        profile.name, profile.name, profile.kind, memory, usable, 1e9 * profile.bandwidth_gb_s,
        None if profile.fp16_tflops is None else 1e12 * profile.fp16_tflops,
        None if profile.cpu_gflops is None else 1e9 * profile.cpu_gflops, f"profile {path}",
    )  # fmt: skip


def _size(value: int | str, where: str) -> int:
    if isinstance(value, str):
        return parse_size(value, where)
    if value < 1:
        raise ConfigError(f'{where} is {value}, expected a size such as "16GB" or a number of bytes')
    return value


def _host() -> PlanDevice:
    """This machine's CPU and memory; measures the rates, which takes about a second."""
    memory = total_bytes()
    bandwidth, flops = _measured_bandwidth(), _measured_flops()
    title = f"this machine, {len(os.sched_getaffinity(0))} cores"
    return PlanDevice(
        HOST, title, "cpu", memory, max(0, memory - HOST_RESERVE_BYTES), bandwidth,
        None, flops, "measured here just now with numpy",
    )  # fmt: skip


def _measured_bandwidth() -> float:
    """Bytes per second that one core reads: the best of three sums over more than the caches hold."""
    values = np.ones(PROBE_VALUES, np.float32)
    return values.nbytes / min(_seconds(values.sum) for _ in range(3))


def _measured_flops() -> float:
    """float32 operations per second of all cores: the best of three matrix products."""
    square = np.ones((PROBE_WIDTH, PROBE_WIDTH), np.float32)
    return 2 * PROBE_WIDTH**3 / min(_seconds(lambda: square @ square) for _ in range(3))


def _seconds(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start

"""Describes this machine and the engine that executes a bundle on it, to quote beside measured numbers."""

import os
import platform
from pathlib import Path

from vlmdeploy.bench.measurement import EngineUsed, Machine
from vlmdeploy.kernels import cpu
from vlmdeploy.manifest import Manifest
from vlmdeploy.runtime.backends.ort import import_onnxruntime
from vlmdeploy.runtime.backends.trt_library import import_tensorrt, library_of
from vlmdeploy.runtime.memory import sizes_in


def machine(gpu: str | None, root: Path = Path("/")) -> Machine:
    """This machine. root: of the file system."""
    return Machine(
        cpu=cpu_model(root / "proc/cpuinfo"),
        logical_cores=len(os.sched_getaffinity(0)),
        memory_bytes=sizes_in(root / "proc/meminfo", 1024)["MemTotal:"],
        kernel=f"{platform.system()} {platform.release()} {platform.machine()}",
        board=board_model(root / "proc/device-tree/model"),
        gpu=gpu,
    )


def cpu_model(path: Path) -> str:
    """The processor's name in /proc/cpuinfo; the architecture if it has none, as on most Arm machines."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] else platform.machine()


def board_model(path: Path) -> str | None:
    """The board's name in the device tree; None without one."""
    try:
        return path.read_bytes().rstrip(b"\0").decode(errors="replace") or None
    except OSError:
        return None


def engine_used(manifest: Manifest, provider: str | None, threads: int | None, residency: str) -> EngineUsed:
    """Import the engine that will execute the bundle and describe it. Raises BackendError if it is missing."""
    if manifest.dialect == "trt" and provider is None:
        library = import_tensorrt(library_of(manifest.target))
        return EngineUsed(library.name, library.version, "cuda", None, residency)
    version = str(import_onnxruntime().__version__)
    provider = provider or manifest.provider
    operators = cpu.variant() if manifest.dialect == "ort" and provider == "cpu" else None
    return EngineUsed("onnxruntime", version, provider, threads, residency, operators)

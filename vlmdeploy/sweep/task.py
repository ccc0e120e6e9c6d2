"""One task of a sweep, in its own process so that a crash stays there: quantizing a checkpoint, or exporting and
evaluating a point. Tasks share only folders."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from vlmdeploy.artifact import check_output
from vlmdeploy.bundle import is_bundle
from vlmdeploy.child_process import child_process
from vlmdeploy.errors import VlmdeployError
from vlmdeploy.records import record_of
from vlmdeploy.report.run import ReportOptions, evaluate_one
from vlmdeploy.stopping import ended_by_signals
from vlmdeploy.sweep.grid import Point

LOG_LINES = 5


@dataclass(frozen=True)
class Calibration:
    """How the calibrated points of a sweep draw their samples; see `QuantizeOptions`."""

    samples: int = 512
    tokens: int | None = None
    tokenizer: Path | None = None


@dataclass(frozen=True)
class Shared:
    """The data that all tasks of a sweep share. out: the sweep's folder, the same on all machines. reference_key: of
    the checkpoint's evaluation there, empty until it exists."""

    ckpt: Path
    calib: Path | None
    out: Path
    report: ReportOptions
    calibration: Calibration
    threads: int | None
    reference_key: str = ""

    def checkpoint(self, point: Point) -> Path:
        """The folder of a point's quantized checkpoint."""
        return self.out / "checkpoints" / point.checkpoint

    def bundle(self, point: Point) -> Path:
        """The folder of a point's bundle."""
        return self.out / "bundles" / point.name


@dataclass(frozen=True)
class Task:
    """kind "quantize": the point's checkpoint; "point": its bundle and evaluation."""

    kind: str
    point: Point
    shared: Shared

    def as_json(self) -> bytes:
        """What `read` reads, in another process."""
        return json.dumps(asdict(self), default=str).encode()

    @classmethod
    def read(cls, content: bytes) -> "Task":
        """The task that `as_json` wrote."""
        return record_of(cls, json.loads(content), "the task")


def run_task(task: Task) -> str | None:
    """Run a task in a fresh interpreter; None if it succeeded, else a one-line error, also if the process was killed or
    crashed. Ctrl-C ends it, after it removed what it had not finished."""
    with child_process("vlmdeploy.sweep.task", errors=subprocess.PIPE) as process:
        written, errors = process.communicate(task.as_json())
    if process.returncode == 0:
        return None
    if written:
        return str(json.loads(written)["error"])
    if process.returncode < 0:
        name = signal.strsignal(-process.returncode) or f"signal {-process.returncode}"
        hint = ", most likely for memory" if process.returncode == -signal.SIGKILL else ""
        return f"the process was killed ({name}){hint}"
    lines = [line for line in errors.decode(errors="replace").splitlines() if line.strip()]
    return f"the process ended with status {process.returncode}: {' / '.join(lines[-LOG_LINES:])[-500:]}"


def perform(task: Task) -> None:
    """Do the work in this process; skip what already exists."""
    if task.kind == "quantize":
        _quantize(task.point, task.shared)
        return
    _export(task.point, task.shared)
    shared = task.shared
    evaluate_one(shared.report, shared.bundle(task.point), shared.out, shared.reference_key)


def _quantize(point: Point, shared: Shared) -> None:
    from vlmdeploy.calib.request import QuantizeOptions, quantize_checkpoint, use_threads
    from vlmdeploy.progress import no_progress

    use_threads(shared.threads)
    assert shared.calib is not None, "the command line asks for it where a point is calibrated"
    parts = {part: kind for part, kind in point.precisions.items() if part != "embedding"}
    options = QuantizeOptions(
        shared.calib, bits=str(point.bits), group=point.group, hessian=point.algorithm,  # type: ignore[arg-type]
        quality=point.quality, positive_scales=point.positive_scales, **parts, **asdict(shared.calibration),  # type: ignore[arg-type]
        follow_links=shared.report.asked.follow_links,
    )  # fmt: skip
    quantize_checkpoint(shared.ckpt, shared.checkpoint(point), options, no_progress)


def _export(point: Point, shared: Shared) -> None:
    from vlmdeploy.export.exporter import export_bundle
    from vlmdeploy.export.options import ExportOptions

    out = shared.bundle(point)
    if is_bundle(out):
        return
    check_output(out, False, is_bundle)
    out.parent.mkdir(parents=True, exist_ok=True)
    source, precisions = shared.ckpt, dict(point.precisions)
    if point.is_calibrated:
        source, precisions = shared.checkpoint(point), {k: v for k, v in precisions.items() if k == "embedding"}
    elif point.algorithm == "rtn":
        precisions["decoder"] = f"int{point.bits}"
    options = ExportOptions(
        point.target, precisions, point.group, tokenizer=shared.report.asked.tokenizer, threads=shared.threads,
        provider=point.provider, kv=point.kv, follow_links=shared.report.asked.follow_links,  # type: ignore[arg-type]
    )  # fmt: skip
    export_bundle(source, out, options)


def main() -> None:
    """The task's process: a task on stdin; on failure one JSON document on stdout. What libraries print goes to stderr.
    A signal that asks it to end removes what it had not finished."""
    task = Task.read(sys.stdin.buffer.read())
    with os.fdopen(os.dup(1), "w") as answer:
        os.dup2(2, 1)
        error = _error_of(task)
        if error is not None:
            json.dump({"error": error}, answer)
    sys.exit(0 if error is None else 1)


def _error_of(task: Task) -> str | None:
    """Do the work; returns a one-line message for errors that the user can solve."""
    with ended_by_signals():
        try:
            perform(task)
        except VlmdeployError as error:
            return str(error)
        except OSError as error:
            if error.filename is None:
                raise
            return f"{error.filename}: {error.strerror}"
        return None

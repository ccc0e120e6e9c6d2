"""`vlmdeploy sweep`: quantizes, exports, scores and measures every point of a grid, and compares them in a report.

Points run one after the other, or on a Ray cluster, one at a time per machine: two at once would distort each other's
times. The report lists failed points; the same command resumes a sweep.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vlmdeploy.artifact import locked
from vlmdeploy.bundle import has_manifest
from vlmdeploy.data.source import open_source
from vlmdeploy.errors import ConfigError, ExportError
from vlmdeploy.model.checkpoint import Checkpoint
from vlmdeploy.model.tokenizer import checkpoint_tokenizer
from vlmdeploy.progress import Progress, no_progress
from vlmdeploy.report.document import Failure, Report
from vlmdeploy.report.evaluation import Store
from vlmdeploy.report.run import EVALUATIONS, ReportOptions, make_report, prepare_reference
from vlmdeploy.sweep.grid import Point, read_grid
from vlmdeploy.sweep.runners import RunTasks, task_runner
from vlmdeploy.sweep.settings import check_output_folder, check_settings
from vlmdeploy.sweep.task import Calibration, Shared, Task

REPORT = "report"


@dataclass(frozen=True)
class SweepOptions:
    """Options of a sweep. report: how to ask and measure points; the sweep sets its bundles and out.

    ray: an address, "auto" for the running cluster, "local" for one on this machine, None: run points in turn here.
    cpus: of each point on a cluster; None: all of a machine.
    """

    ckpt: Path
    grid: Path
    out: Path
    report: ReportOptions
    calib: Path | None = None
    calibration: Calibration = field(default_factory=Calibration)
    threads: int | None = None
    ray: str | None = None
    cpus: int | None = None


@dataclass(frozen=True)
class SweepResult:
    """The report, the points of the grid, and the failures."""

    report: Report
    points: tuple[Point, ...]
    failures: tuple[Failure, ...]


def run_sweep(options: SweepOptions, progress: Progress = no_progress) -> SweepResult:
    """Run or resume a sweep. Raises ConfigError for a bad grid or settings that differ from the previous run's,
    ExportError if all points failed, and what the reference raises."""
    points = read_grid(options.grid)
    shared = _shared(options)
    check_output_folder(shared)
    fingerprint = _check_inputs(options, points)
    with locked(options.out), task_runner(options.ray, options.cpus) as run:
        check_settings(shared, points, fingerprint)
        shared = replace(shared, reference_key=prepare_reference(shared.report, shared.out, progress))
        failures = _quantize_and_export(points, shared, run, progress)
        failed = {failure.name for failure in failures}
        bundles = tuple(shared.bundle(point) for point in points if point.name not in failed)
        if not bundles:
            raise ExportError(f"{options.out}: every point failed; the first: {failures[0].name}: {failures[0].error}")
        reported = replace(shared.report, bundles=bundles, force=True)
        report = make_report(reported, progress, failures, Store(shared.out / EVALUATIONS))
    return SweepResult(report, tuple(points), failures)


def _quantize_and_export(points: list[Point], shared: Shared, run: RunTasks, progress: Progress) -> tuple[Failure, ...]:
    """Make every checkpoint that points need, then run the points whose checkpoint succeeded."""
    makers = {point.checkpoint: point for point in points if point.is_calibrated}
    errors: dict[str, str] = {}
    total, done = len(makers) + len(points), 0
    for task, error in run([Task("quantize", point, shared) for point in makers.values()]):
        done += 1
        progress(f"quantized {task.point.checkpoint}", done, total)
        if error is not None:
            errors[task.point.checkpoint] = error
    failures = {
        point.name: errors[point.checkpoint] for point in points if point.is_calibrated and point.checkpoint in errors
    }
    done += len(failures)
    for task, error in run([Task("point", point, shared) for point in points if point.name not in failures]):
        done += 1
        progress(f"evaluated {task.point.name}", done, total)
        if error is not None:
            failures[task.point.name] = error
    return tuple(Failure(point.name, failures[point.name]) for point in points if point.name in failures)


def _shared(options: SweepOptions) -> Shared:
    """Make all paths absolute: machines of a cluster have other working folders."""
    out, ckpt, asked, questions = options.out.absolute(), options.ckpt.absolute(), options.report.asked, None
    if options.report.questions is not None:
        questions = replace(options.report.questions, images=_absolute(options.report.questions.images))
    report = replace(
        options.report, ref=ckpt, data=options.report.data.absolute(), out=out / REPORT, questions=questions,
        asked=replace(asked, tokenizer=_absolute(asked.tokenizer)),
    )  # fmt: skip
    calibration = replace(options.calibration, tokenizer=_absolute(options.calibration.tokenizer))
    return Shared(ckpt, _absolute(options.calib), out, report, calibration, options.threads)


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.absolute()


def _check_inputs(options: SweepOptions, points: Sequence[Point]) -> str:
    """The checkpoint's fingerprint. Raises ConfigError, WeightsError or DataError for what would fail every point."""
    if options.ray is None and options.cpus is not None:
        raise ConfigError("--cpus needs --ray: leave it out; --threads is for one machine")
    if options.calib is None and any(point.is_calibrated for point in points):
        advice = "give --calib DATA, or use algorithm rtn and none only"
        raise ConfigError(f"{options.grid}: has calibrated points: {advice}")
    if options.calib is not None:
        open_source(options.calib)
    if has_manifest(options.ckpt):
        raise ConfigError(f"--ckpt {options.ckpt}: is a bundle, expected a float checkpoint")
    follow_links = options.report.asked.follow_links
    checkpoint = Checkpoint(options.ckpt, follow_links)
    if checkpoint.is_quantized:
        raise ConfigError(f"--ckpt {options.ckpt}: is already quantized, expected the float checkpoint")
    checkpoint_tokenizer(options.ckpt, options.report.asked.tokenizer, follow_links)
    return checkpoint.fingerprint()


def sweep_json(result: SweepResult) -> dict[str, Any]:
    """The document that `sweep --json` prints."""
    failed = {failure.name: failure.error for failure in result.failures}
    points = [{**asdict(point), "error": failed.get(point.name)} for point in result.points]
    failures = [asdict(failure) for failure in result.failures]
    return {"points": points, "reference": result.report.reference, "failures": failures}

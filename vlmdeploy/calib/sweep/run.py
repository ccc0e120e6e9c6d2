"""`vlmdeploy sweep`: every point of a grid is quantized, exported, scored and measured, and a report compares them.

Points run one after the other, or on the machines of a Ray cluster, one at a time on each: two at once would spoil each
other's times. A point that fails is marked in the report; the same command goes on where it was.
"""

import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vlmdeploy.artifact import locked, write_file
from vlmdeploy.calib.report.evaluation import Store
from vlmdeploy.calib.report.run import EVALUATIONS, ReportOptions, make_report, prepare_reference
from vlmdeploy.calib.report.shape import Failure, Report
from vlmdeploy.calib.sweep.grid import Point, read_grid
from vlmdeploy.calib.sweep.task import Shared, Task, run_task
from vlmdeploy.errors import BackendError, ConfigError, ExportError
from vlmdeploy.export.options import Progress, no_progress

SETTINGS = "sweep.json"
REPORT = "report"
RAY_LOCAL = "local"

RunTasks = Callable[[list[Task]], Iterator[tuple[Task, str | None]]]


@dataclass(frozen=True)
class SweepOptions:
    """What a sweep is made of. report: how points are asked and measured; its bundles and out are filled in here.

    ray: an address, "auto" for the running cluster, "local" for one on this machine, None: one after the other.
    cpus: of each point on a cluster; None: all of a machine.
    """

    ckpt: Path
    grid: Path
    out: Path
    report: ReportOptions
    calib: Path | None = None
    calibration: dict[str, object] = field(default_factory=dict)
    threads: int | None = None
    ray: str | None = None
    cpus: int | None = None


@dataclass(frozen=True)
class SweepResult:
    """The report, the points of the grid, and those that failed with the line that says why."""

    report: Report
    points: tuple[Point, ...]
    failures: tuple[Failure, ...]


def run_sweep(options: SweepOptions, progress: Progress = no_progress) -> SweepResult:
    """Run a sweep, or go on with it. Raises ConfigError for the grid or other settings than the run before had,
    ExportError if all points failed, and what the reference raises."""
    points = read_grid(options.grid)
    if options.calib is None and any(point.is_calibrated for point in points):
        raise ConfigError(
            f"{options.grid}: has calibrated points: give --calib DATA, or use algorithm rtn and none only"
        )
    with locked(options.out):
        _check_settings(options)
        shared = _shared(options)
        prepare_reference(shared.report, shared.out, progress)
        run = _runner_of(options)
        failures = _quantize_and_export(points, shared, run, progress)
        failed = {failure.name for failure in failures}
        bundles = tuple(shared.bundle(point) for point in points if point.name not in failed)
        if not bundles:
            raise ExportError(f"{options.out}: every point failed; the first: {failures[0].name}: {failures[0].error}")
        report = make_report(_report_options(shared, bundles), progress, failures, Store(shared.out / EVALUATIONS))
    return SweepResult(report, tuple(points), failures)


def _quantize_and_export(points: list[Point], shared: Shared, run: RunTasks, progress: Progress) -> tuple[Failure, ...]:
    """First every checkpoint that points need, then the points whose checkpoint came to be."""
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
    for task, error in run([Task("point", point, shared) for point in points if point.name not in failures]):
        done += 1
        progress(f"evaluated {task.point.name}", done, total)
        if error is not None:
            failures[task.point.name] = error
    return tuple(Failure(point.name, failures[point.name]) for point in points if point.name in failures)


def _shared(options: SweepOptions) -> Shared:
    out = options.out.absolute()
    report = replace(options.report, ref=options.ckpt.absolute(), data=options.report.data.absolute(), out=out / REPORT)
    calib = None if options.calib is None else options.calib.absolute()
    return Shared(options.ckpt.absolute(), calib, out, report, options.calibration, options.threads)


def _report_options(shared: Shared, bundles: tuple[Path, ...]) -> ReportOptions:
    return replace(shared.report, bundles=bundles, force=True)


def _check_settings(options: SweepOptions) -> None:
    """Keep what decides the results beside the grid, or raise ConfigError where another run's differ."""
    path = options.out / SETTINGS
    now = {
        "ckpt": str(options.ckpt.absolute()), "calib": str(options.calib and options.calib.absolute()),
        "calibration": {key: str(value) for key, value in options.calibration.items()},
    }  # fmt: skip
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        for key, value in now.items():
            if before.get(key) != value:
                raise ConfigError(
                    f"{options.out}: holds a sweep whose {key} is {before.get(key)!r:.120}, now it is {value!r:.120}: "
                    "choose another --out"
                )
        return
    others = [item.name for item in options.out.iterdir() if item.name != "lock"]
    if others:
        raise ConfigError(f"{options.out}: holds {others[0]} and is no sweep; choose another --out")
    write_file(path, lambda file: file.write(json.dumps(now, indent=1).encode()))


def _runner_of(options: SweepOptions) -> RunTasks:
    return _in_turn if options.ray is None else _RayRunner.connect(options.ray, options.cpus).run


def _in_turn(tasks: list[Task]) -> Iterator[tuple[Task, str | None]]:
    for task in tasks:
        yield task, run_task(task)


@dataclass(frozen=True)
class _RayRunner:
    """Runs tasks on a Ray cluster. Its machines must see the sweep's folders under the same paths."""

    ray: Any
    cpus: int

    @classmethod
    def connect(cls, address: str, cpus: int | None) -> "_RayRunner":
        """Raises BackendError where there is no such cluster, ModuleNotFoundError where Ray is not installed."""
        ray = importlib.import_module("ray")
        try:
            ray.init(address=None if address == RAY_LOCAL else address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as error:
            found = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BackendError(
                f"--ray {address}: there is no cluster to connect to ({found}): `ray start --head` starts one, or use "
                "--ray local"
            ) from error
        of_machines = [int(node["Resources"].get("CPU", 1)) for node in ray.nodes() if node["Alive"]]
        return cls(ray, cpus or max(of_machines))

    def run(self, tasks: list[Task]) -> Iterator[tuple[Task, str | None]]:
        """Results as they come. A machine that is lost fails its task, not the sweep."""
        remote = self.ray.remote(num_cpus=self.cpus, max_retries=1)(run_task)
        waiting = {remote.remote(task): task for task in tasks}
        while waiting:
            ready, _ = self.ray.wait(list(waiting))
            for reference in ready:
                task = waiting.pop(reference)
                try:
                    yield task, self.ray.get(reference)
                except self.ray.exceptions.RayError as error:
                    yield task, f"Ray lost it: {str(error).splitlines()[0]}"


def sweep_json(result: SweepResult) -> dict[str, Any]:
    """The document that `sweep --json` prints."""
    failed = {failure.name: failure.error for failure in result.failures}
    points = [{**asdict(point), "error": failed.get(point.name)} for point in result.points]
    return {
        "points": points,
        "reference": result.report.reference,
        "failures": [asdict(item) for item in result.failures],
    }

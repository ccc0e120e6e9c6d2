"""The commands whose writing is tried: what lies in their folder before, what they write there, and what may lie there
after a fault. They run in this process, on models small enough for a tenth of a second."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch

from fuzz.storage.replay import Tree
from tests.calibration_data import write_calibration_checkpoint, write_calibration_data
from tests.test_train_run import DATA, DIGITS, RECIPE, STAGE
from vlmdeploy.artifact import (
    check_output,
    is_aside,
    locked,
    make_folder,
    open_partial,
    remove_finished,
    remove_partial,
    staged_folder,
    unwritable_reported,
    write_file,
)
from vlmdeploy.calib.activations import Pool
from vlmdeploy.calib.calibration_set import Tokens
from vlmdeploy.calib.flow import Flow
from vlmdeploy.calib.processes import Processes
from vlmdeploy.calib.request import QuantizeOptions, quantize_checkpoint
from vlmdeploy.calib.state import SETTINGS, RunState, shard_name
from vlmdeploy.errors import BundleError, CalibrationError, ConfigError, TrainingError
from vlmdeploy.export.calibrated import export_calibrated
from vlmdeploy.export.engines.build import BuildOptions, build_bundle
from vlmdeploy.export.engines.compiler import EngineRequest
from vlmdeploy.export.exporter import export_bundle
from vlmdeploy.export.options import ExportOptions
from vlmdeploy.model.checkpoint import Checkpoint
from vlmdeploy.progress import Progress, no_progress
from vlmdeploy.quant.quantization_report import read_report
from vlmdeploy.records import read_object
from vlmdeploy.runtime.backends.trt_library import TensorrtLibrary
from vlmdeploy.runtime.integrity import check_bundle
from vlmdeploy.train import run as train_run
from vlmdeploy.train.workers import Exchange

OUT, PARTIAL = "out", "out.partial"
UNITS = ("vision.embed", "vision.layers.0", "connector", "prompts", "decoder.layers.0", "decoder.layers.1", "head")


@dataclass(frozen=True)
class Scenario:
    """A command that writes OUT in a folder.

    before: what it finds there. check: raises unless OUT is finished and can be read. is_repeatable: whether the
    command may be given again once OUT is finished. keeps: what may lie beside OUT after an error. may_fail_late:
    whether OUT may be finished after an error, because something was still to be cleaned up. units: what a run from the
    start does. can_exchange: whether the system exchanges folders in one step. cost: how many cases of the cheapest
    scenario take as long as one of this.
    """

    name: str
    command: Callable[[Path, Progress], object]
    check: Callable[[Path], object]
    before: Callable[[Path], object] = lambda root: None
    is_repeatable: bool = True
    keeps: frozenset[str] = frozenset()
    may_fail_late: bool = False
    units: tuple[str, ...] = ()
    can_exchange: bool = True
    cost: int = 12
    normal: Callable[[Tree], Tree] = lambda out: out  # without what two runs write differently
    is_between: Callable[[Path], bool] = lambda out: False  # whether OUT is whole, though neither the old nor the new

    def rest(self, tree: Tree, settings: bytes) -> list[str]:
        """The units that a run with these settings has to do, as OUT.partial shows."""
        is_ours = tree.get(f"{PARTIAL}/{SETTINGS}", (0, b""))[1] == settings
        done = 0
        while is_ours and done < len(self.units) and f"{PARTIAL}/{self.units[done]}.json" in tree:
            done += 1
        return list(self.units[done:])


def scenarios(inputs: Path) -> list[Scenario]:
    """All of them. Writes what they read into a folder."""
    ckpt = write_calibration_checkpoint(inputs / "ckpt", vision_layers=1, seed=8)
    data = write_calibration_data(inputs / "data", num_pictures=5, num_texts=3)
    return [
        *_folders(),
        *_units(),
        *_quantizations(ckpt, data),
        *_exports(ckpt),
        *_calibrated_exports(ckpt, data),
        _training(inputs),
        _engines(ckpt),
    ]


def _folders() -> list[Scenario]:
    """What artifact.py does for every output: a staged folder, and a file written aside."""

    def stage(root: Path, content: bytes, force: bool) -> None:
        with staged_folder(root / OUT, force, is_object) as folder:
            with (folder / "weights").open("wb") as file:
                file.write(content * 100)
                file.flush()
                file.write(content * 100)
            (folder / "engines").mkdir()
            (folder / "engines" / "plan").write_bytes(content)
            (folder / "manifest.json").write_bytes(b'{"content": "%s"}' % content)

    def old(root: Path) -> None:
        stage(root, b"old", force=False)

    def write(root: Path, content: bytes) -> None:
        with unwritable_reported(root / OUT):
            make_folder(root / OUT)
            write_file(root / OUT / "answers", lambda file: file.write(content * 1000))

    def without_asides(out: Tree) -> Tree:
        return {path: entry for path, entry in out.items() if not is_aside(Path(path))}

    fresh = Scenario("folder", lambda root, _: stage(root, b"new", force=False), is_object, is_repeatable=False, cost=1)
    forced = replace(fresh, name="folder over an old one", before=old, is_repeatable=True)
    forced = replace(forced, command=lambda root, _: stage(root, b"new", force=True))
    file = Scenario("file", lambda root, _: write(root, b"new"), Path.iterdir, lambda root: write(root, b"old"), cost=1)
    file = replace(file, may_fail_late=True, normal=without_asides)
    return [fresh, forced, replace(forced, name="folder over an old one, no exchange", can_exchange=False), file]


def is_object(folder: Path) -> bool:
    """Whether a folder has a manifest.json that can be read."""
    try:
        return bool(read_object(folder / "manifest.json"))
    except ConfigError:
        return False


def _units() -> list[Scenario]:
    """What `quantize` does with OUT.partial, without a model: three units of one tensor and a few rows each."""
    units = UNITS[:3]

    def run(root: Path, progress: Progress, seed: int = 0, force: bool = False) -> None:
        out, partial, settings = root / OUT, root / PARTIAL, {"seed": seed}
        if is_object(out) and not force:
            remove_finished(partial, SETTINGS, settings, CalibrationError)
            return
        check_output(out, force, is_object)
        with locked(partial), unwritable_reported(partial):
            open_partial(partial, SETTINGS, settings, force, CalibrationError)
            state = RunState(partial, Processes())
            records = state.finished(list(units))
            state.tidy(records)
            tokens = Tokens(("sample",), np.array([0, 3]), np.zeros(3, np.bool_), np.zeros(1, np.bool_))
            flow = Flow.zeros(Pool(partial / "spill", 1000), tokens, width=2, streams=1)
            for unit in units[len(records) :]:
                progress(unit, 0, 1)
                records[unit] = state.save_unit(unit, {"weight": torch.full((9,), seed)}, [], flow)
            with staged_folder(out, force, is_object) as folder:
                for unit in units:
                    shutil.copyfile(partial / shard_name(unit), folder / shard_name(unit))
                (folder / "manifest.json").write_text(json.dumps(settings))
            remove_partial(partial, SETTINGS)

    def old_and_unfinished(root: Path) -> None:
        run(root, no_progress, seed=1)
        _interrupted(lambda stop: run(root, stop, seed=2, force=True), units[2])

    fresh = Scenario("units", run, is_object, keeps=frozenset({PARTIAL}), may_fail_late=True, units=units, cost=1)
    over = replace(fresh, name="units over an unfinished run", before=old_and_unfinished)
    return [fresh, replace(over, command=lambda root, progress: run(root, progress, force=True))]


def _interrupted(run: Callable[[Progress], object], last: str) -> None:
    """Run until unit `last` begins."""

    def stop(unit: str, done: int, total: int) -> None:
        if unit == last:
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        run(stop)


def _quantizations(ckpt: Path, data: Path) -> list[Scenario]:
    def quantize(root: Path, progress: Progress, **options: Any) -> None:
        quantize_checkpoint(ckpt, root / OUT, QuantizeOptions(data, group=16, **options), progress)

    def old(root: Path) -> None:
        quantize(root, no_progress, bits="8")

    def unfinished(root: Path, **options: Any) -> None:
        _interrupted(lambda stop: quantize(root, stop, **options), "decoder.layers.0")

    def old_and_unfinished(root: Path) -> None:
        old(root)
        unfinished(root, force=True, seed=1)

    def forced(root: Path, progress: Progress) -> None:
        quantize(root, progress, force=True)

    def check(out: Path) -> None:
        assert read_report(out) and Checkpoint(out).is_quantized

    fresh = Scenario("quantize", quantize, check, keeps=frozenset({PARTIAL}), may_fail_late=True, units=UNITS)
    return [
        fresh,
        replace(fresh, name="quantize continued", before=unfinished),
        replace(fresh, name="quantize --force", before=old, command=forced),
        replace(fresh, name="quantize --force over an unfinished run", before=old_and_unfinished, command=forced),
        replace(
            fresh,
            name="quantize with rows on disk",
            command=lambda root, progress: quantize(root, progress, max_memory="1KB"),
        ),
    ]


def _exports(ckpt: Path) -> list[Scenario]:
    def export(root: Path, progress: Progress, seed: int = 0, force: bool = False) -> None:
        export_bundle(ckpt, root / OUT, ExportOptions("ort-int4", threads=1, seed=seed, force=force), progress)

    def old(root: Path) -> None:
        export(root, no_progress, seed=1)

    def check(out: Path) -> None:
        check_bundle(out, "full")

    fresh = Scenario("export", export, check, is_repeatable=False)
    forced = Scenario("export --force", lambda root, progress: export(root, progress, force=True), check, old)
    return [fresh, forced]


def _calibrated_exports(ckpt: Path, data: Path) -> list[Scenario]:
    def export(root: Path, progress: Progress, seed: int = 0) -> None:
        options = ExportOptions("ort-int4", threads=1, group=16, seed=seed, force=True)
        export_calibrated(ckpt, root / OUT, options, QuantizeOptions(data), progress)

    def check(out: Path) -> None:
        check_bundle(out, "full")

    keeps = frozenset({f"{OUT}.quantized", f"{OUT}.quantized.partial"})
    return [
        Scenario("export --calib --force", export, check, lambda root: export(root, no_progress, seed=1), keeps=keeps)
    ]


def _training(folder: Path) -> Scenario:
    """Training with one worker, which is this process."""
    recipe = folder / "train.toml"
    small = RECIPE.replace("images = 80", "images = 16").replace("images = 320", "images = 24")
    recipe.write_text(small.replace("OTHERS", STAGE))
    (folder / "brightness.py").write_text(DATA)
    shutil.copy(DIGITS / "tokenizer.json", folder)

    def command(root: Path, progress: Progress) -> None:
        with mock.patch.object(train_run, "run_workers", _work_here):
            train_run.run(recipe, root / OUT, False, progress)

    def check(out: Path) -> None:
        assert train_run.is_ours(out) and Checkpoint(out)

    def without_times(out: Tree) -> Tree:
        record = json.loads(out.get("training.json", (0, b"{}"))[1])
        return out | {"training.json": (0, json.dumps(record.get("losses")).encode())}

    return Scenario("train", command, check, keeps=frozenset({PARTIAL}), may_fail_late=True, normal=without_times)


class _Untimed(Exchange):
    def cpu_s(self) -> float:
        """No time passes: how long this process runs must not shorten the schedule."""
        return 0.0


def _work_here(work: Callable[..., None], arguments: tuple[Any, ...], *_: object) -> None:
    try:
        with torch.enable_grad():
            work(_Untimed(0, 1), *arguments)
    except Exception as error:
        raise TrainingError(f"a worker failed: {error}") from error


def _engines(ckpt: Path) -> Scenario:
    """`build`, with a builder that writes a few bytes instead of an engine."""

    def before(root: Path) -> None:
        with _builder():
            export_bundle(ckpt, root / OUT, ExportOptions("rtx-int4", threads=1))

    def command(root: Path, progress: Progress) -> None:
        with _builder():
            build_bundle(root / OUT, BuildOptions(chunk_rows=64), progress)

    def check(out: Path) -> None:
        check_bundle(out, "full")

    def is_between(out: Path) -> bool:
        try:
            return not check_bundle(out, "full").manifest.engines
        except BundleError:
            return False

    def without_asides(out: Tree) -> Tree:
        return {path: entry for path, entry in out.items() if not path.startswith(".")}

    return Scenario("build", command, check, before, normal=without_asides, may_fail_late=True, is_between=is_between)


@contextmanager
def _builder() -> Iterator[None]:
    """TensorRT-RTX, replaced by what writes a file of the request's shapes."""

    def compile_engine(request: EngineRequest, progress: Progress) -> None:
        request.plan.write_bytes(f"{request.part.name} {request.shapes}".encode())

    library = TensorrtLibrary("tensorrt_rtx", ModuleType("tensorrt_rtx"), "1.7.0")
    build = "vlmdeploy.export.engines.build"
    with (
        mock.patch(f"{build}.import_tensorrt", lambda name: library),
        mock.patch("vlmdeploy.export.exporter.import_tensorrt", lambda name: library),
        mock.patch(f"{build}.compile_engine", compile_engine),
    ):
        yield

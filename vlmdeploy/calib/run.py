"""Quantize a float checkpoint with calibration data, unit by unit.

A unit is an encoder layer, the connector, a decoder layer or the head. Memory holds one linear of one expert with its
Hessian, and as many activations as fit. A killed run resumes at the unit it was in.
"""

import errno
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from vlmdeploy.artifact import check_output, locked, open_partial, partial_folder, remove_finished, remove_partial
from vlmdeploy.calib.activations import Pool
from vlmdeploy.calib.calibration_set import CalibrationSample, Pictures, Tokens, pictures_of, prompt_tokens
from vlmdeploy.calib.checkpoint_writer import (
    encoded_parameter,
    is_quantized_by_us,
    publish,
    unit_tensors,
)
from vlmdeploy.calib.coverage import Coverage, check_coverage
from vlmdeploy.calib.flow import Flow, Quantizer, Weights
from vlmdeploy.calib.processes import Processes
from vlmdeploy.calib.solver import Solver
from vlmdeploy.calib.state import (
    SETTINGS,
    Records,
    RunState,
    is_shard,
)
from vlmdeploy.calib.statistics import HessianKind, Inputs, Statistics
from vlmdeploy.calib.token_weights import BACKWARD, TokenWeights
from vlmdeploy.calib.units import UnitRunner
from vlmdeploy.errors import CalibrationError, QuantizationError
from vlmdeploy.model.checkpoint import Checkpoint
from vlmdeploy.overriding import override
from vlmdeploy.progress import Progress
from vlmdeploy.quant.grid import Quantized, dequantize, quantize_rtn
from vlmdeploy.quant.precision import PrecisionPlan
from vlmdeploy.quant.quantization_report import LinearReport, read_report
from vlmdeploy.records import first_difference
from vlmdeploy.spec.matrices import matrices

DEFAULT_MEMORY_BYTES = 1 << 30
ATTENDING_SAMPLES = 8  # whose attention is measured
MOST_FIRSTS_WEIGHT = 1.0  # of all first tokens together, relative to all others
FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Calibration:
    """The calibration samples in order, and how they were chosen."""

    samples: tuple[CalibrationSample, ...]
    pictures: Pictures
    tokens: Tokens
    description: str = ""
    skipped: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, samples: tuple[CalibrationSample, ...], description: str = "", **skipped: Any) -> "Calibration":
        """Derive pictures and tokens from the samples."""
        return cls(samples, pictures_of(samples), prompt_tokens(samples), description, skipped)


@dataclass(frozen=True)
class RunOptions:
    """How to run. settings: everything that determines the result, to compare runs and for the report.

    weigh: which tokens count more in the Hessians: docs/design/0012-first-tokens.md and 0013-token-weights.md; None for
    comparison. force: replace a finished output. reuse: keep one made with the same settings, even with `force`. tell:
    takes a line about what is to come.
    """

    settings: dict[str, Any]
    hessian: HessianKind = "routed"
    asymmetric: bool = False
    allow_uncalibrated: bool = False
    memory_bytes: int = DEFAULT_MEMORY_BYTES
    weigh: Literal["firsts", "gradients"] | None = "firsts"
    force: bool = False
    reuse: bool = False
    tell: Callable[[str], None] = lambda line: None


@dataclass(frozen=True)
class QuantizeResult:
    """The outcome and the report. is_reported_here: whether this process prints it."""

    message: str
    report: dict[str, Any]
    warnings: tuple[str, ...] = ()
    is_reported_here: bool = True


def run_quantization(
    checkpoint: Checkpoint,
    plan: PrecisionPlan,
    calibration: Calibration,
    solver: Solver,
    out: Path,
    options: RunOptions,
    progress: Progress,
) -> QuantizeResult:
    """Write the quantized checkpoint to `out`, resuming a killed run with the same settings.

    A finished `out` with the same settings stays unchanged. Raises CalibrationError, QuantizationError and ExportError;
    finished units stay in OUT.partial.
    """
    processes = Processes.join()
    done = read_report(out)
    if done and (options.reuse or not options.force):
        difference = first_difference(options.settings, done["settings"])
        if difference is None:
            if processes.is_first:
                remove_finished(partial_folder(out.absolute()), SETTINGS, options.settings, CalibrationError)
            return QuantizeResult("quantized already with these settings", done, is_reported_here=processes.is_first)
        if not options.force:
            key, ours, theirs = difference
            raise CalibrationError(
                f'{out}: exists, made with other settings: "{key}" is {theirs!r} there and {ours!r} now; replace it '
                "with --force"
            )
    check_output(out, options.force, is_quantized_by_us)
    coverage = check_coverage(
        checkpoint.spec, plan, calibration.tokens, calibration.pictures, processes, options.allow_uncalibrated
    )
    folder = partial_folder(out.absolute())
    with _only_run(folder, processes), _system_errors_explained(folder):
        processes.first_does(lambda: open_partial(folder, SETTINGS, options.settings, options.force, CalibrationError))
        run = QuantizationRun(checkpoint, plan, calibration, solver, options, processes, coverage, progress, folder)
        records = run.all_units()
        report = run.report(records)
        if processes.is_first:
            publish(checkpoint, plan, records, report, folder, out, options.force)
        processes.wait()
        if processes.is_first:
            remove_partial(folder, SETTINGS)
    return QuantizeResult("quantized", report, coverage.warnings, processes.is_first)


@contextmanager
def _system_errors_explained(folder: Path) -> Iterator[None]:
    """Turn system errors into CalibrationErrors: OUT.partial cannot be written, or a source file cannot be read."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        if _is_full(error) or _is_inside(folder, error):
            raise CalibrationError(
                f"{folder}: cannot be written: {reason}; free some space and give the same command again: it continues"
            ) from error
        name = error.filename if isinstance(error, OSError) else None
        where = reason if name is None else f"{name}: {reason}"
        raise CalibrationError(
            f"{where}; solve this and give the same command again: it continues with {folder}"
        ) from error


def _is_full(error: OSError | SafetensorError) -> bool:
    """Whether the disk or a quota is full."""
    return isinstance(error, OSError) and error.errno in FULL


def _is_inside(folder: Path, error: OSError | SafetensorError) -> bool:
    """Whether an error concerns a file in this folder. The tensor library names the file only in its message."""
    name = error.filename if isinstance(error, OSError) else None
    return f"{folder}{os.sep}" in str(error) if name is None else str(name).startswith(f"{folder}{os.sep}")


@contextmanager
def _only_run(folder: Path, processes: Processes) -> Iterator[None]:
    """Lock OUT.partial in the first process."""
    with ExitStack() as stack:
        processes.first_does(lambda: stack.enter_context(locked(folder)))
        yield


@contextmanager
def _named(target: str) -> Iterator[None]:
    """Prefix a QuantizationError with the linear's name and append a way out."""
    try:
        yield
    except QuantizationError as error:
        way_out = f"--override {target}=fp32 keeps it in float"
        raise QuantizationError(f"{target}: {error}: {way_out}") from error


@dataclass
class QuantizationRun(Quantizer):
    """One run: quantizes the linears of every unit and commits each finished unit."""

    checkpoint: Checkpoint
    plan: PrecisionPlan
    calibration: Calibration
    solver: Solver
    options: RunOptions
    processes: Processes
    coverage: Coverage
    progress: Progress
    folder: Path

    def __post_init__(self) -> None:
        self._codes: dict[str, Quantized] | None = None  # kept only by `in_memory`
        self._encoded: dict[str, dict[str, Tensor]] = {}  # of the current unit
        self._reports: list[LinearReport] = []
        self._counts: dict[str, Tensor] = {}  # token weights of the current unit's linears, if measured beforehand
        self._statistics = Statistics(self.processes, self.options.hessian)
        pool = Pool(self.folder / f"spill{self.processes.rank}", self.options.memory_bytes)
        self._runner = UnitRunner(self.checkpoint, self, pool, 2 if self.options.asymmetric else 1)
        spec = self.checkpoint.spec
        self._encoder = {f"vision.layers.{index}": index for index in range(spec.vision.num_layers)}
        self._decoder = {f"decoder.layers.{index}": index for index in range(spec.decoder.num_layers)}
        self.units = ["vision.embed", *self._encoder, "connector", "prompts", *self._decoder, "head"]
        self._state = RunState(self.folder, self.processes)
        self._measured = TokenWeights(
            self.checkpoint, self.calibration.samples, self.calibration.pictures, self.calibration.tokens,
            pool, self.processes, self._rows_of,
        )  # fmt: skip
        if self.options.weigh == "gradients":
            self.units = [*self._measured.units, *self.units]
        self._makes_keys = {
            matrix.target for matrix in matrices(spec) if matrix.part == "decoder" and matrix.name == "qkv"
        }
        self._total = sum(self.checkpoint.size(target) for target in self.plan.by_target)
        self._done = 0

    @torch.no_grad()
    def all_units(self) -> Records:
        """Run the unfinished units and return the records of all."""
        state, kept = self._state, self._measured.kept
        records = self.processes.first_does(lambda: state.finished(self.units, kept))
        state.tidy(records)
        self.processes.wait()
        if self.options.weigh == "gradients" and not records:
            outlook = self._measured.outlook(self.folder)
            if self.processes.is_first:
                self.options.tell(outlook)
        flow = self._resume(records)
        self._done = sum(self.checkpoint.size(linear.name) for linear in _linears(records))
        for unit in self.units[len(records) :]:
            self._show(unit)
            weights: dict[str, Tensor] = {}
            if unit in self._measured.units:
                flow, weights = self._measured.run(unit, flow)
            else:
                flow = self._run_unit(unit, flow)
            tensors = unit_tensors(self.checkpoint, unit, self.units, self._encoded) if self.processes.is_first else {}
            records[unit] = state.save_unit(unit, tensors, self._reports, flow, weights, kept(unit))
            del tensors
            self._encoded, self._reports = {}, []
        if flow is not None:
            flow.close()
        return records

    def in_memory(self) -> tuple[dict[str, Quantized], list[LinearReport]]:
        """Run all units and return the codes, too; for small models and comparisons."""
        self._codes = {}
        records = self.all_units()
        return self._codes, _linears(records)

    def _show(self, unit: str) -> None:
        self.progress(unit, self._done, self._total)

    def _run_unit(self, unit: str, flow: Flow | None) -> Flow | None:
        """Run a unit that quantizes, and return its output rows."""
        runner, calibration = self._runner, self.calibration
        if unit == "vision.embed":
            if flow is not None:  # of the backward pass
                flow.close()
            return runner.embed_pictures(calibration.pictures)
        assert flow is not None, "only the first unit has no input"
        if unit in self._encoder:
            return runner.vision_layer(self._encoder[unit], flow)
        if unit == "connector":
            return runner.connector(flow)
        if unit == "prompts":
            rows = runner.embed_prompts(calibration.samples, calibration.tokens, flow, calibration.pictures)
            flow.close()
            return rows
        if unit in self._decoder:
            if self.options.weigh == "gradients":
                self._counts = self._state.load_weights(f"{BACKWARD}.{unit}")
            return runner.decoder_layer(self._decoder[unit], flow, calibration.samples)
        runner.head(flow)
        flow.close()
        return None

    def _resume(self, records: Records) -> Flow | None:
        """The output rows of the last finished unit."""
        return self._rows_of(list(records)[-1]) if records and len(records) < len(self.units) else None

    def _rows_of(self, unit: str) -> Flow:
        """The output rows of a finished unit."""
        spec, pictures = self.checkpoint.spec, self.calibration.pictures
        streams = 1 if unit in self._measured.units else self._runner.streams
        if unit == "vision.embed" or unit in self._encoder:
            tokens, width = pictures.tokens(spec.vision.num_patches + 1), spec.vision.width
        elif unit == "connector":
            tokens, width = pictures.tokens(spec.connector.rows(spec.vision)), spec.decoder.hidden
        else:
            tokens, width = self.calibration.tokens, spec.decoder.hidden
        return self._state.load_flow(unit, tokens, width, streams, self._runner.pool)

    @override
    def linear(self, target: str, tokens: Tokens, expert: str | None, inputs: Inputs) -> Weights:
        self._show(target)
        weights = self.checkpoint.parameter(target).flatten(1)
        grid = self.plan[target].grid
        if grid is None:
            self._finish(target)
            return (weights,) * self._runner.streams
        (count,) = self.processes.sum_counts(len(tokens.select(expert, held_out=False)))
        if count < self.coverage.floor:
            codes = self._rounded(target, weights, f"uncalibrated: {count} tokens")
        else:
            counts = self._token_weights(target, weights, tokens, expert, inputs)
            problem = self._statistics.problem(target, weights, grid, tokens, expert, inputs, counts)
            codes, report = self.processes.first_does(lambda: self._solve(target, problem))
            self._reports.append(report)
            del problem
        self._keep(target, codes)
        self._finish(target)
        values = torch.from_numpy(dequantize(codes))
        return (values, weights) if self._runner.streams == 2 else (values,)

    def _token_weights(
        self, target: str, weights: Tensor, tokens: Tokens, expert: str | None, inputs: Inputs
    ) -> Tensor | None:
        """What each token counts in this linear's Hessian, [tokens]; None: all the same."""
        if self.options.weigh == "gradients":
            return self._counts.get(target)
        if self.options.weigh is None or target not in self._makes_keys:
            return None
        share = self._share_of_firsts(target, weights, tokens, expert, inputs)
        own = tokens.select(expert, held_out=False)
        is_first = tokens.is_first(own)
        count, others = self.processes.sum_counts(int(is_first.sum()), int((~is_first).sum()))
        each = share * others / count if count else 0.0
        if each <= 1:
            return None
        return torch.from_numpy(np.where(tokens.is_first(np.arange(tokens.count)), np.float32(each), np.float32(1)))

    def _share_of_firsts(
        self, target: str, weights: Tensor, tokens: Tokens, expert: str | None, inputs: Inputs
    ) -> float:
        """What first tokens together count in the Hessian of a decoder layer's keys and values, relative to all others.

        Models direct much of their attention to the first token, so errors there reach every other:
        docs/design/0012-first-tokens.md.
        """
        rule = self.checkpoint.rules.get(target.removesuffix("weight") + "bias")
        bias = None if rule is None else self.checkpoint.parameter(rule.target)
        samples = [self.calibration.samples[place] for place in self._attending]
        rows = [tokens.rows(place) for place in self._attending]
        seen = self._runner.attention_to_firsts(samples, rows, expert, weights, bias, inputs)
        self.processes.sum_in_place(seen)
        first, others = seen.tolist()
        return min(MOST_FIRSTS_WEIGHT, first / others) if others else 0.0

    @cached_property
    def _attending(self) -> list[int]:
        """A few of this process's samples, which with those of the other processes are always the same."""
        keys = [zlib.crc32(name.encode()) for name in self.calibration.tokens.names]
        everyone = sorted(key for own in self.processes.gather(keys) for key in own)
        return [place for place, key in enumerate(keys) if key <= everyone[:ATTENDING_SAMPLES][-1]]

    @override
    def unused(self, target: str) -> None:
        if self.plan[target].grid is not None:
            weights = self.checkpoint.parameter(target).flatten(1)
            self._keep(target, self._rounded(target, weights, "nothing reads its output"))
        self._finish(target)

    def _rounded(self, target: str, weights: Tensor, note: str) -> Quantized:
        grid = self.plan[target].grid
        assert grid is not None, "the callers check"
        self._reports.append(LinearReport(target, grid.bits, grid.group_size, "rtn", note=note))
        with _named(target):
            return quantize_rtn(weights.numpy(), grid)

    def _solve(self, target: str, problem: Any) -> tuple[Quantized, LinearReport]:
        with _named(target):
            return self.solver.solve(problem)

    def _keep(self, target: str, codes: Quantized) -> None:
        """Keep the codes of a linear, packed: unpacked they take twice the memory."""
        if self._codes is not None:
            self._codes[target] = codes
        if self.processes.is_first:
            self._encoded[target] = encoded_parameter(self.checkpoint.rules[target], codes)

    def _finish(self, target: str) -> None:
        self._done += self.checkpoint.size(target)

    def report(self, records: Records) -> dict[str, Any]:
        """The content of quantization_report.json."""
        files = [item for record in records.values() for item in record.files.items()]
        return {
            "settings": self.options.settings,
            "calibration": {
                "data": self.calibration.description,
                "samples": sum(self.processes.sum_counts(len(self.calibration.samples))),
                **self.calibration.skipped,
                **self.coverage.as_json(),
            },
            "warnings": list(self.coverage.warnings),
            "size_bytes": sum(entry.bytes for name, entry in files if is_shard(name)),
            "linears": [asdict(linear) for linear in _linears(records)],
        }


def _linears(records: Records) -> list[LinearReport]:
    return [linear for record in records.values() for linear in record.linears]

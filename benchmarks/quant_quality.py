"""The cost of quantizing the digits model's decoder: KL divergence from the float model's answers, for several methods,
calibration draws and widths; and each linear's error beside GPTQModel's.

    python benchmarks/quant_quality.py [--draws 3] [--bits 4 3] [--out FILE]

KL is the teacher-forced mean over the tokens of held-out answers, end token included, in nats. The model is nearly
always certain, so a few ambiguous answers dominate it; the squared error of the centred logits, to which all answers
contribute, is beside it. Encoder, connector and head stay in float to isolate the experts. GPTQModel runs per linear on
the same routed Hessians, in its own environment (`make gptqmodel`), if that exists.
"""

import argparse
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from make_data import make_data
from quant_speed import GPTQMODEL_PYTHON, Ask, worker
from torch import Tensor

from vlmdeploy.calib.calibration_set import CalibrationSample, hold_out, read_calibration_sample, read_pixels
from vlmdeploy.calib.coverage import check_coverage
from vlmdeploy.calib.processes import Processes
from vlmdeploy.calib.run import Calibration, QuantizationRun, RunOptions
from vlmdeploy.calib.solver import GptqSolver, Problem, Solver, measured_report
from vlmdeploy.calib.statistics import HessianKind
from vlmdeploy.data.balance import draw_samples
from vlmdeploy.data.samples import Picture
from vlmdeploy.data.source import open_source
from vlmdeploy.model.batch import derive_layout
from vlmdeploy.model.checkpoint import Checkpoint
from vlmdeploy.model.decoder import Cache
from vlmdeploy.model.load import fill_parameter, load_model
from vlmdeploy.model.tokenizer import import_tokenizer
from vlmdeploy.model.vlm import VisionLanguageModel
from vlmdeploy.quant.grid import Quantized, dequantize, quantize_rtn
from vlmdeploy.quant.precision import DEFAULT_GROUP, plan_precision
from vlmdeploy.quant.quantization_report import LinearReport
from vlmdeploy.runtime.chat import Tokenizer

ROOT = Path(__file__).parent.parent
CKPT = ROOT / "examples/digits/checkpoint"
BATCH = 128
FLOAT_PARTS = {"vision": "fp32", "connector": "fp32", "lm_head": "fp32"}


@dataclass(frozen=True)
class RtnSolver:
    """Round to nearest."""

    def solve(self, problem: Problem) -> tuple[Quantized, LinearReport]:
        quantized = quantize_rtn(problem.weights.numpy(), problem.grid)
        return quantized, _report(problem, quantized, "rtn")


@dataclass
class GptqModelSolver:
    """GPTQModel on each linear's Hessian."""

    ask: Ask
    folder: Path

    def solve(self, problem: Problem) -> tuple[Quantized, LinearReport]:
        theirs = self._quantize(problem)
        return theirs, _report(problem, theirs, "gptqmodel")

    def _quantize(self, problem: Problem) -> Quantized:
        names = {name: str(self.folder / f"{name}.npy") for name in ("weights", "hessian")}
        np.save(names["weights"], problem.weights.numpy())
        np.save(names["hessian"], problem.hessian.numpy())
        out, grid = self.folder / "out.npz", problem.grid
        request = {**names, "num_tokens": problem.tokens, "bits": grid.bits, "group_size": grid.group_size}
        self.ask({**request, "out": str(out)})
        with np.load(out) as found:
            return Quantized(found["codes"], found["scales"].astype(np.float32), grid)


@dataclass
class ComparedSolver:
    """GPTQModel; ours solves the same problem beside it, for the comparison per linear."""

    theirs: GptqModelSolver
    ratios: dict[str, float] = field(default_factory=dict)  # held-out error, ours / theirs

    def solve(self, problem: Problem) -> tuple[Quantized, LinearReport]:
        codes, report = self.theirs.solve(problem)
        _, ours = GptqSolver().solve(problem)
        if report.held_out_error and ours.held_out_error:
            self.ratios[problem.name] = ours.held_out_error / report.held_out_error
        return codes, report


@contextmanager
def gptqmodel() -> Iterator[GptqModelSolver]:
    """GPTQModel's worker, as a solver."""
    command = [str(GPTQMODEL_PYTHON), str(ROOT / "benchmarks/gptqmodel_worker.py")]
    with tempfile.TemporaryDirectory() as folder, worker(command, os.cpu_count() or 1) as ask:
        yield GptqModelSolver(ask, Path(folder))


def _report(problem: Problem, quantized: Quantized, method: str) -> LinearReport:
    grid = problem.grid
    return measured_report(problem, quantized, LinearReport(problem.name, grid.bits, grid.group_size, method))


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    name: str
    solver: Solver
    hessian: HessianKind = "routed"
    asymmetric: bool = False
    weigh: Literal["firsts", "gradients"] | None = "firsts"


def methods(worker: Solver | None) -> list[Method]:
    """Every row, GPTQModel's last."""
    ours = [
        Method("RTN", RtnSolver()),
        Method("text-only", GptqSolver(), "text-only"),
        Method("pooled", GptqSolver(), "pooled"),
        Method("routed", GptqSolver()),
        Method("routed, high", GptqSolver(), asymmetric=True),
        Method("routed, best", GptqSolver(), asymmetric=True, weigh="gradients"),
    ]
    return ours if worker is None else [*ours, Method("GPTQModel, routed", worker, weigh=None)]


@dataclass(frozen=True)
class Damage:
    """kl: mean KL divergence x 1e3. logits: mean squared error of the centred logits, relative, x 1e3. worst_share: how
    much of the divergence is in the worst 1 % of the tokens."""

    kl: float
    logits: float
    worst_share: float


class Judge:
    """A float model and held-out prompts with their answers."""

    def __init__(self, ckpt: Path, samples: Sequence[CalibrationSample]) -> None:
        self.checkpoint = Checkpoint(ckpt)
        self.samples = samples
        model = load_model(ckpt)
        self.image_rows = _image_rows(model, samples)
        self.expected = dict(self._log_probabilities(model, self.image_rows))

    def damage(self, codes: dict[str, Quantized]) -> Damage:
        """How far the answers are from the float model's with these codes in place of its linears."""
        model, sees_alike = self.filled(codes)
        image_rows = self.image_rows if sees_alike else _image_rows(model, self.samples)
        divergences, error, size = [], 0.0, 0.0
        for place, found in self._log_probabilities(model, image_rows):
            expected = self.expected[place]
            divergences.append(_divergence(expected, found))
            centred = [values - values.mean(-1, keepdim=True) for values in (expected, found)]
            error += float((centred[1] - centred[0]).square().sum())
            size += float(centred[0].square().sum())
        tokens = torch.cat(divergences)
        worst = tokens.sort(descending=True).values[: len(tokens) // 100]
        return Damage(1e3 * float(tokens.mean()), 1e3 * error / size, float(worst.sum() / tokens.sum()))

    def filled(self, codes: dict[str, Quantized]) -> tuple[VisionLanguageModel, bool]:
        """The float model with these codes, and whether its encoder and connector are as they were."""
        model = load_model(self.checkpoint.folder)
        for target, quantized in codes.items():
            values = torch.from_numpy(dequantize(quantized))
            fill_parameter(model, target, values.reshape(self.checkpoint.shape(target)))
        return model, not any(target.startswith(("vision.", "connector.")) for target in codes)

    def divergences(self, model: VisionLanguageModel) -> list[Tensor]:
        """The KL divergence of each answer token, for each sample. The model sees pictures as the float one does."""
        log_probabilities = self._log_probabilities(model, self.image_rows)
        found = {place: _divergence(self.expected[place], values) for place, values in log_probabilities}
        return [found[place] for place in range(len(self.samples))]

    @torch.no_grad()
    def _log_probabilities(
        self, model: VisionLanguageModel, image_rows: dict[Picture, Tensor]
    ) -> Iterator[tuple[int, Tensor]]:
        """Of the answer of each sample, by its place: float64 [answer tokens, vocab]."""
        for places in _batches_of_equal_length(self.samples):
            batch = [self.samples[place] for place in places]
            ids, types = (
                torch.from_numpy(np.stack([getattr(sample, name) for sample in batch])) for name in ("ids", "types")
            )
            layout = derive_layout(model.spec, ids, None, types, None, None)
            rows = [image_rows[sample.image] for sample in batch if sample.image]
            embedded = model.join(ids, types, torch.stack(rows) if rows else None)
            hidden = model.prefill(embedded, layout, Cache.empty(model.spec.decoder.num_layers))
            for index, place in enumerate(places):
                asked = hidden[index, self.samples[place].answer_start - 1 :]
                yield place, model.logits(asked).double().log_softmax(-1)


def _divergence(expected: Tensor, found: Tensor) -> Tensor:
    """KL divergence of each token, from log-probabilities [tokens, vocab]."""
    return (expected.exp() * (expected - found)).sum(-1)


@torch.no_grad()
def _image_rows(model: VisionLanguageModel, samples: Sequence[CalibrationSample]) -> dict[Picture, Tensor]:
    paths = list(dict.fromkeys(sample.image for sample in samples if sample.image))
    return {path: model.encode_images(torch.from_numpy(read_pixels(path, model.spec))[None])[0] for path in paths}


def _batches_of_equal_length(samples: Sequence[CalibrationSample]) -> Iterator[list[int]]:
    by_length: dict[tuple[int, bool], list[int]] = {}
    for place, sample in enumerate(samples):
        by_length.setdefault((len(sample.ids), sample.image is not None), []).append(place)
    for places in by_length.values():
        yield from (places[start : start + BATCH] for start in range(0, len(places), BATCH))


def read_prompts(data: Path, count: int, seed: int, ckpt: Path = CKPT) -> tuple[CalibrationSample, ...]:
    """Samples of a data folder as prompts with answers."""
    spec, tokenizer = Checkpoint(ckpt).spec, Tokenizer(import_tokenizer(ckpt / "tokenizer.json"))
    drawn = draw_samples(list(open_source(data).samples()), count, seed)
    return tuple(read_calibration_sample(sample, spec, tokenizer, None) for sample in drawn)


def quantized_codes(
    checkpoint: Checkpoint,
    method: Method,
    bits: int,
    calibration: Calibration,
    group: int = DEFAULT_GROUP,
) -> dict[str, Quantized]:
    """Codes of all decoder linears by one method."""
    processes = Processes()
    plan = plan_precision(checkpoint.spec, "ort-int4", {"decoder": f"int{bits}", **FLOAT_PARTS}, group)
    options = RunOptions({}, method.hessian, method.asymmetric, memory_bytes=8 << 30, weigh=method.weigh)
    coverage = check_coverage(
        checkpoint.spec, plan, calibration.tokens, calibration.pictures, processes, allow_uncalibrated=False
    )
    with tempfile.TemporaryDirectory() as folder:
        run = QuantizationRun(
            checkpoint, plan, calibration, method.solver, options, processes, coverage, lambda *_: None, Path(folder)
        )
        return run.in_memory()[0]


def measure(bits: int, draws: int, samples: int, data: Path, judge: Judge, say: Callable[[str], None]) -> None:
    """Damage by every method, for each calibration draw."""
    table: dict[str, list[Damage]] = {}
    ratios: list[float] = []
    with gptqmodel() if GPTQMODEL_PYTHON.is_file() else nullcontext() as theirs:
        worker = None if theirs is None else ComparedSolver(theirs)
        for draw in range(draws):
            calibration = Calibration.of(hold_out(read_prompts(data, samples, draw)))
            for method in methods(worker):
                codes = quantized_codes(judge.checkpoint, method, bits, calibration)
                for name, own in {method.name: codes, **_experts_alone(method.name, codes)}.items():
                    damage = judge.damage(own)
                    table.setdefault(name, []).append(damage)
                    print(f"{bits} bits, draw {draw}, {name}: {damage}", file=sys.stderr, flush=True)
            if worker is not None:
                ratios += worker.ratios.values()
    _print_table(f"{bits} bits: KL x 1e3", {name: [each.kl for each in found] for name, found in table.items()}, say)
    errors = {name: [each.logits for each in found] for name, found in table.items()}
    _print_table(f"{bits} bits: squared error of the logits x 1e3", errors, say)
    shares = [each.worst_share for found in table.values() for each in found]
    say(f"\nThe worst 1 % of the tokens hold {100 * np.mean(shares):.0f} % of the KL divergence.")
    if ratios:
        say(f"Held-out error per linear, ours / GPTQModel's: mean {np.mean(ratios):.3f}, largest {max(ratios):.3f}.")


def _experts_alone(name: str, codes: dict[str, Quantized]) -> dict[str, dict[str, Quantized]]:
    """The codes of either expert, of the method that is the default."""
    return {
        f"{name}, {expert} expert alone": {target: own for target, own in codes.items() if f".{expert}." in target}
        for expert in (("language", "vision") if name == "routed" else ())
    }


def _print_table(title: str, table: dict[str, list[float]], say: Callable[[str], None]) -> None:
    """One row per method: each draw, the mean, and the mean ratio over the draws to three of the methods."""
    reference = [name for name in ("RTN", "GPTQModel, routed", "routed") if name in table]
    draws = len(table["RTN"])
    heads = [title, *(f"draw {draw}" for draw in range(draws)), "mean", *(f"/ {name}" for name in reference)]
    say(f"\n| {' | '.join(heads)} |")
    say("|---" * len(heads) + "|")
    for name, values in table.items():
        shares = [np.mean(np.array(values) / np.array(table[other])) for other in reference]
        cells = [*(f"{value:.3f}" for value in values), f"**{np.mean(values):.3f}**", *(f"{x:.2f}" for x in shares)]
        say(f"| {name} | {' | '.join(cells)} |")


def options_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=3, help="calibration sets")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--out", type=Path, help="also write the tables there")
    return parser


@contextmanager
def said(out: Path | None) -> Iterator[Callable[[str], None]]:
    """A function that prints a line; after the block all lines are written to `out`, too."""
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    yield say
    if out:
        out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--samples", type=int, default=1024, help="calibration samples of each set")
    parser.add_argument("--scenes", type=int, default=600, help="held-out scenes, about 9 answers each")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, said(options.out) as say:
        calib, test = Path(folder) / "calib", Path(folder) / "test"
        make_data("calib", 4 * options.samples // 3, calib, 0)
        make_data("test", options.scenes, test, 0)
        answers = read_prompts(test, 9 * options.scenes, 0)
        judge = Judge(CKPT, answers)
        tokens = sum(map(len, judge.expected.values()))
        say(
            f"{len(answers)} held-out answers, {tokens} tokens; {options.samples} calibration samples per draw, an "
            f"eighth held out; {platform.machine()}, torch {torch.__version__}"
        )
        for bits in options.bits:
            measure(bits, options.draws, options.samples, calib, judge, say)


if __name__ == "__main__":
    main()

"""The cost of quantizing a real language model's decoder: KL divergence from the float model on held-out English, for
several methods and calibration draws, with what each lever gives.

    PYTHONPATH=examples/digits python benchmarks/quant_real_lm.py [--draws 3] [--bits 4 3] [--out FILE]

`real_lm.py` makes the model and the texts. Groups of 64; embedding, head, encoder and connector stay in float to
isolate the decoder. KL is the mean over all tokens of 24 documents, in nats; the intervals are of 2000 bootstrap
samples of the documents. GPTQModel quantizes each linear on the same plain Hessian, in its own environment
(`make gptqmodel`), if that exists; set GPTQMODEL_CPU_WORKERS=2 on two cores. Needs the package `gguf`.
"""

import platform
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from quant_quality import Method, RtnSolver, gptqmodel, options_parser, quantized_codes, said
from quant_speed import GPTQMODEL_PYTHON
from real_lm import BOS, MODEL, TEXTS, Gguf, unpacked, write_checkpoint

from vlmdeploy.calib.calibration_set import CalibrationSample, hold_out, sample_of_ids
from vlmdeploy.calib.run import Calibration
from vlmdeploy.calib.solver import GptqSolver, Solver
from vlmdeploy.model.checkpoint import Checkpoint
from vlmdeploy.model.load import fill_parameter, load_model
from vlmdeploy.model.tokenizer import import_tokenizer
from vlmdeploy.quant.grid import Quantized, dequantize
from vlmdeploy.runtime.chat import Tokenizer

GROUP = 64
CALIBRATION_TEXTS, TEST_TEXTS = 32, 24
LONGEST, SHORTEST = 256, 64  # tokens of a text
RESAMPLES = 2000


def methods(worker: Solver | None) -> list[Method]:
    """Every row, GPTQModel's last."""
    ours = [
        Method("RTN", RtnSolver()),
        Method("neither", GptqSolver(signed=False), weigh=None),
        Method("signed scales alone", GptqSolver(), weigh=None),
        Method("first tokens alone", GptqSolver(signed=False)),
        Method("default: both", GptqSolver()),
        Method("high: both", GptqSolver(), asymmetric=True),
    ]
    return ours if worker is None else [*ours, Method("GPTQModel", worker, weigh=None)]


@dataclass(frozen=True)
class Damage:
    """KL divergence x 1e3: the mean over the tokens, and its interval over the documents."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, sums: np.ndarray, counts: np.ndarray) -> "Damage":
        chosen = np.random.default_rng(0).integers(0, len(sums), (RESAMPLES, len(sums)))
        means = 1e3 * sums[chosen].sum(1) / counts[chosen].sum(1)
        low, high = np.quantile(means, (0.025, 0.975))
        return cls(float(1e3 * sums.sum() / counts.sum()), float(low), float(high))


class Judge:
    """The float model on the held-out documents."""

    def __init__(self, folder: Path, texts: list[str]) -> None:
        self.checkpoint = Checkpoint(folder)
        self.tokenizer = Tokenizer(import_tokenizer(folder / "tokenizer.json"))
        self.documents = [torch.tensor([BOS, *self.tokenizer.encode(text)][:LONGEST]) for text in texts]
        self.model = load_model(folder)
        self.expected = [self._log_probabilities(ids) for ids in self.documents]

    def damage(self, codes: dict[str, Quantized]) -> Damage:
        """How far the model is with these codes; every method must give the same linears."""
        for target, quantized in codes.items():
            values = torch.from_numpy(dequantize(quantized)).reshape(self.checkpoint.shape(target))
            fill_parameter(self.model, target, values)
        sums = [
            float((expected.exp() * (expected - self._log_probabilities(ids))).sum())
            for ids, expected in zip(self.documents, self.expected, strict=True)
        ]
        return Damage.of(np.array(sums), np.array([len(ids) for ids in self.documents]))

    @torch.no_grad()
    def _log_probabilities(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(ids[None])[0]
        return logits.log_softmax(-1)

    def calibration(self, texts: list[str], draw: int) -> Calibration:
        """Texts drawn without replacement, cut where they are long."""
        samples: list[CalibrationSample] = []
        for place in np.random.default_rng(draw).permutation(len(texts)):
            ids = np.array([BOS, *self.tokenizer.encode(texts[place])][:LONGEST], np.int64)
            if len(ids) >= SHORTEST and len(samples) < CALIBRATION_TEXTS:
                samples.append(sample_of_ids(f"text {place}", None, ids, len(ids), self.checkpoint.spec))
        return Calibration.of(hold_out(samples))

    def codes(self, method: Method, bits: int, calibration: Calibration) -> dict[str, Quantized]:
        """Codes of the language expert. No picture reaches the vision expert, which is only rounded and not judged."""
        codes = quantized_codes(self.checkpoint, method, bits, calibration, GROUP, allow_uncalibrated=True)
        return {target: found for target, found in codes.items() if ".language." in target}


def measure(judge: Judge, texts: list[str], bits: int, draws: int, say: Callable[[str], None]) -> None:
    """One table: a row for each method, a column for each draw, and ratios to two of the methods."""
    table: dict[str, list[Damage]] = {}
    with gptqmodel() if GPTQMODEL_PYTHON.is_file() else nullcontext() as worker:
        for draw in range(draws):
            calibration = judge.calibration(texts, draw)
            for method in methods(worker):
                damage = judge.damage(judge.codes(method, bits, calibration))
                table.setdefault(method.name, []).append(damage)
                print(f"{bits} bits, draw {draw}, {method.name}: {damage}", flush=True)
    references = [name for name in ("GPTQModel", "neither") if name in table]
    heads = [
        f"{bits} bits: KL x 1e3",
        *(f"draw {draw}" for draw in range(draws)),
        *(f"/ {name}" for name in references),
    ]
    say(f"\n| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for name, found in table.items():
        cells = [f"{each.mean:.1f} [{each.low:.1f}, {each.high:.1f}]" for each in found]
        for other in references:
            ratios = [each.mean / reference.mean for each, reference in zip(found, table[other], strict=True)]
            cells.append(f"{np.mean(ratios):.2f}")
        say(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    options = options_parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as place, said(options.out) as say:
        folder = Path(place)
        texts = unpacked(TEXTS, folder).read_text(encoding="utf-8").splitlines()
        checkpoint = write_checkpoint(Gguf(unpacked(MODEL, folder)), folder / "checkpoint")
        judge = Judge(checkpoint, texts[-TEST_TEXTS:])
        say(
            f"SmolLM2-135M-Instruct as a CogVLM2's language expert, groups of {GROUP}; {TEST_TEXTS} held-out texts, "
            f"{sum(map(len, judge.documents))} tokens; {CALIBRATION_TEXTS} calibration texts of up to {LONGEST} tokens "
            f"per draw, an eighth held out; {platform.machine()}, torch {torch.__version__}"
        )
        for bits in options.bits:
            measure(judge, texts[:-TEST_TEXTS], bits, options.draws, say)


if __name__ == "__main__":
    main()

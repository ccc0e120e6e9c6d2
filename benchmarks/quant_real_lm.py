"""The cost of quantizing a real language model's decoder: KL divergence from the float model on held-out English, for
the qualities of `vlmdeploy quantize`, GPTQModel, and what each lever gives.

    PYTHONPATH=examples/digits python benchmarks/quant_real_lm.py [--draws 3] [--bits 4 3] [--levers] [--parts]

`real_lm.py` makes the model and the texts. A calibration set has texts, and pictures with texts; the held-out prompts
are other texts, without and with a picture. Our rows come from the command line. Groups of 64; embedding, head, encoder
and connector stay in float to isolate the decoder. KL is the mean over the answers' tokens, in nats; the intervals are
of 2000 bootstrap samples of the prompts. GPTQModel quantizes each linear on the same plain Hessian, routed by expert,
in its own environment (`make gptqmodel`), if that exists; set GPTQMODEL_CPU_WORKERS=2 on two cores. AutoRound quantizes
the language model alone, from the texts (`make autoround`). Needs the package `gguf`.
"""

import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from quant_quality import Judge, Method, RtnSolver, gptqmodel, options_parser, quantized_codes, read_prompts, said
from quant_speed import GPTQMODEL_PYTHON
from real_lm import BOS, MODEL, TEXTS, Gguf, llama_linears, unpacked, write_checkpoint, write_llama
from safetensors.torch import load_file
from torch import Tensor

from vlmdeploy.calib.processes import Processes
from vlmdeploy.calib.request import QuantizeOptions, read_calibration
from vlmdeploy.calib.solver import GptqSolver, Solver
from vlmdeploy.model.load import fill_parameter, load_model
from vlmdeploy.model.tokenizer import import_tokenizer
from vlmdeploy.model.vlm import VisionLanguageModel
from vlmdeploy.progress import no_progress
from vlmdeploy.quant.grid import Grid, dequantize, quantize_rtn
from vlmdeploy.quant.quantization_report import read_report
from vlmdeploy.runtime.chat import Tokenizer

GROUP = 64
CALIBRATION_TEXTS, CALIBRATION_PICTURES, TEST_TEXTS, TEST_PICTURES = 32, 16, 24, 12
LONGEST, SHORTEST = 250, 64  # tokens of a text
PROMPT_WORDS = 8
PICTURE_PX, BLOCKS = 112, 7
AUTOROUND_ITERATIONS = 50  # a quarter of its default, to end within the hour on two cores
AUTOROUND_PYTHON = Path(__file__).parent.parent / ".venv-autoround/bin/python"
WORKER = Path(__file__).parent / "autoround_worker.py"
QUALITIES = ("default", "high", "best")
RESAMPLES = 2000
LESS_DAMPING = (0.01, 0.05, 0.2)


def levers() -> list[Method]:
    """What was there before, and each lever on its own."""
    before = GptqSolver(signed=False, dampings=LESS_DAMPING)
    return [
        Method("before", before, weigh=None),
        Method("before, high", before, weigh=None, asymmetric=True),
        Method("before + first tokens", before),
        Method("before + scales of either sign", GptqSolver(dampings=LESS_DAMPING), weigh=None),
        Method("default without damping above 0.2", GptqSolver(dampings=LESS_DAMPING)),
        Method("high without damping above 0.2", GptqSolver(dampings=LESS_DAMPING), asymmetric=True),
        Method("best without the float stream", GptqSolver(), weigh="gradients"),
    ]


@dataclass(frozen=True)
class Damage:
    """KL divergence x 1e3: the mean over the tokens, and its interval over the prompts."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, divergences: list[Tensor]) -> "Damage":
        sums, counts = (np.array([function(each) for each in divergences]) for function in (torch.sum, len))
        chosen = np.random.default_rng(0).integers(0, len(sums), (RESAMPLES, len(sums)))
        means = 1e3 * sums[chosen].sum(1) / counts[chosen].sum(1)
        low, high = np.quantile(means, (0.025, 0.975))
        return cls(float(1e3 * sums.sum() / counts.sum()), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.mean:.1f} [{self.low:.1f}, {self.high:.1f}]"


@dataclass(frozen=True)
class Bench:
    """The model, its texts, and the held-out prompts: first those without a picture."""

    ckpt: Path
    texts: list[str]
    tokenizer: Tokenizer
    judge: Judge

    @classmethod
    def make(cls, folder: Path) -> "Bench":
        ckpt = write_checkpoint(Gguf(unpacked(MODEL, folder)), folder / "checkpoint")
        tokenizer = Tokenizer(import_tokenizer(ckpt / "tokenizer.json"))
        encoded = map(tokenizer.encode, unpacked(TEXTS, folder).read_text(encoding="utf-8").splitlines())
        texts = [tokenizer.decode(ids[:LONGEST]) for ids in encoded if len(ids) >= SHORTEST]
        asked = [*texts[-TEST_TEXTS:], *texts[-TEST_TEXTS : -TEST_TEXTS + TEST_PICTURES]]
        data = write_data(folder / "test", asked, TEST_PICTURES, seed=0)
        prompts = sorted(read_prompts(data, len(asked), 0, ckpt), key=lambda sample: sample.image is not None)
        return cls(ckpt, texts[:-TEST_TEXTS], tokenizer, Judge(ckpt, prompts))

    def draw(self, seed: int, folder: Path) -> Path:
        """A calibration set; texts are drawn without replacement."""
        count = CALIBRATION_TEXTS + CALIBRATION_PICTURES
        chosen = np.random.default_rng(seed).permutation(len(self.texts))[:count]
        return write_data(folder, [self.texts[place] for place in chosen], CALIBRATION_PICTURES, 1 + seed)

    def damages(self, model: VisionLanguageModel) -> tuple[Damage, Damage]:
        """Without and with a picture."""
        found = self.judge.divergences(model)
        return Damage.of(found[:TEST_TEXTS]), Damage.of(found[TEST_TEXTS:])

    def by_command(self, bits: int, data: Path, out: Path, *options: str) -> VisionLanguageModel:
        """`vlmdeploy quantize`. options: come last, and replace those of every run."""
        common = vars(options_of(data, bits))
        given = [f"--{name.replace('_', '-')}={common[name]}" for name in GIVEN]
        command = [sys.executable, "-m", "vlmdeploy", "quantize", "--ckpt", self.ckpt, "--out", out, *given, *options]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
        return load_model(out)

    def by_method(self, method: Method, bits: int, data: Path) -> tuple[Damage, Damage]:
        """A method that has no command, on the samples that the command chooses."""
        checkpoint = self.judge.checkpoint
        calibration, _ = read_calibration(checkpoint, options_of(data, bits), Processes(), no_progress)
        assert len(calibration.samples) == CALIBRATION_TEXTS + CALIBRATION_PICTURES
        return self.damages(self.judge.filled(quantized_codes(checkpoint, method, bits, calibration, GROUP))[0])

    def by_autoround(self, bits: int, data: Path) -> Damage:
        """AutoRound on the texts, as a language model of its own."""
        calibration, _ = read_calibration(self.judge.checkpoint, options_of(data, bits), Processes(), no_progress)
        stream = np.concatenate([sample.ids for sample in calibration.samples if sample.image is None])
        rows = stream[: len(stream) // (LONGEST - 1) * (LONGEST - 1)].reshape(-1, LONGEST - 1)
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            write_llama(self.judge.checkpoint, folder)
            np.save(folder / "calibration.npy", np.insert(rows, 0, BOS, axis=1))
            command = [AUTOROUND_PYTHON, WORKER, folder, bits, GROUP, AUTOROUND_ITERATIONS]
            subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
            linears = llama_linears(load_file(folder / "quantized.safetensors"))
        model = load_model(self.ckpt)
        for target, values in linears.items():
            fill_parameter(model, target, values)
        return self.damages(model)[0]


GIVEN = ("calib", "samples", "tokens", "bits", "group", "vision", "connector", "lm_head")


def options_of(data: Path, bits: int) -> QuantizeOptions:
    """Every sample of `data`; only the decoder is quantized."""
    return QuantizeOptions(
        data, samples=1000, tokens=1 << 20, bits=str(bits), group=GROUP, vision="fp32", connector="fp32", lm_head="fp32"
    )


def write_data(folder: Path, texts: list[str], pictures: int, seed: int) -> Path:
    """A folder with data.jsonl. The first words of a text are the question, the rest is the answer; the last texts
    have a picture: noise in blocks."""
    folder.mkdir()
    random, rows = np.random.default_rng(seed), []
    for place, text in enumerate(texts):
        words = text.split(" ")
        question, answer = " ".join(words[:PROMPT_WORDS]), " " + " ".join(words[PROMPT_WORDS:])
        row: dict[str, object] = {
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        }
        if place >= len(texts) - pictures:
            noise = random.integers(0, 256, (BLOCKS, BLOCKS, 3), np.uint8)
            row["image"] = f"{place}.png"
            Image.fromarray(noise).resize((PICTURE_PX, PICTURE_PX)).save(folder / f"{place}.png")
        rows.append(json.dumps(row))
    (folder / "data.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


Row = tuple[str, Damage, Damage] | tuple[str, Damage]  # the name, and the damage without and with a picture


def rows_of(bench: Bench, bits: int, data: Path, worker: Solver | None) -> Iterator[Row]:
    """What every draw has."""
    with tempfile.TemporaryDirectory() as folder:
        for quality in QUALITIES:
            model = bench.by_command(bits, data, Path(folder) / quality, f"--quality={quality}")
            yield quality, *bench.damages(model)
    if worker is not None:
        yield "GPTQModel", *bench.by_method(Method("GPTQModel", worker, weigh=None), bits, data)


def rows_of_first(bench: Bench, bits: int, data: Path, has_levers: bool, has_parts: bool) -> Iterator[Row]:
    """What the first draw has besides."""
    for method in (Method("RTN", RtnSolver()), *(levers() if has_levers else ())):
        yield method.name, *bench.by_method(method, bits, data)
    if has_parts:
        yield from rows_of_parts(bench, bits, data)
    if AUTOROUND_PYTHON.is_file():
        yield f"AutoRound, {AUTOROUND_ITERATIONS} iterations", bench.by_autoround(bits, data)


def rows_of_parts(bench: Bench, bits: int, data: Path) -> Iterator[Row]:
    """What head and embedding cost, and bits chosen by `--budget` at the size of uniform ones."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for kind in ("int8", "int4"):
            model = bench.by_command(bits, data, folder / kind, f"--lm-head={kind}")
            yield f"default, head {kind}", *bench.damages(model)
        megabytes = read_report(folder / "int4")["size_bytes"] / 1e6
        model = bench.by_command(bits, data, folder / "budget", "--lm-head=int4", f"--budget={megabytes:.3f}MB")
        yield "default, bits by --budget, as large as with head int4", *bench.damages(model)
        for kind, size in (("int8", GROUP), ("int4", GROUP), ("int4", GROUP // 2)):
            model = load_model(bench.ckpt)
            rounded = quantize_rtn(model.embedding.weight.detach().numpy(), Grid(int(kind[3:]), size))
            model.embedding.weight.data = torch.from_numpy(dequantize(rounded))
            yield f"embedding alone {kind}, groups of {size}", *bench.damages(model)


def measure(bench: Bench, bits: int, draws: int, has_levers: bool, has_parts: bool, say: Callable[[str], None]) -> None:
    """Two tables, without and with a picture: a row for each method, a column for each draw."""
    tables: tuple[dict[str, list[Damage]], ...] = ({}, {})
    with gptqmodel() if GPTQMODEL_PYTHON.is_file() else nullcontext() as worker, tempfile.TemporaryDirectory() as place:
        for draw in range(draws):
            data = bench.draw(draw, Path(place) / str(draw))
            more = () if draw else rows_of_first(bench, bits, data, has_levers, has_parts)
            for name, *damages in chain(rows_of(bench, bits, data, worker), more):
                for table, damage in zip(tables, damages, strict=False):
                    table.setdefault(name, []).append(damage)
                print(f"{bits} bits, draw {draw}, {name}: {'; with a picture '.join(map(str, damages))}", flush=True)
    for title, table in zip(("texts", "texts with a picture"), tables, strict=True):
        print_table(f"{bits} bits, {title}: KL x 1e3", table, draws, say)


def print_table(title: str, table: dict[str, list[Damage]], draws: int, say: Callable[[str], None]) -> None:
    """One row per method, and the mean ratio over its draws to two of them."""
    references = [name for name in ("GPTQModel", "before") if name in table]
    heads = [title, *(f"draw {draw}" for draw in range(draws)), *(f"/ {name}" for name in references)]
    say(f"\n| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for name, found in table.items():
        cells = [str(each) for each in found] + ["" for _ in range(draws - len(found))]
        for other in references:
            ratios = [each.mean / reference.mean for each, reference in zip(found, table[other], strict=False)]
            cells.append(f"{np.mean(ratios):.2f}")
        say(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--levers", action="store_true", help="also what each lever gives, on the first draw")
    parser.add_argument("--parts", action="store_true", help="also what head, embedding and --budget cost there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, said(options.out) as say:
        bench = Bench.make(Path(place))
        counts = [len(values) for _, values in sorted(bench.judge.expected.items())]
        say(
            f"SmolLM2-135M-Instruct as both experts of a CogVLM2, groups of {GROUP}; held out: {TEST_TEXTS} texts with "
            f"{sum(counts[:TEST_TEXTS])} tokens, {TEST_PICTURES} with a picture and {sum(counts[TEST_TEXTS:])} tokens; "
            f"per draw {CALIBRATION_TEXTS} texts and {CALIBRATION_PICTURES} pictures with texts, an eighth held out; "
            f"{platform.machine()}, torch {torch.__version__}"
        )
        for bits in options.bits:
            measure(bench, bits, options.draws, options.levers, options.parts, say)


if __name__ == "__main__":
    main()

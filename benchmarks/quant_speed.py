"""Seconds and peak memory of quantizing one linear at CogVLM-17B's widths (W4g128), beside GPTQModel if installed.

Both run in warmed-up worker processes, never at the same time, and alternate: one round is ours, GPTQModel, ours with
one sweep; every second round is reversed. Seconds are medians, ratios are per round. Time is from weights and Hessian
in memory to codes, including the factorization. Peak memory is a fresh process's with one linear: libraries, weights,
Hessian and temporaries. Nothing is subtracted for GPTQModel, whose worker may hold weights or Hessian twice. Both use
damping 0.05, its default.

The data are synthetic: normal weights, and inputs with a spiked covariance, half of its energy in 32 random directions
with strengths falling as 1 / i and half isotropic, each input scaled by exp(0.5 z). The Hessian holds four tokens per
input. Errors are measured on a second Hessian of new tokens, relative to the mean square of the outputs.

    python benchmarks/quant_speed.py [--shapes dense qkv gate+up down] [--rounds 3] [--out benchmarks/results]
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from gptqmodel_worker import peak_rss_bytes

from vlmdeploy.bench.machine import cpu_model
from vlmdeploy.calib.hessian import HessianSum
from vlmdeploy.quant.gptq import GptqOptions, factorize, output_loss, quantize_gptq
from vlmdeploy.quant.grid import Grid, Quantized, dequantize, quantize_rtn

Json = dict[str, Any]
Ask = Callable[[Json], Json]

FOLDER = Path(__file__).resolve().parent
GPTQMODEL_PYTHON = FOLDER.parent / ".venv-gptqmodel" / "bin" / "python"
GRID = Grid(bits=4, group_size=128)
DAMPING = 0.05
SHAPES = {"dense": (4096, 4096), "qkv": (4096, 12288), "gate+up": (4096, 22016), "down": (11008, 4096)}  # in, out
QUICK_SHAPES = {"small": (256, 384)}
HESSIAN_WIDTHS, QUICK_HESSIAN_WIDTHS = (4096, 11008), (256,)
LAYERS = 32
SPIKES, SPREAD = 32, 0.5
TOKENS_PER_INPUT, HELD_OUT_TOKENS_PER_INPUT = 4, 1
BATCH_TOKENS = 1024
PEAK_TARGETS_BYTES = {"ours": 2.6e9, "one sweep": 3.3e9}
SWEEPS = {"ours": 0, "one sweep": 1}
THEIRS = "GPTQModel"


@dataclass(frozen=True)
class Problem:
    """Arrays of one linear on disk: weights [out, in], hessian and held_out [in, in], float32."""

    folder: Path
    width: int
    outputs: int

    def load(self, name: str) -> torch.Tensor:
        return torch.from_numpy(np.load(self.folder / f"{name}.npy"))

    def request(self, method: str) -> Json:
        """A request for either worker; `sweeps` and `damping` are for ours."""
        return {
            "weights": str(self.folder / "weights.npy"), "hessian": str(self.folder / "hessian.npy"),
            "num_tokens": TOKENS_PER_INPUT * self.width, "bits": GRID.bits, "group_size": GRID.group_size,
            "damping": DAMPING, "sweeps": SWEEPS.get(method, 0), "out": str(self.folder / f"{method}.npz"),
        }  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """One linear: seconds of each round, held-out error and peak memory of each method."""

    width: int
    outputs: int
    seconds: dict[str, list[float]]
    errors: dict[str, float]
    peak_bytes: dict[str, int]

    def speedup(self, method: str) -> list[float]:
        """GPTQModel's seconds / ours, round by round."""
        return [theirs / ours for theirs, ours in zip(self.seconds[THEIRS], self.seconds[method], strict=True)]


# Our worker


def run_worker() -> None:
    """Answer requests, one JSON line each, until stdin ends."""
    for line in sys.stdin:
        request = json.loads(line)
        answer = accumulate(request["width"]) if "width" in request else quantize(request)
        print(json.dumps(answer), flush=True)


def quantize(request: Json) -> Json:
    """Seconds from weights and Hessian to codes, and the peak memory of this process so far."""
    weights = torch.from_numpy(np.load(request["weights"]))
    hessian = torch.from_numpy(np.load(request["hessian"]))
    grid = Grid(request["bits"], request["group_size"])
    start = time.perf_counter()
    factor = factorize(hessian, request["damping"])
    quantized = quantize_gptq(weights, factor, grid, GptqOptions(sweeps=request["sweeps"]), hessian)
    seconds, peak = time.perf_counter() - start, peak_rss_bytes()
    np.savez(request["out"], codes=quantized.codes, scales=quantized.scales)
    return {"seconds": seconds, "peak_rss_bytes": peak}


def accumulate(width: int) -> Json:
    """Seconds per 1000 tokens of adding a batch to a Hessian."""
    total, x = HessianSum(width), torch.randn(BATCH_TOKENS, width)
    total.add(x)
    start = time.perf_counter()
    total.add(x)
    return {"seconds": 1000 * (time.perf_counter() - start) / BATCH_TOKENS}


# Measuring


@contextmanager
def worker(command: list[str], threads: int) -> Iterator[Ask]:
    """A process that answers JSON lines; ends with the block."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=environment) as process:
        assert process.stdin is not None and process.stdout is not None, "both are pipes"
        stdin, stdout = process.stdin, process.stdout

        def ask(request: Json) -> Json:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            answer: Json = json.loads(stdout.readline() or '{"error": "it ended without an answer"}')
            if "error" in answer:
                raise SystemExit(f"{' '.join(command)}: {answer['error']}")
            return answer

        yield ask
        stdin.close()


def commands(gptqmodel: Path) -> dict[str, list[str]]:
    """Each method's worker command; GPTQModel only if its environment exists."""
    ours = [sys.executable, str(FOLDER / "quant_speed.py"), "--worker"]
    theirs = {THEIRS: [str(gptqmodel), str(FOLDER / "gptqmodel_worker.py")]} if gptqmodel.exists() else {}
    return {"ours": ours} | theirs | {"one sweep": ours}


def make_problem(folder: Path, width: int, outputs: int) -> Problem:
    """Write random weights and the inputs' two Hessians."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(width)
    weights = torch.randn(outputs, width) / width**0.5
    scale = torch.exp(SPREAD * torch.randn(width))
    strengths = 1 / torch.arange(1, SPIKES + 1)
    spikes = (strengths / strengths.sum()).sqrt()[:, None] * torch.randn(SPIKES, width)
    arrays = {"weights": weights}
    for name, tokens in (("hessian", TOKENS_PER_INPUT * width), ("held_out", HELD_OUT_TOKENS_PER_INPUT * width)):
        total = HessianSum(width)
        for start in range(0, tokens, BATCH_TOKENS):
            batch = min(BATCH_TOKENS, tokens - start)
            total.add(scale * (torch.randn(batch, width) + torch.randn(batch, SPIKES) @ spikes))
        arrays[name] = total.mean()
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array.numpy())
    return Problem(folder, width, outputs)


def measure(
    problem: Problem, asks: dict[str, Ask], fresh: dict[str, list[str]], options: argparse.Namespace
) -> Measured:
    """Measure one linear: first the rounds, then errors, then one fresh process per method."""
    seconds: dict[str, list[float]] = {method: [] for method in asks}
    for index in range(options.rounds):
        for method in list(asks)[:: -1 if index % 2 else 1]:
            seconds[method].append(asks[method](problem.request(method))["seconds"])
            progress(f"{problem.width} -> {problem.outputs}, {method}: {seconds[method][-1]:.2f} s")
    errors = held_out_errors(problem, list(asks))
    peaks = {}
    for method, command in fresh.items():
        with worker(command, options.threads) as ask:
            peaks[method] = ask(problem.request(method))["peak_rss_bytes"]
    return Measured(problem.width, problem.outputs, seconds, errors, peaks)


def held_out_errors(problem: Problem, methods: list[str]) -> dict[str, float]:
    """tr(E H E^T) / tr(W H W^T) on the second Hessian, of rounding to nearest and of each method's result."""
    weights, hessian = problem.load("weights"), problem.load("held_out")
    whole = output_loss(weights, hessian)
    rounded = dequantize(quantize_rtn(weights.numpy(), GRID))
    errors = {"RTN": output_loss(torch.from_numpy(rounded).sub_(weights), hessian) / whole}
    for method in methods:
        result = np.load(problem.folder / f"{method}.npz")
        quantized = Quantized(result["codes"], result["scales"].astype(np.float32), GRID, result.get("zeros"))
        errors[method] = output_loss(torch.from_numpy(dequantize(quantized)).sub_(weights), hessian) / whole
    return errors


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(options: argparse.Namespace) -> tuple[dict[str, Measured], dict[int, float]]:
    """Every chosen linear, and seconds per 1000 tokens of Hessians by width."""
    shapes = QUICK_SHAPES if options.quick else {name: SHAPES[name] for name in options.shapes}
    starts = commands(options.gptqmodel)
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        ours = stack.enter_context(worker(starts["ours"], options.threads))
        asks = dict.fromkeys(starts, ours)
        if THEIRS in starts:
            asks[THEIRS] = stack.enter_context(worker(starts[THEIRS], options.threads))
        first = make_problem(Path(temporary) / "first", 256, 256)
        for method, ask in asks.items():
            ask(first.request(method))  # not timed: imports, compiled loops
        widths = QUICK_HESSIAN_WIDTHS if options.quick else HESSIAN_WIDTHS
        sums = {width: median(ours({"width": width})["seconds"] for _ in range(options.rounds)) for width in widths}
        found = {}
        for name, (width, outputs) in shapes.items():
            problem = make_problem(Path(temporary) / "linear", width, outputs)
            found[name] = measure(problem, asks, starts, options)
    return found, sums


# Reporting


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]]


def added(linears: list[Measured]) -> Measured:
    """The seconds of several linears, round by round."""
    seconds = {
        method: [sum(each) for each in zip(*(linear.seconds[method] for linear in linears), strict=True)]
        for method in linears[0].seconds
    }
    return replace(linears[0], seconds=seconds)


def speed_table(found: dict[str, Measured]) -> list[str]:
    methods = list(next(iter(found.values())).seconds)
    ratios = list(SWEEPS) if THEIRS in methods else []
    head = ["linear (in → out)", *(f"{name}, s" for name in methods), *(f"{THEIRS} / {name}" for name in ratios)]
    labelled = {f"{name} {linear.width} → {linear.outputs}": linear for name, linear in found.items()}
    if set(SHAPES) <= set(found):
        labelled["one expert of one layer"] = added(list(found.values()))
    rows = []
    for name, linear in labelled.items():
        times = [f"{median(linear.seconds[method]):.2f}" for method in methods]
        pairs = [", ".join(f"{ratio:.1f}" for ratio in linear.speedup(method)) for method in ratios]
        rows.append([name, *times, *pairs])
    return table(head, rows)


def error_table(found: dict[str, Measured]) -> list[str]:
    methods = list(next(iter(found.values())).errors)
    ratios = list(SWEEPS) if THEIRS in methods else []
    head = ["error on new tokens", *methods, *(f"{name} / {THEIRS}" for name in ratios)]
    rows = []
    for name, linear in found.items():
        errors = [f"{linear.errors[method]:.3e}" for method in methods]
        rows.append([name, *errors, *(f"{linear.errors[method] / linear.errors[THEIRS]:.3f}" for method in ratios)])
    return table(head, rows)


def memory_table(found: dict[str, Measured]) -> list[str]:
    methods = list(next(iter(found.values())).peak_bytes)
    rows = []
    for name, linear in found.items():
        cells = []
        for method in methods:
            peak, target = linear.peak_bytes[method], PEAK_TARGETS_BYTES.get(method)
            cells.append(f"{peak / 1e9:.2f}" + (f", {peak / target:.2f} of {target / 1e9:.1f}" if target else ""))
        rows.append([name, *cells])
    return table(["peak memory of one process, GB", *methods], rows)


def whole_decoder_hours(found: dict[str, Measured], method: str) -> float:
    """Two experts in every layer; of the last layer's vision expert only qkv is used."""
    each = {name: median(linear.seconds[method]) for name, linear in found.items()}
    return (2 * LAYERS * sum(each.values()) - sum(each.values()) + each["qkv"]) / 3600


def report(options: argparse.Namespace, found: dict[str, Measured], sums: dict[int, float], machine: str) -> str:
    lines = ["# Speed and memory of quantizing one linear", "", machine, ""]
    lines += [f"W4g128, synthetic data, rounds: {options.rounds}, seconds are medians. How: see the script.", ""]
    if not options.gptqmodel.exists():
        lines += [f"{THEIRS} is not installed (`make gptqmodel` installs it).", ""]
    lines += [*speed_table(found), "", *error_table(found), "", *memory_table(found), ""]
    lines += table(["Hessian, width", "s per 1000 tokens"], [[str(width), f"{sums[width]:.3f}"] for width in sums])
    if set(SHAPES) <= set(found):
        methods = next(iter(found.values())).seconds
        hours = ", ".join(f"{method} {whole_decoder_hours(found, method):.2f} h" for method in methods)
        lines += ["", f"Extrapolated from these medians, not run: the {LAYERS} layers and two experts of CogVLM-17B's"]
        lines += [f"decoder (of the last vision expert only qkv), without calibration: {hours}."]
    return "\n".join(lines) + "\n"


def machine_line(threads: int) -> str:
    """Processor, cores, threads, versions, and how busy the machine is."""
    cpu = cpu_model(Path("/proc/cpuinfo"))
    return (
        f"`python benchmarks/quant_speed.py`, {cpu}, {os.cpu_count()} cores, {threads} threads each, "
        f"torch {torch.__version__}, {datetime.date.today()}. Load average at the start {os.getloadavg()[0]:.2f}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one small linear, to see that the script runs")
    parser.add_argument("--gptqmodel", type=Path, default=GPTQMODEL_PYTHON, help="python of GPTQModel's environment")
    parser.add_argument("--out", type=Path, help="folder to write quant_speed.md to")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        run_worker()
        return
    torch.set_num_threads(options.threads)
    machine = machine_line(options.threads)
    text = report(options, *run(options), machine)
    print(text, end="")
    if options.out is not None:
        (options.out / "quant_speed.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

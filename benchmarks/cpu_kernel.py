"""Our operators on a CPU beside ONNX Runtime's, on the same codes: prompts, pictures, decoded tokens, loading.

Exports a random CogVLM (hidden 2048, 12 layers, both experts; encoder 1024, 6 layers, 224 px) twice, with a KV cache of
float32 and of int8, and times three ways to run it in turns, in one process: our operators with either cache, and the
functions of the graphs, which ONNX Runtime runs where our library is missing. The share of the limit of a decoded token
is its bytes (weights and cache) per time, in parts of the bandwidth of plain reading between the rounds.

    python benchmarks/cpu_kernel.py [--rounds 5] [--threads 2] [--work FOLDER]
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
from decode_speed import read_bandwidth
from export_memory import write_random

from vlmdeploy.bench.machine import cpu_model
from vlmdeploy.export.exporter import export_bundle
from vlmdeploy.export.options import ExportOptions
from vlmdeploy.families import cogvlm
from vlmdeploy.kernels import cpu
from vlmdeploy.layout import Bools
from vlmdeploy.runtime.backends.lanes import Call, Lanes
from vlmdeploy.runtime.session import Session, open_bundle

CONTEXT, DEPTHS, PROMPT_ROWS, TOKENS = 4224, (0, 512, 4096), 512, 16
WIDTHS = {
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "max_position_embeddings": CONTEXT,
}
ENCODER = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "num_heads": 16, "image_size": 224}


def export_all(folder: Path) -> dict[str, Path]:
    """The bundles by the type of their cache."""
    released = cogvlm.RELEASED
    encoder = {**released["vision_config"], **ENCODER, "num_positions": (ENCODER["image_size"] // 14) ** 2 + 1}
    (folder / "checkpoint").mkdir()
    write_random(folder / "checkpoint", "cogvlm", {**released, **WIDTHS, "vision_config": encoder})
    for kind in ("fp32", "int8"):
        options = ExportOptions("ort-int4", context_tokens=CONTEXT, kv=kind)
        export_bundle(folder / "checkpoint", folder / kind, options)
    return {kind: folder / kind for kind in ("fp32", "int8")}


@contextmanager
def without_library() -> Iterator[None]:
    """Sessions made inside run the functions of the graphs."""
    found = cpu.library
    cpu.library = lambda: None
    try:
        yield
    finally:
        cpu.library = found


class Side:
    """One way to run a bundle."""

    def __init__(self, bundle: Path, threads: int) -> None:
        start = time.perf_counter()
        self.session: Session = open_bundle(bundle, threads=threads)
        self.session.backend.warm_up(list(self.session.manifest.graphs))
        self.load_s = time.perf_counter() - start
        self.backend, self.hidden = self.session.backend, self.session.manifest.embedding.hidden
        self.random = np.random.default_rng(0)

    def lanes(self, filled: int, new: int) -> Lanes:
        """A cache with `filled` slots taken, by zeros, and room for `new` others."""
        lanes = self.backend.new_lanes(1, filled + new)
        lanes.begin(0, np.arange(filled + new))
        lanes.lengths[0] = filled
        return lanes

    def read(self, vision_mask: Bools) -> float:
        """Seconds of a prompt of random rows of these experts."""
        rows = self.random.standard_normal((len(vision_mask), self.hidden), np.float32)
        lanes, start = self.lanes(0, len(rows)), time.perf_counter()
        for first in range(0, len(rows), self.backend.chunk_rows):
            part = slice(first, first + self.backend.chunk_rows)
            asked = np.zeros(0, np.int64)
            self.backend.run(Call.of_one(rows[part], vision_mask[part], asked), lanes)
        return time.perf_counter() - start

    def decode(self, depth: int) -> float:
        """Seconds per decoded token behind `depth` others."""
        lanes, row = self.lanes(depth, TOKENS + 1), self.random.standard_normal((1, self.hidden), np.float32)
        self.backend.decode(row, np.ones(1, np.bool_), lanes)
        start = time.perf_counter()
        for _ in range(TOKENS):
            self.backend.decode(row, np.ones(1, np.bool_), lanes)
        return (time.perf_counter() - start) / TOKENS

    def encode(self) -> float:
        """Seconds of encoder and connector for one picture."""
        side = self.session.manifest.image.size_px
        pixels = self.random.standard_normal((1, 3, side, side), np.float32)
        start = time.perf_counter()
        self.backend.encode_images(pixels)
        return time.perf_counter() - start

    def bytes_per_token(self, depth: int) -> int:
        manifest = self.session.manifest
        return manifest.memory_bytes["decode"] + depth * manifest.memory_bytes["kv_per_token"]


def phases(image_rows: int) -> dict[str, Callable[[Side], float]]:
    """What is measured, in seconds."""
    text, picture = np.zeros(PROMPT_ROWS, np.bool_), np.ones(image_rows, np.bool_)
    return {
        f"text, {PROMPT_ROWS} rows": lambda side: side.read(text),
        f"picture, {image_rows} rows": lambda side: side.read(picture),
        "encoder and connector": Side.encode,
        **{f"decoded token at {depth}": partial(Side.decode, depth=depth) for depth in DEPTHS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="folder for checkpoint and bundles  [default: a temporary one]")
    options = parser.parse_args()
    with TemporaryDirectory(dir=options.work) as temporary:
        bundles = export_all(Path(temporary))
        sides = {f"ours, KV {kind}": Side(bundle, options.threads) for kind, bundle in bundles.items()}
        with without_library():
            sides["ONNX Runtime, KV fp32"] = Side(bundles["fp32"], options.threads)
        report(sides, options.rounds, options.threads)


def report(sides: dict[str, Side], rounds: int, threads: int) -> None:
    """Medians and ranges over the rounds; ratios are to ONNX Runtime's, round by round."""
    *ours, other = sides
    tasks = phases(sides[other].session.manifest.tokens.rows_per_image - 1)
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    bandwidths: list[float] = []
    for index in range(rounds + 1):
        for task, measure in tasks.items():
            for name, side in sides.items():
                seconds = measure(side)
                if index:  # the first round warms up
                    found[task, name].append(seconds)
        bandwidths.append(read_bandwidth(threads))
    model = cpu_model(Path("/proc/cpuinfo"))
    print(f"{model}, {threads} threads, operators {cpu.variant()}; {rounds} rounds, medians [least-most]")
    print(f"plain reading {min(bandwidths) / 1e9:.0f}-{max(bandwidths) / 1e9:.0f} GB/s; load: ", end="")
    print(", ".join(f"{name} {side.load_s:.2f} s" for name, side in sides.items()))
    print(f"\n| ms | {' | '.join([*ours, *(f'{name}: times faster' for name in ours)])} | {other} |")
    print("|---" * (2 * len(ours) + 2) + "|")
    for task in tasks:
        times = [shown([1000 * seconds for seconds in found[task, name]], 1) for name in ours]
        ratios = [
            shown([b / a for a, b in zip(found[task, name], found[task, other], strict=True)], 2) for name in ours
        ]
        print(f"| {task} | {' | '.join([*times, *ratios])} | {shown([1000 * s for s in found[task, other]], 1)} |")
    print(f"\n| share of plain reading | {' | '.join(sides)} |\n{'|---' * (len(sides) + 1)}|")
    for depth in DEPTHS:
        shares = [
            median(
                side.bytes_per_token(depth) / seconds / bandwidth
                for seconds, bandwidth in zip(found[f"decoded token at {depth}", name], bandwidths[1:], strict=True)
            )
            for name, side in sides.items()
        ]
        print(f"| decoded token at {depth} | {' | '.join(f'{share:.2f}' for share in shares)} |")


def shown(values: list[float], digits: int) -> str:
    """Median [least-most]."""
    return f"{median(values):.{digits}f} [{min(values):.{digits}f}-{max(values):.{digits}f}]"


if __name__ == "__main__":
    main()

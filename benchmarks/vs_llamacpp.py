"""A CogVLM on a CPU, phase by phase: our operators, ONNX Runtime's on the same bundle, and llama.cpp, in turns.

Writes a random checkpoint, exports it with a KV cache of int8 and of float32, converts it for llama.cpp (Q4_0), and
times in each round every phase on every side: a prompt, the rows of a picture, encoder and connector, the first token
of a question about a new picture, decoded tokens. In a process of its own, each side is loaded and answers twice about
a picture; its time to load and its memory are printed, too. Ratios are made round by round. The share of the limit of a
decoded token is its bytes (weights and cache) per time, in parts of the bandwidth of plain reading before and after it.

llama.cpp is built from the folder that --llamacpp names, with g++ and cmake; without the option, the other sides run.

    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36 && tar xzf llama_cpp_python-0.3.36.tar.gz
    python benchmarks/vs_llamacpp.py --llamacpp llama_cpp_python-0.3.36/vendor/llama.cpp --work FOLDER

--work keeps what is built and written, and uses it again.
"""

import argparse
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Protocol

import numpy as np
import torch
from answer_memory import TOKENS, Answered, new_pixels, question
from decode_speed import PlainReading
from export_memory import config_of, write_random
from llamacpp_model import write_gguf
from numpy.typing import NDArray

from vlmdeploy.bench.machine import cpu_model
from vlmdeploy.export.exporter import export_bundle
from vlmdeploy.export.options import ExportOptions
from vlmdeploy.families.cogvlm import CLIP_MEAN, CLIP_STD
from vlmdeploy.kernels import cpu
from vlmdeploy.layout import Bools
from vlmdeploy.model.load import load_model
from vlmdeploy.records import Config
from vlmdeploy.runtime.backends.lanes import Call
from vlmdeploy.runtime.backends.ort import OrtLanes
from vlmdeploy.runtime.session import open_bundle

HERE = Path(__file__).parent
CONTEXT, DEPTHS, PROMPT_ROWS = 4224, (0, 512, 4096), 512
FILLER = 1 << 18  # random values, again and again
PAUSE_S = 0.1  # before each measurement: threads of the one before go to sleep
# Encoder 1024, 6 layers, 224 px.
SMALL_ENCODER = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "num_heads": 16}
SMALL = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 12, "num_attention_heads": 16}
Floats = NDArray[np.float32]
LIBRARIES = ("llama", "mtmd", "ggml", "ggml-base")


def config_named(name: str) -> Config:
    """The widths to measure: `small`, or `released`: CogVLM-17B's with 2 layers on both sides."""
    config = {**config_of("cogvlm", 2), "max_position_embeddings": CONTEXT}
    if name == "released":
        return config
    side = 224
    positions = (side // config["vision_config"]["patch_size"]) ** 2 + 1
    vision = {**config["vision_config"], **SMALL_ENCODER, "image_size": side, "num_positions": positions}
    return {**config, **SMALL, "vision_config": vision}


# ---- the sides ----


class Side(Protocol):
    """One way to run the model: seconds of each phase."""

    def read(self) -> float: ...
    def picture(self) -> float: ...
    def encoder(self) -> float: ...
    def first(self) -> float: ...
    def decode(self, depth: int) -> float: ...


class Ours:
    def __init__(self, bundle: Path, threads: int) -> None:
        self.session = open_bundle(bundle, threads=threads)
        self.manifest, self.backend = self.session.manifest, self.session.backend
        self.backend.warm_up(list(self.manifest.graphs))
        self.random = np.random.default_rng(0)

    def _rows(self, vision_mask: Bools) -> float:
        rows = self.random.standard_normal((len(vision_mask), self.manifest.embedding.hidden), np.float32)
        lanes, start = self._lanes(0, len(rows)), time.perf_counter()
        for first in range(0, len(rows), self.backend.chunk_rows):
            part = slice(first, first + self.backend.chunk_rows)
            self.backend.run(Call.of_one(rows[part], vision_mask[part], np.zeros(0, np.int64)), lanes)
        return time.perf_counter() - start

    def _lanes(self, filled: int, new: int) -> OrtLanes:
        """A cache with `filled` slots taken, by random values, and room for `new` others."""
        lanes = self.backend.new_lanes(1, filled + new)
        assert isinstance(lanes, OrtLanes)
        if filled:  # untouched pages of zeros would all be one page, in the processor's cache
            for array in lanes.arrays.values():
                whole = array.dtype == np.int8
                values = self.random.integers(-127, 128, FILLER) if whole else self.random.random(FILLER) / 100
                array[...] = np.resize(values.astype(array.dtype), array.shape)
        lanes.begin(0, np.arange(filled + new))
        lanes.lengths[0] = filled
        return lanes

    def read(self) -> float:
        return self._rows(np.zeros(PROMPT_ROWS, np.bool_))

    def picture(self) -> float:
        return self._rows(np.ones(self.manifest.tokens.rows_per_image, np.bool_))

    def encoder(self) -> float:
        pixels = new_pixels(self.session, self.random)
        start = time.perf_counter()
        self.backend.encode_images(pixels)
        return time.perf_counter() - start

    def first(self) -> float:
        pixels = new_pixels(self.session, self.random)
        start = time.perf_counter()
        self.session.generate_ids(question(self.session), pixels, 1)
        return time.perf_counter() - start

    def decode(self, depth: int) -> float:
        lanes, row = self._lanes(depth, TOKENS + 1), np.ones((1, self.manifest.embedding.hidden), np.float32)
        text = np.zeros(1, np.bool_)
        self.backend.decode(row, text, lanes)
        start = time.perf_counter()
        for _ in range(TOKENS):
            self.backend.decode(row, text, lanes)
        return (time.perf_counter() - start) / TOKENS


class Peer:
    """llama.cpp in a process of its own."""

    def __init__(self, command: Sequence[str], picture: Path) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.picture_file = picture
        self.load_s = self._numbers()[0]

    def _numbers(self) -> list[float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"llama.cpp ended with status {self.process.wait()}")
        return [float(word) for word in line.split()]

    def ask(self, *task: object) -> list[float]:
        assert self.process.stdin is not None
        print(*task, file=self.process.stdin, flush=True)
        return self._numbers()

    def read(self) -> float:
        return self.ask("read", PROMPT_ROWS)[0]

    def picture(self) -> float:
        return self.ask("picture", self.picture_file)[1]

    def encoder(self) -> float:
        return self.ask("picture", self.picture_file)[0]

    def first(self) -> float:
        return self.ask("first", self.picture_file, 0)[0]

    def decode(self, depth: int) -> float:
        return self.ask("decode", depth, TOKENS)[0]

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@contextmanager
def without_library() -> Iterator[None]:
    """Sessions made inside run the functions of the graphs."""
    found = cpu.library
    cpu.library = lambda: None
    try:
        yield
    finally:
        cpu.library = found


def fresh_ours(bundle: Path, threads: int, operators: bool) -> Answered:
    command = [sys.executable, str(HERE / "answer_memory.py"), str(bundle), "--threads", str(threads)]
    done = subprocess.run([*command, *([] if operators else ["--without-operators"])], check=True, stdout=-1, text=True)
    return Answered(*(float(word) for word in done.stdout.split()))


def fresh_peer(command: Sequence[str], picture: Path) -> Answered:
    peer = Peer(command, picture)
    for _ in range(2):
        peer.ask("first", picture, TOKENS)
    memory = [kib * 1024 / 1e6 for kib in peer.ask("memory")]
    peer.end()
    return Answered(peer.load_s, *memory)


# ---- what is made once ----


def made(path: Path, make: Callable[[Path], object]) -> Path:
    """The path, made first if it is not there."""
    if not path.exists():
        partial_path = path.with_name(f"making-{path.name}")
        print(f"making {path.name}", file=sys.stderr)
        make(partial_path)
        partial_path.rename(path)
    return path


def write_checkpoint(folder: Path, config: Config) -> None:
    folder.mkdir()
    write_random(folder, "cogvlm", config)


def build_peer(source: Path, folder: Path, threads: int) -> Path:
    """llama.cpp's quantizer and our worker; the folder of both."""
    build = made(folder / "build", partial(build_llamacpp, source, threads))
    worker = build / "bin" / "worker"
    includes = [f"-I{source / part}" for part in ("include", "ggml/include", "tools/mtmd")]
    libraries = [f"-L{build / 'bin'}", *(f"-l{name}" for name in LIBRARIES), f"-Wl,-rpath,{(build / 'bin').resolve()}"]
    program = str(HERE / "llamacpp_worker.cpp")
    subprocess.run(["g++", "-O2", "-std=c++17", *includes, program, "-o", str(worker), *libraries], check=True)
    return build / "bin"


def build_llamacpp(source: Path, threads: int, build: Path) -> None:
    off = [f"-DLLAMA_{part}=OFF" for part in ("CURL", "BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_SERVER")]
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", *off]
    targets = ["--target", "llama-quantize", "mtmd"]
    for arguments in (
        ["-B", str(build), "-S", str(source), *options],
        ["--build", str(build), f"-j{threads}", *targets],
    ):
        subprocess.run(["cmake", *arguments], check=True, stdout=subprocess.DEVNULL)


def convert(checkpoint: Path, source: Path, programs: Path, folder: Path) -> None:
    """decoder.gguf in Q4_0 and encoder.gguf in f16."""
    folder.mkdir()
    full = folder / "decoder-f16.gguf"
    write_gguf(checkpoint, source / "models" / "ggml-vocab-llama-spm.gguf", full, folder / "encoder.gguf")
    quantize = [str(programs / "llama-quantize"), str(full), str(folder / "decoder.gguf"), "Q4_0"]
    subprocess.run(quantize, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    full.unlink()


def write_picture(path: Path, side: int) -> None:
    path.write_bytes(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8).tobytes())


# ---- how near each side is to PyTorch ----


def cosine(a: Floats, b: Floats) -> float:
    return float(np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))


@torch.no_grad()
def agreement(checkpoint: Path, ours: Ours, peer: Peer, work: Path) -> None:
    """Cosine of a picture's rows and of the logits behind a text to those of PyTorch in float32."""
    model, count, side = load_model(checkpoint), 64, ours.manifest.image.size_px
    values = np.frombuffer(peer.picture_file.read_bytes(), np.uint8).reshape(side, side, 3)
    pixels = ((values / 255 - CLIP_MEAN) / CLIP_STD).astype(np.float32).transpose(2, 0, 1)[None].copy()
    rows = model.encode_images(torch.from_numpy(pixels))[0].numpy()
    ids = torch.arange(3, 3 + count)[None]
    logits = model(ids)[0, -1].numpy()
    peer.ask("features", peer.picture_file, work / "features.bin")
    peer.ask("logits", count, work / "logits.bin")
    features = np.fromfile(work / "features.bin", np.float32).reshape(-1, rows.shape[1])
    at_once, one_by_one = np.fromfile(work / "logits.bin", np.float32).reshape(2, -1)
    own_rows = ours.backend.encode_images(pixels)[0]
    embedded, lanes = ours.session.embedding[ids[0].numpy()], ours._lanes(0, count)
    own = ours.backend.run(Call.of_one(embedded, np.zeros(count, np.bool_), np.array([count - 1])), lanes)[0]
    print("\nCosine to PyTorch in float32, on random weights")
    print(f"picture's rows: ours {cosine(own_rows, rows):.4f}, llama.cpp {cosine(features[: len(rows)], rows):.4f}")
    print(f"logits behind {count} tokens: ours {cosine(own, logits):.4f}, ", end="")
    print(f"llama.cpp {cosine(at_once, logits):.4f}, one token at a time {cosine(one_by_one, logits):.4f}")


# ---- rounds ----


def phases() -> dict[str, Callable[[Side], float]]:
    """What is measured, in seconds."""
    return {
        f"text, {PROMPT_ROWS} rows": lambda side: side.read(),
        "picture's rows": lambda side: side.picture(),
        "encoder and connector": lambda side: side.encoder(),
        "first token": lambda side: side.first(),
        **{f"decoded token at {depth}": partial(_decode, depth=depth) for depth in DEPTHS},
    }


def _decode(side: Side, depth: int) -> float:
    return side.decode(depth)


def compare(sides: dict[str, Side], fresh: dict[str, Callable[[], Answered]], rounds: int, threads: int) -> None:
    """Medians and ranges over the rounds; ratios are to the last side's, round by round."""
    tasks = phases()
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    reading, bandwidths = PlainReading(threads), defaultdict[tuple[str, str], list[float]](list)
    started: dict[str, list[Answered]] = defaultdict(list)
    for index in range(rounds + 1):
        for task, measure in tasks.items():
            for name, side in sides.items():
                time.sleep(PAUSE_S)
                before, seconds, after = reading.bandwidth(2), measure(side), reading.bandwidth(2)
                if index:  # the first round warms up
                    found[task, name].append(seconds)
                    bandwidths[task, name].append((before + after) / 2)
        for name, run in fresh.items():
            started[name].append(run())
    *ours, other = sides
    print(f"{cpu_model(Path('/proc/cpuinfo'))}, {threads} threads, operators {cpu.variant()}; ", end="")
    print(f"{rounds} rounds, medians [least-most]; ", end="")
    every = [one / 1e9 for several in bandwidths.values() for one in several]
    print(f"plain reading {min(every):.0f}-{max(every):.0f} GB/s\n")
    head(f"times faster than {other}", ours)
    for task in tasks:
        ratios = [zip(found[task, other], found[task, name], strict=True) for name in ours]
        line(task, [shown([b / a for b, a in pairs], 2) for pairs in ratios])
    head("ms", list(sides))
    for task in tasks:
        line(task, [shown([1000 * seconds for seconds in found[task, name]], 1) for name in sides])
    runtimes = {name: side for name, side in sides.items() if isinstance(side, Ours)}
    head("share of plain reading", list(runtimes))
    for depth in DEPTHS:
        task = f"decoded token at {depth}"
        line(task, [shares(side, depth, found[task, name], bandwidths[task, name]) for name, side in runtimes.items()])
    head("in a process of its own", list(started))
    values: dict[str, Callable[[Answered], float]] = {
        "open and load, s": lambda one: one.load_s,
        "anonymous memory, MB": lambda one: one.anonymous,
        "mapped memory, MB": lambda one: one.mapped,
        "peak, MB": lambda one: one.peak,
    }
    for name, value in values.items():
        digits = 2 if name.endswith("s") else 0
        line(name, [shown([value(one) for one in runs[1:]], digits) for runs in started.values()])


def shares(side: Ours, depth: int, seconds: Sequence[float], bandwidths: Sequence[float]) -> str:
    memory = side.manifest.memory_bytes
    size = memory["decode"] + depth * memory["kv_per_token"]
    return shown([size / one / bandwidth for one, bandwidth in zip(seconds, bandwidths, strict=True)], 2)


def head(title: str, columns: Sequence[str]) -> None:
    print(f"\n| {title} | {' | '.join(columns)} |\n{'|---' * (len(columns) + 1)}|")


def line(title: str, cells: Sequence[str]) -> None:
    print(f"| {title} | {' | '.join(cells)} |")


def shown(values: Sequence[float], digits: int) -> str:
    """Median [least-most]."""
    return f"{median(values):.{digits}f} [{min(values):.{digits}f}-{max(values):.{digits}f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llamacpp", type=Path, help="folder of llama.cpp's source")
    parser.add_argument("--widths", choices=("small", "released"), default="small")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="folder for what is made  [default: a temporary one]")
    options = parser.parse_args()
    with TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(exist_ok=True)
        measure(work, options.llamacpp, options.widths, options.rounds, options.threads)


def measure(work: Path, source: Path | None, widths: str, rounds: int, threads: int) -> None:
    checkpoint = made(work / f"{widths}-checkpoint", partial(write_checkpoint, config=config_named(widths)))
    bundles = {
        kv: made(
            work / f"{widths}-{kv}",
            partial(export_bundle, checkpoint, options=ExportOptions("ort-int4", context_tokens=CONTEXT, kv=kv)),
        )
        for kv in ("int8", "fp32")
    }
    sides: dict[str, Side] = {f"ours, KV {kv}": Ours(bundle, threads) for kv, bundle in bundles.items()}
    fresh: dict[str, Callable[[], Answered]] = {
        f"ours, KV {kv}": partial(fresh_ours, bundle, threads, True) for kv, bundle in bundles.items()
    }
    with without_library():
        sides["ONNX Runtime, KV fp32"] = Ours(bundles["fp32"], threads)
    fresh["ONNX Runtime, KV fp32"] = partial(fresh_ours, bundles["fp32"], threads, False)
    if source is None:
        compare(sides, fresh, rounds, threads)
        return
    programs = build_peer(source, work, os.cpu_count() or 1)
    model = made(work / f"{widths}-gguf", partial(convert, checkpoint, source, programs))
    side = config_named(widths)["vision_config"]["image_size"]
    picture = made(work / f"picture-{side}", partial(write_picture, side=side))
    files = [str(programs / "worker"), str(model / "decoder.gguf"), str(model / "encoder.gguf")]
    for flash in (True, False):
        command = [*files, str(threads), str(CONTEXT), str(int(flash))]
        name = f"llama.cpp{', flash attention' if flash else ''}"
        sides[name], fresh[name] = Peer(command, picture), partial(fresh_peer, command, picture)
    compare(sides, fresh, rounds, threads)
    ours, peer = sides["ours, KV fp32"], sides["llama.cpp"]
    assert isinstance(ours, Ours) and isinstance(peer, Peer)
    agreement(checkpoint, ours, peer, work)


if __name__ == "__main__":
    main()

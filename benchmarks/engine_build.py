"""Peak memory, time and size of engines at CogVLM-17B's and CogVLM2-19B's layer widths, built by TensorRT-RTX on a CPU.

Writes a synthetic checkpoint with the real shapes but few layers, exports it to rtx-int4 (gate and engines included),
then builds each engine again alone, and the text decoder with one engine per layer. Prints the peak resident memory of
each builder beside the export's estimate (export/engines/parts.py).

    python benchmarks/engine_build.py [--family cogvlm|cogvlm2] [--layers 2] [--vision int4|fp16] [--work FOLDER]
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from export_memory import FAMILIES, timed, write_checkpoint

from vlmdeploy.bundle import read_manifest
from vlmdeploy.export.engines.compiler import EngineRequest, ProfileShapes, compile_engine
from vlmdeploy.export.engines.parts import EnginePart, plan_parts
from vlmdeploy.progress import no_progress

CONTEXTS = {"cogvlm": 2048, "cogvlm2": 4096}


@dataclass(frozen=True)
class Built:
    """One engine, built alone: seconds, peak resident bytes of its builder, bytes of the plan."""

    part: EnginePart
    seconds: float
    peak_bytes: int
    plan_bytes: int


def build_alone(bundle: Path, part: EnginePart, num_layers: int, chunk_rows: int) -> Built:
    """Build one engine in a process whose only child is the builder."""
    code = "import engine_build, sys; engine_build.build_here(sys.argv[1])"
    where = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    request = json.dumps([str(bundle), vars(part), num_layers, chunk_rows])
    done = subprocess.run(
        [sys.executable, "-c", code, request], env=os.environ | where, check=True, stdout=subprocess.PIPE
    )
    seconds, peak, size = json.loads(done.stdout)
    return Built(part, seconds, peak, size)


def build_here(text: str) -> None:
    """The process of `build_alone`; prints seconds, peak bytes and plan bytes as JSON."""
    folder, fields, num_layers, chunk_rows = json.loads(text)
    part = EnginePart(**fields | {"layers": tuple(fields["layers"])})
    with tempfile.TemporaryDirectory() as temporary:
        plan, log = Path(temporary) / "x.engine", Path(temporary) / "log"
        graph = Path(folder) / f"{part.graph}.onnx"
        request = EngineRequest("tensorrt_rtx", graph, part, num_layers, ProfileShapes(chunk_rows), (), plan, log)
        start = time.perf_counter()
        compile_engine(request, no_progress)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        print(json.dumps([seconds, peak, plan.stat().st_size]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=sorted(FAMILIES), default="cogvlm")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vision", choices=["int4", "fp16"], default="int4")
    parser.add_argument("--context", type=int, help="tokens of the KV cache  [default: 2048, CogVLM2: 4096]")
    parser.add_argument("--chunk-rows", type=int, default=512)
    parser.add_argument("--work", type=Path, help="folder for checkpoint and bundle  [default: a temporary one]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as temporary:
        checkpoint, bundle = Path(temporary) / "checkpoint", Path(temporary) / "bundle"
        checkpoint.mkdir()
        write_checkpoint(checkpoint, options.family, options.layers)
        context = options.context or CONTEXTS[options.family]
        chosen = ["--vision", options.vision, "--connector", options.vision, "--context", str(context)]
        command = [sys.executable, "-m", "vlmdeploy", "export", "--ckpt", str(checkpoint), "--target", "rtx-int4"]
        _, seconds, peak = timed([*command, "--out", str(bundle), "--quant", "rtn", *chosen])
        manifest = read_manifest(bundle)
        size = sum(entry.bytes for entry in manifest.files.values())
        print(f"{options.family} widths, {options.layers} + {options.layers} layers, vision {options.vision}")
        print(f"export with gate and engines: {seconds:.0f} s, peak {peak / 1e9:.2f} GB, bundle {size / 1e9:.2f} GB")
        print("| engine | layers | weights | plan / weights | seconds | peak | peak / expected |")
        print("|---|---|---|---|---|---|---|")
        whole = plan_parts(bundle, manifest.graphs, options.layers, 1 << 40)
        text = next(part for part in whole if part.graph == "decoder_text")
        cut = plan_parts(
            bundle, {"decoder_text": manifest.graphs["decoder_text"]}, options.layers, text.build_bytes - 1
        )
        for part in [*whole, *cut]:
            print_row(build_alone(bundle, part, options.layers, options.chunk_rows))


def print_row(built: Built) -> None:
    """One engine of the table."""
    part = built.part
    layers = f"{part.layers[0]}..{part.layers[1] - 1}" if part.layers[1] else ""
    print(
        f"| {part.name} | {layers} | {part.weight_bytes / 1e6:.0f} MB | {built.plan_bytes / part.weight_bytes:.2f} | "
        f"{built.seconds:.1f} | {built.peak_bytes / 1e9:.2f} GB | {built.peak_bytes / part.build_bytes:.2f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()

"""Speed of a bundle on this machine, and how much of the memory bandwidth a decoded token uses.

A decoded token reads every weight of `decoder_text` once, so bytes per token over time per token, divided by the
bandwidth of plain reading in the same run, shows what is left to gain. Times are those of `vlmdeploy bench`. Give a
bundle, or let the script export a synthetic one with CogVLM-17B's layer widths and few layers.

    python benchmarks/decode_speed.py [--bundle FOLDER] [--threads N] [--layers 2]
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from export_memory import write_checkpoint

from vlmdeploy.bench.measure import measure_in_process
from vlmdeploy.bench.measurement import MeasureOptions
from vlmdeploy.bundle import read_manifest
from vlmdeploy.export.exporter import export_bundle
from vlmdeploy.export.options import ExportOptions

READ_BYTES = 1 << 29


class PlainReading:
    """Reads half a gigabyte of float32 again and again."""

    def __init__(self, threads: int | None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._values = torch.ones(READ_BYTES // 4)

    def bandwidth(self, passes: int = 5) -> float:
        """Bytes per second of summing, the best of several passes."""
        seconds = []
        for _ in range(passes):
            start = time.perf_counter()
            self._values.sum()
            seconds.append(time.perf_counter() - start)
        return READ_BYTES / min(seconds)


def report(bundle: Path, threads: int | None) -> None:
    found = measure_in_process(bundle, MeasureOptions(new_tokens=32, repeats=3, threads=threads))
    bandwidth, decode = PlainReading(threads).bandwidth(), found.decode_per_token.p50
    assert found.vision is not None, "the default question has a picture"
    bytes_per_token = read_manifest(bundle).memory_bytes["decode"]
    used = bytes_per_token / (decode / 1000)
    print(f"{found.bundle.family} {found.bundle.target}, {found.prompt_tokens} prompt tokens")
    print(f"vision {found.vision.p50:.1f} ms, prefill {found.prefill.p50:.1f} ms")
    print(f"decode {decode:.2f} ms per token over {bytes_per_token / 1e6:.1f} MB of weights")
    print(f"that is {used / 1e9:.1f} GB/s, {used / bandwidth:.2f} of the {bandwidth / 1e9:.1f} GB/s of plain reading")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args()
    if options.bundle is not None:
        report(options.bundle, options.threads)
        return
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint, bundle = Path(temporary) / "checkpoint", Path(temporary) / "bundle"
        checkpoint.mkdir()
        write_checkpoint(checkpoint, "cogvlm", options.layers)
        export_bundle(checkpoint, bundle, ExportOptions("ort-int4"))
        report(bundle, options.threads)


if __name__ == "__main__":
    main()

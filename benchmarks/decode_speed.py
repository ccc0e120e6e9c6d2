"""Speed of a bundle on this machine, and how much of the memory bandwidth a decoded token uses.

A decoded token reads every weight of `decoder_text` once, so bytes per token over time per token, divided by the
bandwidth that plain reading reaches in the same run, says what is left to gain. Give a bundle, or let the script export
a synthetic one with CogVLM-17B's layer widths and few layers.

    python benchmarks/decode_speed.py [--bundle FOLDER] [--threads N] [--layers 2]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from export_memory import write_checkpoint

import vlmdeploy
from vlmdeploy.export.exporter import export_bundle
from vlmdeploy.export.options import ExportOptions
from vlmdeploy.layout import Ints
from vlmdeploy.runtime.backend import Floats
from vlmdeploy.runtime.session import Session

READ_BYTES = 1 << 30
NEW_TOKENS = 32
REPEATS = 3


def read_bandwidth(threads: int | None) -> float:
    """Bytes per second of summing a gigabyte of float32, the best of several passes."""
    if threads is not None:
        torch.set_num_threads(threads)
    values = torch.ones(READ_BYTES // 4)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        values.sum()
        seconds.append(time.perf_counter() - start)
    return READ_BYTES / min(seconds)


def measure(session: Session) -> dict[str, float]:
    """Medians over a few prompts with new pictures: milliseconds of vision, prefill and one decoded token.

    The session keeps the rows of a picture that it has seen, so asking again costs the prefill alone.
    """
    manifest, random = session.manifest, np.random.default_rng(0)
    rows, side = manifest.tokens.rows_per_image, manifest.image.size_px
    text = random.integers(3, manifest.embedding.vocab_size, 24)
    ids = np.concatenate(([manifest.tokens.bos_id], np.full(rows, manifest.tokens.placeholder_id), text))
    found: dict[str, list[float]] = {"vision": [], "prefill": [], "decode": []}
    for _ in range(REPEATS):
        pixels = random.standard_normal((1, 3, side, side), dtype=np.float32)
        first, again, longer = (timed(session, ids, pixels, count) for count in (1, 1, NEW_TOKENS + 1))
        found["vision"].append(first[0] - again[0])
        found["prefill"].append(again[0])
        found["decode"].append((longer[0] - again[0]) / (longer[1] - 1))
    return {name: statistics.median(values) for name, values in found.items()} | {"prompt": float(len(ids))}


def timed(session: Session, ids: Ints, pixels: Floats, count: int) -> tuple[float, int]:
    """Milliseconds of an answer, and how many tokens it has."""
    start = time.perf_counter()
    new_ids = session.generate_ids(ids, pixels, count)
    return 1000 * (time.perf_counter() - start), len(new_ids)


def report(bundle: Path, threads: int | None) -> None:
    session = vlmdeploy.open(bundle, threads=threads)
    measure(session)  # loads the graphs
    measured, bandwidth = measure(session), read_bandwidth(threads)
    bytes_per_token = session.manifest.memory_bytes["decode"]
    used = bytes_per_token / (measured["decode"] / 1000)
    print(f"{session.manifest.family} {session.manifest.target}, {measured['prompt']:.0f} prompt tokens")
    print(f"vision {measured['vision']:.0f} ms, prefill {measured['prefill']:.0f} ms")
    print(f"decode {measured['decode']:.2f} ms per token over {bytes_per_token / 1e6:.1f} MB of weights")
    print(
        f"that is {used / 1e9:.1f} GB/s, {used / bandwidth:.2f} of the {bandwidth / 1e9:.1f} GB/s that reading reaches"
    )


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

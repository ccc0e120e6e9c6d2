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
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from export_memory import write_checkpoint

import vlmdeploy
from vlmdeploy.export.exporter import export_bundle
from vlmdeploy.export.options import ExportOptions
from vlmdeploy.runtime.backends.lanes import slot_positions
from vlmdeploy.runtime.generate import Prompt, Read, make_prompt, prompt_rows, read_prompts
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
    """Medians over a few prompts with a picture: milliseconds of vision, prefill and one decoded token.

    The backend is called as the generate loop calls it, with given ids, so that no answer ends early.
    """
    manifest, random = session.manifest, np.random.default_rng(0)
    rows, side, vocab_size = manifest.tokens.rows_per_image, manifest.image.size_px, manifest.embedding.vocab_size
    text = random.integers(0, vocab_size, 24)
    ids = np.concatenate(([manifest.tokens.bos_id], np.full(rows, manifest.tokens.placeholder_id), text))
    pixels = random.standard_normal((1, 3, side, side), dtype=np.float32)
    prompt = make_prompt(ids, pixels, manifest.tokens, vocab_size, side)
    found = [time_prompt(session, prompt) for _ in range(REPEATS)]
    return {name: statistics.median(each[name] for each in found) for name in found[0]} | {"prompt": float(len(ids))}


def time_prompt(session: Session, prompt: Prompt) -> dict[str, float]:
    """Milliseconds of each phase; of decoding, per token."""
    backend, embedding = session.backend, session.embedding
    positions = slot_positions(prompt.positions, len(prompt.ids) + NEW_TOKENS)
    lanes = backend.new_lanes(1, len(positions))
    lanes.begin(0, positions)
    times = [time.perf_counter()]
    rows = prompt_rows(prompt, backend.encode_images, embedding)
    times.append(time.perf_counter())
    read_prompts({0: Read(prompt, rows, np.array([len(prompt.ids) - 1]))}, lanes, backend)
    times.append(time.perf_counter())
    for token in prompt.ids[-NEW_TOKENS:]:
        backend.decode(embedding[np.array([token])], np.ones(1, np.bool_), lanes)
    times.append(time.perf_counter())
    vision, filled, decoded = (1000 * (stop - start) for start, stop in pairwise(times))
    return {"vision": vision, "prefill": filled, "decode": decoded / NEW_TOKENS}


def report(bundle: Path, threads: int | None) -> None:
    session = vlmdeploy.open(bundle, threads=threads)
    measure(session)  # loads the graphs
    measured, bandwidth = measure(session), read_bandwidth(threads)
    bytes_per_token = session.manifest.memory_bytes["decode"]
    used = bytes_per_token / (measured["decode"] / 1000)
    print(f"{session.manifest.family} {session.manifest.target}, {measured['prompt']:.0f} prompt tokens")
    print(f"vision {measured['vision']:.1f} ms, prefill {measured['prefill']:.1f} ms")
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

"""Checks a bundle's engines on a GPU: do they load, do they compute what the graphs compute, how much memory does each
phase take, what do the first and a later start cost, how close is decoding to the memory bandwidth?

For each bundle (portable `rtx-int4` plans can be built on any machine):

    python benchmarks/gpu_check.py BUNDLE... [--tokens 64] [--bandwidth 4.8e12]

Prints one JSON document. The reference is ONNX Runtime on the same machine's CPU. Removes cached kernels of earlier
runs first. Without a GPU it stops with one line. Never run on a GPU yet.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlmdeploy.errors import VlmdeployError
from vlmdeploy.runtime.backends.ort import OrtBackend
from vlmdeploy.runtime.backends.trt import TrtBackend
from vlmdeploy.runtime.generate import Prompt, Read, read_prompts
from vlmdeploy.runtime.integrity import BundleFiles, check_bundle
from vlmdeploy.runtime.replay import read_record, sample_prompt
from vlmdeploy.runtime.session import Session
from vlmdeploy.runtime.user_folders import cache_folder

Open = Callable[[BundleFiles, str], TrtBackend]  # files, residency


def open_engines(files: BundleFiles, residency: str) -> TrtBackend:
    """The bundle's engines on this machine's GPU."""
    return TrtBackend(files, residency)


def check(folder: Path, num_tokens: int, bandwidth: float | None, open_backend: Open = open_engines) -> dict[str, Any]:
    """All answers about one bundle."""
    files = check_bundle(folder, "full")
    manifest, record = files.manifest, read_record(files)
    prompt = sample_prompt(manifest, record.ids, record.picture)
    if (cache := cache_folder()) is not None:
        shutil.rmtree(cache / "rtx", ignore_errors=True)  # so that the first start is one
    starts = [start_of(files, prompt, open_backend) for _ in range(2)]
    session = Session(files, open_backend(files, "all"))
    reference = Session(files, OrtBackend(files))
    with session, reference:
        answers = compare(session, reference, prompt, num_tokens)
        speed = decode_speed(session, prompt, num_tokens, bandwidth)
    memory = memory_by_phase(files, prompt, open_backend)
    return {
        "bundle": folder.name, "engines": {name: asdict(info) for name, info in manifest.engines.items()},
        "first_start": starts[0], "second_start": starts[1], "answers": answers, "speed": speed, "memory_bytes": memory,
    }  # fmt: skip


def start_of(files: BundleFiles, prompt: Prompt, open_backend: Open) -> dict[str, float]:
    """Milliseconds of opening, of one token and of three; the first start compiles kernels on the way."""
    start = time.perf_counter()
    with Session(files, open_backend(files, "all")) as session:
        opened = time.perf_counter()
        session.generate_ids(prompt.ids, prompt.pixels, 1)
        first = time.perf_counter()
        session.generate_ids(prompt.ids, prompt.pixels, 3)
        third = time.perf_counter()
    return {"open_ms": 1e3 * (opened - start), "first_ms": 1e3 * (first - opened), "third_ms": 1e3 * (third - first)}


def compare(session: Session, reference: Session, prompt: Prompt, num_tokens: int) -> dict[str, Any]:
    """Logits and greedy tokens of a prompt with a picture, of its second turn, and of text alone."""
    text = prompt.ids[prompt.types == 0]
    turn = np.concatenate((prompt.ids, reference.generate_ids(prompt.ids, prompt.pixels, 4), text[1:]))
    cases = {"picture": (prompt.ids, prompt.pixels), "second_turn": (turn, prompt.pixels), "text": (text, None)}
    found = {}
    for name, (ids, pixels) in cases.items():
        ours, wanted = session.logits(ids, pixels), reference.logits(ids, pixels)
        rows = ~np.isnan(wanted).all(1)
        error = np.sqrt(np.square(ours[rows] - wanted[rows]).mean() / np.square(wanted[rows]).mean())
        tokens = [answerer.generate_ids(ids, pixels, num_tokens).tolist() for answerer in (session, reference)]
        equal = next((i for i, (a, b) in enumerate(zip(*tokens, strict=False)) if a != b), min(map(len, tokens)))
        agreement = float((ours[rows].argmax(1) == wanted[rows].argmax(1)).mean())
        found[name] = {
            "logits_error": float(error), "top1_agreement": agreement, "equal_tokens": equal, "tokens": len(tokens[1]),
        }  # fmt: skip
    return found


def decode_speed(session: Session, prompt: Prompt, num_tokens: int, bandwidth: float | None) -> dict[str, float]:
    """Median milliseconds of a token, and its weights' bytes per second as a fraction of the memory's."""
    positions = np.arange(len(prompt.ids) + num_tokens)
    lanes = session.backend.new_lanes(1, len(positions))
    lanes.begin(0, positions)
    text, last = session.embedding[prompt.ids], np.array([len(prompt.ids) - 1])
    words = replace(prompt, vision_mask=np.zeros(len(text), np.bool_))
    read_prompts({0: Read(words, text, last)}, lanes, session.backend)
    times = []
    for _ in range(num_tokens):
        start = time.perf_counter()
        session.backend.decode(text[:1], np.ones(1, np.bool_), lanes)
        times.append(time.perf_counter() - start)
    seconds = float(np.median(times[min(4, num_tokens - 1) :]))
    size = session.manifest.memory_bytes["decode"]
    result = {"token_ms": 1e3 * seconds, "weight_bytes_per_s": size / seconds}
    return result | ({"of_bandwidth": size / seconds / bandwidth} if bandwidth else {})


def memory_by_phase(files: BundleFiles, prompt: Prompt, open_backend: Open) -> dict[str, int]:
    """Drop of the free memory in bytes after each phase, with residency "phase"."""
    backend = open_backend(files, "phase")
    free = backend.device.free_bytes()
    taken: dict[str, int] = {}
    with Session(files, backend) as session:
        assert prompt.pixels is not None, "the recorded prompt has a picture"
        backend.encode_images(prompt.pixels)
        taken["vision"] = free - backend.device.free_bytes()
        session.logits(prompt.ids, prompt.pixels, last=1)
        taken["after_prefill"] = free - backend.device.free_bytes()
        session.generate_ids(prompt.ids, prompt.pixels, 4)
        taken["decode"] = free - backend.device.free_bytes()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--bandwidth", type=float, help="of the GPU's memory, bytes per second; see vlmdeploy.devices")
    options = parser.parse_args()
    try:
        answers = [check(folder, options.tokens, options.bandwidth) for folder in options.bundles]
    except VlmdeployError as error:
        raise SystemExit(str(error)) from error
    print(json.dumps(answers, indent=1))


if __name__ == "__main__":
    main()

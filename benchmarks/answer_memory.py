"""Opens a bundle, loads its graphs and answers twice about a picture, 16 tokens each, in a process without torch.

Prints the seconds of opening and loading, and resident megabytes: anonymous and mapped ones at the end, and the most of
both from opening on.

    python benchmarks/answer_memory.py BUNDLE [--threads 2] [--without-operators]
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlmdeploy.kernels import cpu
from vlmdeploy.layout import Ints, prompt_of
from vlmdeploy.runtime.session import Session, open_bundle

QUESTION, TOKENS = 17, 16


@dataclass(frozen=True)
class Answered:
    """Seconds and megabytes, in the order in which they are printed."""

    load_s: float
    anonymous: float
    mapped: float
    peak: float


def question(session: Session) -> Ints:
    """Ids of a prompt of one picture and some text."""
    vocab_size = session.manifest.embedding.vocab_size
    text = np.random.default_rng(0).integers(vocab_size // 2, vocab_size, QUESTION)
    return prompt_of(text, session.manifest.tokens, num_images=1)


def new_pixels(session: Session, random: np.random.Generator) -> NDArray[np.float32]:
    side = session.manifest.image.size_px
    return random.standard_normal((1, 3, side, side), np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--without-operators", action="store_true", help="run ONNX Runtime's operators instead of ours")
    options = parser.parse_args()
    if options.without_operators:
        cpu.library = lambda: None
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here, behind the imports
    start = time.perf_counter()
    session = open_bundle(options.bundle, threads=options.threads)
    session.backend.warm_up(list(session.manifest.graphs))
    load_s, random = time.perf_counter() - start, np.random.default_rng(0)
    for _ in range(2):
        session.generate_ids(question(session), new_pixels(session, random), TOKENS)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(load_s, *(int(status[key].split()[0]) * 1024 / 1e6 for key in ("RssAnon", "RssFile", "VmHWM")))


if __name__ == "__main__":
    main()

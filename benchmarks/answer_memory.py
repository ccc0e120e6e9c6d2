"""Resident memory of the runtime alone, after two answers of 16 tokens about pictures: anonymous and mapped megabytes.

python benchmarks/answer_memory.py BUNDLE [--threads 2] [--without-operators]
"""

import argparse
from pathlib import Path

import numpy as np

from vlmdeploy.kernels import cpu
from vlmdeploy.runtime.session import open_bundle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--without-operators", action="store_true", help="run ONNX Runtime's operators instead of ours")
    options = parser.parse_args()
    if options.without_operators:
        cpu.library = lambda: None
    session, random = open_bundle(options.bundle, threads=options.threads), np.random.default_rng(0)
    tokens, side = session.manifest.tokens, session.manifest.image.size_px
    image_ids = np.full(tokens.rows_per_image, tokens.placeholder_id)
    vocab_size = session.manifest.embedding.vocab_size
    ids = np.concatenate(([tokens.bos_id], image_ids, random.integers(vocab_size // 2, vocab_size, 17)))
    for _ in range(2):
        session.generate_ids(ids, random.standard_normal((1, 3, side, side), np.float32), 16)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    anonymous, mapped = (int(status[key].split()[0]) * 1024 / 1e6 for key in ("RssAnon", "RssFile"))
    size = sum(path.stat().st_size for path in options.bundle.iterdir()) / 1e6
    print(f"anonymous {anonymous:.0f} MB, mapped {mapped:.0f} MB, bundle {size:.0f} MB")


if __name__ == "__main__":
    main()

"""Long runs: thousands of answers in one process, whose memory must not grow."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

WARM_UP = 0.1  # of the answers, in which pools and caches fill
MOST_GROWTH = 4 << 20  # bytes

ANSWERS = """
import json, sys
import numpy as np
from PIL import Image
import vlmdeploy
from vlmdeploy.bench.memory_use import resident

bundle, residency, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
session, random, used = vlmdeploy.open(bundle, residency=residency, threads=2), np.random.default_rng(0), []
for index in range(count):
    size = random.integers(20, 400, 2)
    picture = Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8))
    text = {"type": "text", "text": "a " * int(random.integers(1, 20))}
    content = [{"type": "image", "image": picture}, text] if index % 3 else [text]
    how = {"temperature": 1.0, "top_p": 0.9, "seed": index} if index % 2 else {}
    pieces = session.generate([{"role": "user", "content": content}], max_new_tokens=int(random.integers(1, 12)), **how)
    if index % 7:
        list(pieces)
    else:  # left after the first piece, as a client that goes away
        next(pieces, None)
        pieces.close()
    if index % (count // 100) == 0:
        used.append(resident().total)
print(json.dumps(used))
"""


@pytest.mark.parametrize(("residency", "count"), [("all", 10_000), ("phase", 2_000)])
def test_memory_does_not_grow_with_answers(answering_bundle: Path, residency: str, count: int) -> None:
    command = [sys.executable, "-c", ANSWERS, str(answering_bundle), residency, str(count)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    used = json.loads(done.stdout)
    warm = used[int(len(used) * WARM_UP) :]
    print(f"\n{residency}: {count} answers, {warm[0] / 1e6:.1f} MB when warm, {warm[-1] / 1e6:.1f} MB at the end")
    assert max(warm) - warm[0] < MOST_GROWTH, [f"{one / 1e6:.1f} MB" for one in used]

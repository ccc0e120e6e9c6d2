"""Regression: memory that a phase no longer needs goes back to the system."""

from pathlib import Path

import numpy as np
import pytest

import vlmdeploy
from tests.tiny_bundle import export, write_text_checkpoint
from vlmdeploy.runtime.memory import release_freed, total_bytes


def resident_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def test_freed_pieces_go_back_to_the_system() -> None:
    """The C library kept the weights of a dropped graph, of up to 32 MB a piece, for itself."""
    pieces = [np.ones(12_500) for _ in range(1_000)]  # 100 kB each, too small for pages of their own
    last, full = pieces.pop(), resident_bytes()
    pieces.clear()
    release_freed()
    assert full - resident_bytes() > 90e6
    assert last[0] == 1, "the newest piece is still in use, so the heap's end cannot just be cut off"


@pytest.mark.parametrize(("limit", "expected"), [("4000000", 4_000_000), ("max", 8_192_000), ("9000000", 8_192_000)])
def test_memory_of_a_container_is_its_limit(limit: str, expected: int, tmp_path: Path) -> None:
    """A plan for "host" took what the whole machine has."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:        8000 kB\nMemFree: 7 kB\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text(f"{limit}\n")
    assert total_bytes(tmp_path) == expected


def test_rows_of_a_picture_own_their_memory(tmp_path: Path) -> None:
    """Rows that were kept for the next question kept all the encoder had worked in: gigabytes at 9,217 patches."""
    bundle = export(write_text_checkpoint(tmp_path / "ckpt"), tmp_path / "bundle")
    with vlmdeploy.open(bundle, threads=1) as session:
        side = session.manifest.image.size_px
        rows = session.backend.encode_images(np.zeros((1, 3, side, side), np.float32))
    assert rows.flags.owndata

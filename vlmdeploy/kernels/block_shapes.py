"""The block shapes and warps of the routed kernels per architecture, and which kernel serves how many rows.

The table is block_shapes.json. Its values come from device data sheets and compiler reports (registers, spills, shared
memory), not from timings on a device, which `benchmarks/routed_kernel.py --tune` makes:

- Rows of a large tile share one unpacking of the weights; 64 x 128 outputs are the most that 8 warps hold without
  spilling registers, in at most 64 KiB of shared memory.
- Few rows are memory-bound, so outputs are split finely enough to occupy every multiprocessor: 4096 outputs make 128
  programs of 32 columns for 8 to 20 multiprocessors (embedded), and 256 of 16 for 28 to 170.
- A Jetson reads about 10 bytes per clock and multiprocessor, so one row of `routed_gemv` already needs most of its
  instructions: more rows go to tensor cores. GeForce cards read 3 to 5 and can afford a second row.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vlmdeploy.errors import BackendError

TABLE = Path(__file__).parent / "block_shapes.json"


@dataclass(frozen=True)
class BlockShape:
    """Rows and columns (outputs) of a program's tile, its warps, and its pipeline stages."""

    block_rows: int
    block_columns: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        """Options for Triton's compiler besides the constants."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class BlockShapes:
    """The shapes of one architecture: `gemv` up to gemv_up_to_tokens rows, then `small_gemm`, then `large_gemm`."""

    gemv: BlockShape
    small_gemm: BlockShape
    large_gemm: BlockShape
    gemv_up_to_tokens: int
    small_gemm_up_to_tokens: int

    def of(self, tokens: int) -> tuple[str, BlockShape]:
        """The kernel for a number of rows, "gemv" or "gemm", and its shape."""
        if tokens <= self.gemv_up_to_tokens:
            return "gemv", self.gemv
        return "gemm", self.small_gemm if tokens <= self.small_gemm_up_to_tokens else self.large_gemm


def known_architectures() -> tuple[int, ...]:
    """The compute capabilities in the table, as 10 * major + minor."""
    return tuple(sorted(int(name) for name in read_table()["architectures"]))


def shapes_of(architecture: int) -> BlockShapes:
    """The shapes of an architecture. Raises BackendError, listing the known ones."""
    table = read_table()
    name = table["architectures"].get(str(architecture))
    if name is None:
        known = ", ".join(str(number) for number in known_architectures())
        raise BackendError(f"no routed kernel for SM {architecture}; there are kernels for SM {known}")
    return shapes_from(table["shapes"][name])


def shapes_from(entry: dict[str, Any]) -> BlockShapes:
    """Parse an entry of the table."""
    gemv, small, large = (BlockShape(**entry[name]) for name in ("gemv", "small_gemm", "large_gemm"))
    return BlockShapes(gemv, small, large, entry["gemv_up_to_tokens"], entry["small_gemm_up_to_tokens"])


@cache
def read_table() -> dict[str, Any]:
    """The whole table."""
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table

"""The interface of the inner loops of quantization, and their threading. `numpy_loops` documents each loop,
`numba_loops` compiles them.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from vlmdeploy.quant.grid import Codes, Floats

Ints = NDArray[np.int64]

TILE = 64  # outputs per step of a compiled loop: block x tile floats fit the L1 cache


@dataclass(frozen=True)
class Loops:
    """One implementation of the inner loops, which `numpy_loops` documents."""

    search_scales: Callable[[Floats, Floats, Floats, Codes, int, Ints], None]
    quantize_block: Callable[[Floats, Floats, Floats, Floats, Floats, Ints, Ints, Codes, int], None]
    descend: Callable[[Floats, Floats, Codes, Floats, Floats, Floats, int], None]
    is_compiled: bool


def in_parallel(work: Callable[[int, int], None], count: int, step: int = TILE) -> None:
    """Call work(start, stop) on ranges that cover 0..count, one per torch thread. `work` must release the GIL.

    Ranges start at multiples of `step`. The result does not depend on the number of threads.
    """
    threads = torch.get_num_threads()
    size = step * -(-count // (step * threads))
    ranges = [(start, min(start + size, count)) for start in range(0, count, size)]
    if len(ranges) == 1:
        work(*ranges[0])
        return
    with ThreadPoolExecutor(len(ranges)) as pool:
        for done in [pool.submit(work, *bounds) for bounds in ranges]:
            done.result()

"""The inner loops compiled by numba, which needs no compiler on the user's machine. `numpy_loops` documents them; these
work in tiles of outputs that stay in the L1 cache, and release the GIL.

Numba caches the compiled code on disk; without a writable cache, each process compiles it again.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np

from vlmdeploy.quant.grid import Codes, Floats
from vlmdeploy.quant.loops import TILE, Ints, Loops, in_parallel

ROWS_AT_ONCE = 16  # rows per range of the scale search


def _has_cache() -> bool:
    """Whether there is a place for a cache: numba gives a user without a home a folder "~" in the current one."""
    given = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(given or Path.home()).is_absolute()
    except RuntimeError:  # no home
        return False


def _compiled(function: Callable[..., None], fastmath: bool | set[str] = False) -> Any:
    try:
        return numba.njit(nogil=True, cache=_has_cache(), fastmath=fastmath)(function)
    except RuntimeError:  # numba found no folder for its cache
        return numba.njit(nogil=True, fastmath=fastmath)(function)


def _search(
    weights: Floats,
    omega: Floats,
    scales: Floats,
    zeros: Codes,
    max_code: np.float32,
    best: Ints,
    start: int,
    stop: int,
) -> None:
    candidates, groups, size = scales.shape[0], weights.shape[1], weights.shape[2]
    for row in range(start, stop):
        for group in range(groups):
            least = np.float32(np.inf)
            for candidate in range(candidates):
                scale = scales[candidate, row, group]
                inverse = np.float32(1) / scale
                zero = np.float32(zeros[candidate, row, group])
                error = np.float32(0)
                for place in range(size):
                    weight = weights[row, group, place]
                    code = min(max(np.rint(weight * inverse) + zero, np.float32(0)), max_code)
                    distance = weight - scale * (code - zero)
                    error += omega[group, place] * distance * distance
                if error < least:
                    least = error
                    best[row, group] = candidate


def _block(
    targets: Floats,
    weights: Floats,
    lower: Floats,
    scales: Floats,
    zeros: Floats,
    groups: Ints,
    columns: Ints,
    codes: Codes,
    max_code: np.float32,
    start: int,
    stop: int,
) -> None:
    size = targets.shape[0]
    tile = np.empty((size, TILE), np.float32)
    errors = np.zeros(TILE, np.float32)
    for left in range(start, stop, TILE):
        width = min(TILE, stop - left)
        tile[:, :width] = targets[:, left : left + width]
        for place in range(size - 1, -1, -1):
            group, column = groups[place], columns[place]
            for out in range(width):
                scale, zero = scales[group, left + out], zeros[group, left + out]
                code = min(max(np.rint(tile[place, out] / scale) + zero, np.float32(0)), max_code)
                codes[column, left + out] = np.uint8(code)
                errors[out] = weights[place, left + out] - scale * (code - zero)
                weights[place, left + out] = errors[out]
            for other in range(place):
                share = lower[place, other]
                for out in range(TILE):
                    tile[other, out] += share * errors[out]


def _descend(
    slopes: Floats,
    errors: Floats,
    codes: Codes,
    scales: Floats,
    zeros: Floats,
    hessian: Floats,
    max_code: np.float32,
    start: int,
    stop: int,
) -> None:
    size = slopes.shape[0]
    tile = np.empty((size, TILE), np.float32)
    change = np.zeros(TILE, np.float32)
    for left in range(start, stop, TILE):
        width = min(TILE, stop - left)
        tile[:, :width] = slopes[:, left : left + width]
        for place in range(size):
            curvature = hessian[place, place]
            moved = False
            for out in range(width):
                scale, old = scales[left + out], np.float32(codes[place, left + out])
                new = min(max(np.rint(old - tile[place, out] / (scale * curvature)), np.float32(0)), max_code)
                change[out] = scale * (new - old)
                moved |= new != old
                codes[place, left + out] = np.uint8(new)
                errors[place, left + out] += change[out]
            if moved:
                for other in range(size):
                    share = hessian[place, other]
                    for out in range(TILE):
                        tile[other, out] += share * change[out]
        slopes[:, left : left + width] = tile[:, :width]


# Allow reordered sums, for vector units; Inf and NaN keep their meaning.
_search_rows = _compiled(_search, fastmath={"reassoc", "contract", "nsz"})
_block_columns = _compiled(_block, fastmath={"contract"})
_descend_columns = _compiled(_descend, fastmath={"contract"})


def _search_scales(weights: Floats, omega: Floats, scales: Floats, zeros: Codes, max_code: int, best: Ints) -> None:
    top = np.float32(max_code)
    in_parallel(lambda *rows: _search_rows(weights, omega, scales, zeros, top, best, *rows), len(weights), ROWS_AT_ONCE)


def _over_outputs(compiled: Any) -> Callable[..., None]:
    """A loop whose first array is [.., out] and whose last argument is max_code, spread over the outputs."""

    def loop(*arguments: Any) -> None:
        *arrays, max_code = arguments
        in_parallel(lambda *outs: compiled(*arrays, np.float32(max_code), *outs), arrays[0].shape[1])

    return loop


COMPILED_LOOPS = Loops(_search_scales, _over_outputs(_block_columns), _over_outputs(_descend_columns), is_compiled=True)

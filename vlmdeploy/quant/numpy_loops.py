"""The three inner loops of quantization in numpy: slow, and the reference for the compiled loops.

Matrices are transposed, inputs first, so that neighbouring outputs (columns) take the same steps side by side. Arrays
are float32 unless noted; outputs are written in place.
"""

import numpy as np

from vlmdeploy.quant.grid import Codes, Floats
from vlmdeploy.quant.loops import Ints, Loops


def search_scales(weights: Floats, omega: Floats, scales: Floats, zeros: Codes, max_code: int, best: Ints) -> None:
    """Find for each row and group the first candidate with the least sum of omega * (w - value)^2.

    weights [rows, groups, group_size]; omega [groups, group_size]; scales, zeros (uint8) [candidates, rows, groups];
    best int64 [rows, groups], written.
    """
    errors = np.empty((len(scales), *weights.shape[:2]), np.float32)
    for index, (scale, zero) in enumerate(zip(scales, zeros, strict=True)):
        middle = zero[..., None].astype(np.float32)
        codes = np.clip(np.rint(weights / scale[..., None]) + middle, 0, max_code)
        distance = weights - scale[..., None] * (codes - middle)
        errors[index] = (omega * distance * distance).sum(-1)
    best[:] = errors.argmin(0)


def quantize_block(
    targets: Floats,
    weights: Floats,
    lower: Floats,
    scales: Floats,
    zeros: Floats,
    groups: Ints,
    columns: Ints,
    codes: Codes,
    max_code: int,
) -> None:
    """Quantize a block of inputs, last one first, each compensating the errors of those after it.

    targets [block, out]: weights plus the share of all errors outside the block; overwritten. weights [block, out]:
    replaced by their errors w - value. lower [block, block]: the factor's block with a unit diagonal. scales, zeros
    [groups, out]. groups, columns int64 [block]: each input's group, and its row of `codes` uint8 [in, out].
    """
    for place in range(len(targets) - 1, -1, -1):
        scale, zero = scales[groups[place]], zeros[groups[place]]
        code = np.clip(np.rint(targets[place] / scale) + zero, 0, max_code)
        codes[columns[place]] = code
        weights[place] -= scale * (code - zero)
        targets[:place] += lower[place, :place, None] * weights[place]


def descend(
    slopes: Floats, errors: Floats, codes: Codes, scales: Floats, zeros: Floats, hessian: Floats, max_code: int
) -> None:
    """One pass of coordinate descent over a group's codes: set each to the best value given all others.

    slopes [group_size, out]: the group's hessian rows times all errors, kept up to date; errors [group_size, out]:
    value - w; codes uint8 [group_size, out]; scales, zeros [out]; hessian [group_size, group_size]: the group's block.
    """
    for place in range(len(slopes)):
        old = codes[place].astype(np.float32)
        new = np.clip(np.rint(old - slopes[place] / (scales * hessian[place, place])), 0, max_code)
        change = scales * (new - old)
        codes[place] = new
        errors[place] += change
        slopes += hessian[place][:, None] * change


NUMPY_LOOPS = Loops(search_scales, quantize_block, descend, is_compiled=False)

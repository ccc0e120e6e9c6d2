"""The three inner loops of quantization, in numpy: slow, and the reference that the compiled loops are tested against.

Layout: matrices are turned, inputs first, so that neighbouring outputs (columns here) go through the same steps side by
side. All arrays are float32 unless said otherwise; outputs are written in place.
"""

import numpy as np

from vlmdeploy.quant.grid import Codes, Floats
from vlmdeploy.quant.loops import Ints, Loops


def search_scales(weights: Floats, omega: Floats, scales: Floats, zeros: Codes, max_code: int, best: Ints) -> None:
    """For each row and group the candidate with the least sum of omega * (w - value)^2; the first one of equals.

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
    """Quantize a block of inputs, the last one first, each with the errors of the later ones made up for.

    targets [block, out]: weights plus the share of all errors made outside the block; used up. weights [block, out]:
    the true values; replaced by their errors w - value. lower [block, block]: the factor's block with a unit diagonal.
    scales, zeros [groups, out]. groups, columns int64 [block]: each input's group, and the row of `codes` uint8
    [in, out] that its codes go to.
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
    """One pass of coordinate descent over a group's codes: each takes the value that is best given all others.

    slopes [group_size, out]: hessian rows of the group times all errors, kept current; errors [group_size, out]:
    value - w; codes uint8 [group_size, out]; scales, zeros [out]; hessian [group_size, group_size], the group's own
    block.
    """
    for place in range(len(slopes)):
        old = codes[place].astype(np.float32)
        new = np.clip(np.rint(old - slopes[place] / (scales * hessian[place, place])), 0, max_code)
        change = scales * (new - old)
        codes[place] = new
        errors[place] += change
        slopes += hessian[place][:, None] * change


NUMPY_LOOPS = Loops(search_scales, quantize_block, descend, is_compiled=False)

"""A prompt's layout: which positions hold image rows, the position id of each token, and its expert. The PyTorch
reference, calibration and the runtime all use these functions.

Source: the authors' model code of CogVLM and CogVLM2, see docs/families/cogvlm.md.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vlmdeploy.errors import PromptError
from vlmdeploy.manifest import TokenRules

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def token_types_of(ids: Ints, rules: TokenRules, has_image: bool) -> Ints:
    """Token types of one prompt: 1 on the image's rows, 0 elsewhere. ids and result int64 [seq].

    With an image, placeholders must follow BOS; without one, every token is text, pad ids included.
    """
    types = np.zeros(len(ids), np.int64)
    if has_image:
        first, last = 1, 1 + rules.rows_per_image
        held = ids[first:last]
        if len(held) < rules.rows_per_image or not (held == rules.placeholder_id).all():
            found = int((held == rules.placeholder_id).sum())
            raise PromptError(
                f"an image was given: ids[1:{last}] must be {rules.rows_per_image} times the placeholder "
                f"{rules.placeholder_id}, found it {found} times in {len(ids)} ids"
            )
        types[first:last] = 1
    return types


def position_ids(token_types: Ints, attention_mask: Ints) -> Ints:
    """Position ids [batch, seq]. The inner rows of an image share one; masked tokens repeat the previous one.

    token_types 0 (text) or 1 (image row), attention_mask 0 (padding) or 1, both int64 [batch, seq].
    """
    image = (token_types == 1) & (attention_mask == 1)
    text = (token_types == 0) & (attention_mask == 1)
    before, after = _shifted(text, 1), _shifted(text, -1)
    rim = image & (before | after)
    rim[:, 0] |= image[:, 0]
    rim[:, -1] |= image[:, -1]
    text_like = text | rim
    patch = image & ~rim
    steps = text_like | (patch & _shifted(text_like, 1))
    steps[:, 0] = False
    positions: Ints = np.cumsum(steps, axis=1, dtype=np.int64)
    return positions


def vision_expert_mask(token_types: Ints, rules: TokenRules) -> Bools:
    """Which positions use the vision expert, [batch, seq]: image rows followed by another image row.

    So the last row of an image uses the language expert, like all text.
    """
    if rules.vision_rows == "none":
        return np.zeros(token_types.shape, np.bool_)
    image: Bools = token_types == 1
    return image & _shifted(image, -1)


def _shifted(values: Bools, by: int) -> Bools:
    """Shift values `by` places to the right (negative: left) along axis 1, filling with False."""
    result = np.zeros_like(values)
    if by > 0:
        result[:, by:] = values[:, :-by]
    else:
        result[:, :by] = values[:, -by:]
    return result


def expert_of(vision_mask: Bools) -> Literal["language", "vision"]:
    """The expert that all rows use, bool [rows]."""
    assert vision_mask.all() or not vision_mask.any(), "rows of one expert"
    return "vision" if vision_mask[0] else "language"


@dataclass(frozen=True)
class Segment:
    """Consecutive prompt positions start <= i < stop that use the same expert."""

    expert: Literal["language", "vision"]
    start: int
    stop: int


def segments_of(vision_mask: Bools, chunk_rows: int) -> tuple[Segment, ...]:
    """The segments of one prompt, bool [seq], cut into chunks of at most `chunk_rows` positions."""
    edges = np.flatnonzero(np.diff(vision_mask)) + 1
    bounds = [0, *edges.tolist(), len(vision_mask)]
    return tuple(
        Segment("vision" if vision_mask[start] else "language", at, min(at + chunk_rows, stop))
        for start, stop in pairwise(bounds)
        for at in range(start, stop, chunk_rows)
    )

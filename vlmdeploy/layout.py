"""A prompt's layout: which positions hold image rows, the position id of each token, and its expert. The PyTorch
reference, calibration and the runtime all use these functions.

Source: the authors' model code of CogVLM and CogVLM2, see docs/families/cogvlm.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vlmdeploy.errors import PromptError
from vlmdeploy.manifest import TokenRules

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class PromptLayout:
    """One prompt without padding: ids, types (1 on image rows), positions int64 [seq]; vision_mask bool [seq]."""

    ids: Ints
    types: Ints
    positions: Ints
    vision_mask: Bools


def lay_out(ids: Ints, rules: TokenRules, num_images: int) -> PromptLayout:
    """The layout of a prompt of ids int64 [seq] that holds so many images. Raises PromptError."""
    if not rules.takes(num_images):
        raise PromptError(f"{num_images} images were given, this model takes {rules.max_images}")
    types = (_types_after_bos if rules.image_place == "after_bos" else _types_anywhere)(ids, rules, num_images)
    positions = position_ids(types[None], np.ones_like(types)[None], rules)[0]
    return PromptLayout(ids, types, positions, vision_expert_mask(types[None], rules)[0])


def prompt_of(text: Sequence[int] | Ints, rules: TokenRules, num_images: int) -> Ints:
    """Prompt ids int64 [seq]: BOS, a placeholder for every row of the images, and the ids of a text."""
    places = [rules.placeholder_id] * (rules.rows_per_image * num_images)
    return np.array([rules.bos_id, *places, *text], np.int64)


def images_in(ids: Ints, rules: TokenRules) -> int:
    """How many images a prompt of ids int64 [seq] has placeholders for. Raises PromptError for a part of an image."""
    if rules.image_place == "after_bos":
        held = ids[1 : 1 + rules.rows_per_image]
        return int(len(held) == rules.rows_per_image and bool((held == rules.placeholder_id).all()))
    edges = np.flatnonzero(np.diff(ids == rules.placeholder_id, prepend=False, append=False))
    lengths = edges[1::2] - edges[::2]
    if (lengths % rules.rows_per_image).any():
        wrong = int(lengths[lengths % rules.rows_per_image != 0][0])
        raise PromptError(
            f"the ids hold the placeholder {rules.placeholder_id} {wrong} times in a row, expected "
            f"{rules.rows_per_image} times for each image"
        )
    return int(lengths.sum()) // rules.rows_per_image


def _types_anywhere(ids: Ints, rules: TokenRules, num_images: int) -> Ints:
    if (held := images_in(ids, rules)) != num_images:
        raise PromptError(
            f"{num_images} images were given, but the ids hold placeholders ({rules.placeholder_id}) of {held}"
        )
    types: Ints = (ids == rules.placeholder_id).astype(np.int64)
    return types


def _types_after_bos(ids: Ints, rules: TokenRules, num_images: int) -> Ints:
    """Without an image, every token is text, pad ids included."""
    types = np.zeros(len(ids), np.int64)
    if num_images:
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


def position_ids(token_types: Ints, attention_mask: Ints, rules: TokenRules) -> Ints:
    """Position ids [batch, seq]. Masked tokens repeat the previous one; the first have 0.

    token_types 0 (text) or 1 (image row), attention_mask 0 (padding) or 1, both int64 [batch, seq].
    """
    if rules.positions == "index":
        counted: Ints = np.maximum(np.cumsum(attention_mask, axis=1, dtype=np.int64) - 1, 0)
        return counted
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

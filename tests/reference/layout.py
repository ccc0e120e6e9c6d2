"""Positions and expert mask of a CogVLM prompt, one token at a time.

Source: build_position_ids and get_expert_mask of the authors' modeling_cogvlm.py.
"""

from collections.abc import Sequence


def position_ids(types: Sequence[int], mask: Sequence[int]) -> list[int]:
    """Text, and the two outer rows of an image, count on; the rows between share one position; padding repeats."""
    kinds = [_kind(types, mask, index) for index in range(len(types))]
    positions = [0]
    for index in range(1, len(types)):
        starts_patches = kinds[index] == "patch" and kinds[index - 1] == "text"
        counts = kinds[index] == "text" or starts_patches
        positions.append(positions[-1] + (1 if counts else 0))
    return positions


def _kind(types: Sequence[int], mask: Sequence[int], index: int) -> str:
    if not mask[index]:
        return "padding"
    if types[index] == 0:
        return "text"
    for neighbour in (index - 1, index + 1):
        outside = not 0 <= neighbour < len(types)
        if outside or (mask[neighbour] and types[neighbour] == 0):
            return "text"  # the rim of an image run counts like text
    return "patch"


def vision_expert_mask(types: Sequence[int]) -> list[bool]:
    """A row of an image goes to the vision expert if an image row follows it; the last one does not."""
    return [
        index + 1 < len(types) and types[index] == 1 and types[index + 1] == 1  # the row's last position never does
        for index in range(len(types))
    ]

"""Check a batch for the PyTorch reference and derive token types, positions and expert mask by `vlmdeploy.layout`.

Padding may be on either side; a batch may mix rows with and without an image.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlmdeploy.errors import PromptError
from vlmdeploy.layout import Ints, images_in, lay_out, position_ids, vision_expert_mask
from vlmdeploy.spec.model import ModelSpec


@dataclass(frozen=True)
class Layout:
    """The layout of a batch: int64 [batch, seq] each, vision_mask bool."""

    token_type_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    vision_mask: Tensor


def derive_layout(
    spec: ModelSpec,
    input_ids: Tensor,
    images: Tensor | None,
    token_type_ids: Tensor | None,
    positions: Tensor | None,
    attention_mask: Tensor | None,
) -> Layout:
    """Check a batch and derive what was not given; shapes as in VisionLanguageModel.forward. Raises PromptError."""
    _check_ids(spec, input_ids)
    _check_images(spec, images)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    for name, given in (("token_type_ids", token_type_ids), ("position_ids", positions), ("attention_mask", mask)):
        if given is not None and given.shape != input_ids.shape:
            raise PromptError(f"{name} is {list(given.shape)}, expected the shape of input_ids {list(input_ids.shape)}")
    if token_type_ids is None:
        types = _derived_types(spec, input_ids.cpu().numpy(), mask.cpu().numpy(), 0 if images is None else len(images))
    else:
        types = token_type_ids.cpu().numpy() * mask.cpu().numpy()
    device = input_ids.device
    if positions is None:
        positions = torch.from_numpy(position_ids(types, mask.cpu().numpy(), spec.tokens)).to(device)
    vision_mask = torch.from_numpy(vision_expert_mask(types, spec.tokens)).to(device)
    return Layout(torch.from_numpy(types).to(device), positions, mask, vision_mask)


def _check_ids(spec: ModelSpec, input_ids: Tensor) -> None:
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise PromptError(f"input_ids is {list(input_ids.shape)}, expected [batch, seq] with at least one token")
    lowest, highest = int(input_ids.min()), int(input_ids.max())
    if lowest < 0 or highest >= spec.decoder.vocab_size:
        raise PromptError(f"input_ids holds {lowest}..{highest}, expected 0..{spec.decoder.vocab_size - 1}")
    if input_ids.shape[1] > spec.decoder.context_tokens:
        raise PromptError(f"the prompt has {input_ids.shape[1]} tokens, the context {spec.decoder.context_tokens}")


def _check_images(spec: ModelSpec, images: Tensor | None) -> None:
    expected = (3, spec.vision.image_px, spec.vision.image_px)
    if images is not None and (images.ndim != 4 or tuple(images.shape[1:]) != expected):
        raise PromptError(f"images is {list(images.shape)}, expected [images, {', '.join(map(str, expected))}]")


def _derived_types(spec: ModelSpec, ids: Ints, mask: Ints, num_images: int) -> Ints:
    """Token types [batch, seq]: each row holds the images that it has placeholders for."""
    types, real = np.zeros_like(ids), mask == 1
    if num_images == 0 and spec.tokens.image_place == "after_bos":
        return types
    # One image for every row that can hold but one: a row without its placeholders is an error that says what it lacks.
    every_row = spec.tokens.max_images == 1 and num_images == len(ids)
    held = [1 if every_row else images_in(row[own], spec.tokens) for row, own in zip(ids, real, strict=True)]
    if sum(held) != num_images:
        raise PromptError(
            f"{num_images} images were given, but the rows hold the placeholders of {sum(held)}: "
            f"{spec.tokens.rows_per_image} times {spec.tokens.placeholder_id} each"
        )
    for row, count in enumerate(held):
        types[row, real[row]] = lay_out(ids[row][real[row]], spec.tokens, count).types
    return types

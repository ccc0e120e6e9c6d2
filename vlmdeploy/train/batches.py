"""Turn a source's pictures and dialogues into the tensors of one training step.

Each batch has its own random stream (seed, stage, step, worker), so a resumed run needs no sampler state.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from vlmdeploy.errors import TrainingError
from vlmdeploy.manifest import ImageRecipe
from vlmdeploy.model.tokenizer import import_tokenizer
from vlmdeploy.runtime.chat import Tokenizer, Turn, render
from vlmdeploy.train.config import TrainConfig
from vlmdeploy.train.forward import TEXT_POSITION
from vlmdeploy.train.packing import Pair, TextRows, make_pair, pack_rows
from vlmdeploy.train.training_data import Dialogue, TrainingData

CACHED_TEXTS = 10_000


@dataclass(frozen=True)
class Batch:
    """Tensors of one step: images float32 [batch, 3, S, S], others as in ImageBatch; text: None in vision-only
    stages."""

    images: Tensor
    patch_classes: Tensor
    patch_boxes: Tensor
    text: TextRows | None


class BatchMaker:
    """Draws the batches of one worker."""

    def __init__(self, config: TrainConfig, source: TrainingData, worker: int) -> None:
        self._recipe, self._spec, self._source, self._worker = config.recipe, config.spec, source, worker
        self._encode = lru_cache(CACHED_TEXTS)(Tokenizer(import_tokenizer(config.tokenizer_path)).encode)
        templates = {template.name: template for template in config.spec.templates}
        self._template = templates[config.recipe.text.template]

    def draw(self, stage_number: int, step: int, progress: float) -> Batch:
        """Draw this worker's share of a step's batch, deterministically."""
        stage = self._recipe.stages[stage_number]
        rng = np.random.default_rng([self._recipe.seed, stage_number, step, self._worker])
        drawn = self._source.draw(stage.name, stage.batch_images // self._recipe.workers, progress, rng)
        return Batch(
            images=normalized(torch.from_numpy(drawn.pixels), self._spec.image),
            patch_classes=torch.from_numpy(drawn.patch_classes),
            patch_boxes=torch.from_numpy(drawn.patch_boxes),
            text=self._text_rows(drawn.dialogues) if stage.trains == "all" else None,
        )

    def _text_rows(self, dialogues: Sequence[Sequence[Dialogue]]) -> TextRows:
        pairs = [[self._pair(dialogue) for dialogue in of_image] for of_image in dialogues]
        return pack_rows(pairs, self._recipe.text, TEXT_POSITION)

    def _pair(self, dialogue: Dialogue) -> Pair:
        """The last turn with as much history as fits in a chunk."""
        text, last = self._recipe.text, dialogue[-1]
        assert last.assistant is not None, "a training dialogue ends with an answer"
        for first in range(len(dialogue)):
            prompt = self._prompt([*dialogue[first:-1], Turn(last.user)])
            pair = make_pair(self._encode, prompt, last.assistant, self._spec.tokens.stop_ids[0], text)
            if len(pair.ids) <= text.chunk_tokens:
                return pair
        raise TrainingError(
            f"{prompt!r} and its answer are {len(pair.ids)} tokens; chunk_tokens is {text.chunk_tokens}"
        )

    def _prompt(self, turns: Sequence[Turn]) -> str:
        (prompt,) = render(turns, self._template)
        assert isinstance(prompt, str), "templates with token ids cannot be packed"
        return prompt


def normalized(pixels: Tensor, recipe: ImageRecipe) -> Tensor:
    """Like runtime.image.preprocess for pictures of the right size: uint8 [batch, S, S, 3] -> float32 [batch, 3, S,
    S]."""
    mean, std = torch.tensor(recipe.mean), torch.tensor(recipe.std)
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()

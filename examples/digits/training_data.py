"""What train.toml trains on: digit scenes drawn on the fly, with the digit that covers each patch and with dialogues.

Stage "patches" gets mostly grids of many digits: much supervision for the vision encoder in every picture.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from questions import Question, questions  # type: ignore[import-not-found,unused-ignore]  # beside this file
from scenes import (  # type: ignore[import-not-found,unused-ignore]
    BACKGROUND,
    DigitScenes,
    Rng,
    Scene,
    SceneBatch,
    patch_targets,
)

from vlmdeploy.runtime.chat import Turn
from vlmdeploy.train.training_data import Dialogue, ImageBatch

PATCH_PX = 8
GRID_SHARE = 0.7
TWO_TURN_SHARE = 0.05
EARLY_MIX: Mapping[str, float] = {
    "which": 1, "how_many": 0.5, "largest": 0.7, "sum": 1, "left_right": 1.3, "is_there": 0.5, "outermost": 0.5,
    "rec": 2, "reg": 1, "caption": 0.5,
}  # fmt: skip
LATE_MIX: Mapping[str, float] = {
    "which": 1, "how_many": 0.2, "largest": 0.7, "sum": 1, "left_right": 1.7, "is_there": 0.3, "outermost": 0.4,
    "rec": 2.5, "reg": 1, "caption": 0.5,
}  # fmt: skip
"""Questions of each kind per scene in the first and the second half: counting is learned first, search last."""


class DigitTraining:
    """The source of train.toml (see vlmdeploy/train/training_data.py)."""

    num_patch_classes = BACKGROUND + 1

    def __init__(self) -> None:
        self._scenes = DigitScenes("train")

    def draw(self, stage: str, count: int, progress: float, rng: Rng) -> ImageBatch:
        """Scenes with dialogues; in stage "patches" without, and mostly grids."""
        if stage == "patches":
            draw = self._scenes.draw_dense if rng.random() < GRID_SHARE else self._scenes.draw
            return _labelled(draw(count, rng), [])
        drawn = self._scenes.draw(count, rng)
        mix = EARLY_MIX if progress < 0.5 else LATE_MIX
        return _labelled(drawn, [_dialogues(drawn.scene(index), mix, rng) for index in range(count)])


def _dialogues(scene: Scene, mix: Mapping[str, float], rng: Rng) -> list[Dialogue]:
    """The questions in random order; a few follow another short question, so that a history is no surprise."""
    asked = questions(scene, rng, mix)
    short = [question for question in asked if question.task == "vqa"]
    dialogues: list[Dialogue] = []
    for index in rng.permutation(len(asked)):
        question, before = asked[index], short[rng.integers(len(short))]
        has_history = rng.random() < TWO_TURN_SHARE and before is not question
        dialogues.append([_turn(before), _turn(question)] if has_history else [_turn(question)])
    return dialogues


def _turn(question: Question) -> Turn:
    return Turn(question.text, question.answer)


def _labelled(batch: SceneBatch, dialogues: Sequence[Sequence[Dialogue]]) -> ImageBatch:
    targets = patch_targets(batch, PATCH_PX)
    boxes = (targets.boxes / batch.pixels.shape[1]).astype(np.float32)
    return ImageBatch(batch.pixels, targets.classes, boxes, dialogues)

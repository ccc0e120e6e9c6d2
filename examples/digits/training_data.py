"""What train.toml trains on: digit scenes drawn on the fly, with labels for patches and pictures and with dialogues.

Stage "patches" gets mostly grids of many digits: much supervision for the vision encoder in every picture.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from questions import Question, questions  # type: ignore[import-not-found,unused-ignore]  # beside this file
from scenes import (  # type: ignore[import-not-found,unused-ignore]
    BACKGROUND,
    DigitScenes,
    Int,
    PatchTargets,
    Rng,
    Scene,
    SceneBatch,
    patch_targets,
)

from vlmdeploy.runtime.chat import Turn
from vlmdeploy.train.source import Dialogue, ImageBatch, Labels

PATCH_PX = 8
GRID_SHARE = 0.7
TWO_TURN_SHARE = 0.05
MAX_DIGITS = 9
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
    """The source of train.toml (see vlmdeploy/train/source.py).

    Patches learn which digit covers them, whether its centre lies in them and its place from the left; pictures, how
    many digits there are, their sum and the largest.
    """

    patch_labels = (Labels(BACKGROUND + 1, 1.0), Labels(2, 0.5, (1.0, 5.0)), Labels(MAX_DIGITS, 0.3))
    image_labels = (Labels(MAX_DIGITS + 1, 0.1), Labels(9 * MAX_DIGITS + 1, 0.1), Labels(10, 0.1))
    box_weight = 3.0

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
    targets, used = patch_targets(batch, PATCH_PX), batch.digits >= 0
    values = np.where(used, batch.digits, 0)
    return ImageBatch(
        pixels=batch.pixels,
        patch_labels=np.stack((targets.classes, _centres(batch), _places(batch, targets)), -1),
        patch_boxes=(targets.boxes / batch.pixels.shape[1]).astype(np.float32),
        image_labels=np.stack((batch.counts, values.sum(1), values.max(1)), -1),
        dialogues=dialogues,
    )


def _centres(batch: SceneBatch) -> Int:
    """1 for the patches that hold the centre of a digit's box, [batch, patches]."""
    grid, used = batch.pixels.shape[1] // PATCH_PX, batch.digits >= 0
    cells = (batch.boxes[..., :2] + batch.boxes[..., 2:]) // 2 // PATCH_PX  # [batch, slots, 2] (x, y)
    centres = np.zeros((len(used), grid, grid), np.int64)
    centres[np.nonzero(used)[0], cells[used][:, 1], cells[used][:, 0]] = 1
    return centres.reshape(len(used), -1)


def _places(batch: SceneBatch, targets: PatchTargets) -> Int:
    """The covering digit's place from the left, [batch, patches]; -1 on background."""
    is_same = (targets.boxes[:, :, None] == batch.boxes[:, None]).all(-1) & (batch.digits >= 0)[:, None]
    places: Int = np.where(is_same.any(-1), is_same.argmax(-1), -1)
    return places

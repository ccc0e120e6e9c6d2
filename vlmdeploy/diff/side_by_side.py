"""Compares two models stage by stage: where does B leave A?

Both run the same input side by side, each on its own stream, so errors add up as in use. Isolated, each stage of B also
runs on A's output of the previous stage, so only a stage that is wrong itself stands out. Memory holds one stage of one
model with its input and output rows; nothing is written to disk.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from vlmdeploy.bundle import has_manifest
from vlmdeploy.diff.inputs import make_input
from vlmdeploy.diff.row_difference import RowMeter, row_difference
from vlmdeploy.diff.staged_bundle import StagedBundle
from vlmdeploy.diff.staged_checkpoint import StagedCheckpoint, StagedModel
from vlmdeploy.diff.verdict import ModelDiff, StageDifference, checked_tolerance, default_tolerance
from vlmdeploy.errors import ConfigError
from vlmdeploy.layout import Ints
from vlmdeploy.manifest import MANIFEST_NAME
from vlmdeploy.progress import Progress, no_progress
from vlmdeploy.runtime.backends.lanes import Floats
from vlmdeploy.runtime.generate import Prompt

CONFIG_NAME = "config.json"
LOGIT_ROWS = 256  # rows of logits held at once: each is as wide as the vocabulary


@dataclass(frozen=True)
class DiffOptions:
    """The options of the command line. image: a path or a data URL; text: a question; None: drawn from the seed.

    isolate: also run each stage of B on A's values. tolerance: the relative error that passes; None: by precision.
    """

    image: str | None = None
    text: str | None = None
    isolate: bool = False
    tolerance: float | None = None
    threads: int | None = None
    seed: int = 0
    follow_links: bool = False  # of checkpoints


def diff_models(a: Path, b: Path, options: DiffOptions, progress: Progress = no_progress) -> ModelDiff:
    """Compare two folders, each a checkpoint or a bundle.

    Raises ConfigError if their geometries differ, PromptError and DataError for the input, and the errors of opening
    them.
    """
    tolerance = None if options.tolerance is None else checked_tolerance(options.tolerance)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    first, second = (open_staged(folder, options.threads, options.follow_links) for folder in (a, b))
    _check_geometry(first, second)
    tolerance = tolerance or default_tolerance(first.arithmetic, second.arithmetic)
    given = make_input(first, second, options.image, options.text, options.seed)
    stages = tuple(SideBySide(first, second, given.prompt, options.isolate, progress).differences())
    return ModelDiff(str(a), str(b), given.as_json(), tolerance, stages)


def open_staged(folder: Path, threads: int | None, follow_links: bool = False) -> StagedModel:
    """Open a checkpoint or a bundle. Raises ConfigError for other folders."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; expected a checkpoint or a bundle")
    if has_manifest(folder):
        return StagedBundle(folder, threads)
    if (folder / CONFIG_NAME).exists():
        return StagedCheckpoint(folder, follow_links)
    raise ConfigError(f"{folder}: holds no {CONFIG_NAME} and no {MANIFEST_NAME}; expected a checkpoint or a bundle")


def _check_geometry(a: StagedModel, b: StagedModel) -> None:
    if difference := a.geometry.first_difference(b.geometry):
        field, value, other = difference
        raise ConfigError(
            f"{a.name} and {b.name} are no two forms of one model: {field} is {value} in the first and {other} in the "
            "second"
        )


class SideBySide:
    """Runs two models of one geometry over one prompt, one stage of each in turn."""

    def __init__(self, a: StagedModel, b: StagedModel, prompt: Prompt, isolate: bool, progress: Progress) -> None:
        self._a = a
        self._b = b
        self._prompt = prompt
        self._isolate = isolate
        self._progress = progress
        self._done = 0
        self._input: Floats = np.zeros((0, 0), np.float32)  # of A's last stage

    def differences(self) -> Iterator[StageDifference]:
        """One per stage, or two if it has rows of both experts, in the order of the forward pass."""
        mask, last = self._prompt.vision_mask, self._a.geometry.decoder_layers - 1
        languages = np.flatnonzero(~mask)
        pixels = self._prompt.pixels
        pair: tuple[Floats, Floats] | None = None
        if pixels is not None:
            pair = pixels, pixels
            for stage in self._a.geometry.vision_stages():
                outputs = self._run(stage, *pair)
                yield self._compare(stage, "all", outputs, None)
                pair = outputs[0], outputs[1]
        outputs = self._join(pair)
        yield from self._by_expert("decoder.input", outputs)
        for index in range(last + 1):
            stage = f"decoder.layer.{index}"
            outputs = self._run(stage, outputs[0], outputs[1])
            if index < last:
                yield from self._by_expert(stage, outputs)
            else:  # nothing reads the vision expert's output there, and a bundle does not compute it
                yield self._compare(stage, "language", outputs, languages)
        outputs = self._run("decoder.norm", outputs[0][languages], outputs[1][languages])
        yield self._compare("decoder.norm", "language", outputs, None, languages)
        yield self._logits(outputs[0], outputs[1], languages)

    def _run(self, stage: str, x: Floats, y: Floats) -> tuple[Floats, ...]:
        """A's output, B's on its own stream and, if isolated, B's from A's input."""
        geometry = self._a.geometry
        total = len(geometry.vision_stages()) * (self._prompt.pixels is not None) + geometry.decoder_layers + 2
        self._progress(f"compare {stage}", min(self._done, total), total)
        self._done += 1
        self._input = x
        inputs = [y, x] if self._isolate else [y]
        return self._a.run(stage, [x], self._prompt)[0], *self._b.run(stage, inputs, self._prompt)

    def _join(self, image_rows: tuple[Floats, Floats] | None) -> tuple[Floats, ...]:
        """Input of decoder layer 0: the text's rows of each model's embedding, and the picture's rows."""
        ids, places = self._prompt.ids, self._prompt.types == 1
        rows = [self._a.text_rows(ids), self._b.text_rows(ids)]
        rows += [rows[1].copy()] if self._isolate else []
        if image_rows is not None:
            sources = (image_rows[0], image_rows[1], image_rows[0])
            for whole, source in zip(rows, sources, strict=False):
                whole[places] = source[0]
        return tuple(rows)

    def _by_expert(self, stage: str, outputs: tuple[Floats, ...]) -> Iterator[StageDifference]:
        mask = self._prompt.vision_mask
        if mask.any():
            yield self._compare(stage, "vision", outputs, np.flatnonzero(mask))
        yield self._compare(stage, "language", outputs, np.flatnonzero(~mask))

    def _compare(
        self, stage: str, rows: str, outputs: tuple[Floats, ...], chosen: Ints | None, numbers: Ints | None = None
    ) -> StageDifference:
        """Compare the chosen rows (None: all) of one stage; `numbers`: their row numbers in messages, by default
        places."""
        flat = [output.reshape(-1, output.shape[-1]) for output in outputs]
        self._check_shapes(stage, flat)
        places = np.arange(len(flat[0])) if chosen is None else chosen
        found = [row_difference(flat[0][places], other[places], places if numbers is None else numbers)
                 for other in flat[1:]]  # fmt: skip
        if self._isolate and ".layer." in stage:
            given = self._input.reshape(flat[0].shape)[places]
            update = row_difference(flat[0][places] - given, flat[2][places] - given, places)
            found[1] = replace(found[1], update_error=update.relative_error)
        return StageDifference(stage, rows, *found)

    def _check_shapes(self, stage: str, flat: list[Floats]) -> None:
        if flat[0].shape != flat[1].shape:
            raise ConfigError(
                f"{self._a.name} and {self._b.name} are no two forms of one model: {stage} is {list(flat[0].shape)} in "
                f"the first and {list(flat[1].shape)} in the second"
            )

    def _logits(self, x: Floats, y: Floats, numbers: Ints) -> StageDifference:
        """Run normed rows [rows, hidden] through the head in blocks, and compare."""
        meters = [RowMeter(are_logits=True) for _ in range(1 + self._isolate)]
        for start in range(0, len(x), LOGIT_ROWS):
            span = slice(start, start + LOGIT_ROWS)
            expected, *found = self._run("logits", x[span], y[span])
            for meter, values in zip(meters, found, strict=True):
                meter.add(expected, values, numbers[span])
        return StageDifference("logits", "language", *(meter.result() for meter in meters))

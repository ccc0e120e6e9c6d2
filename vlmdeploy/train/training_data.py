"""What a recipe's data class offers: endless labelled pictures with dialogues about them.

The class lives in a Python file beside the recipe, so this package knows nothing of what is in the pictures.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from vlmdeploy.errors import TrainingError
from vlmdeploy.runtime.chat import Turn

Dialogue = Sequence[Turn]
"""Turns about one picture, all answered; the answer to learn is the last."""


@dataclass(frozen=True)
class ImageBatch:
    """Pictures and what is known about them.

    pixels uint8 [batch, S, S, 3]. patch_classes int64 [batch, patches]: what covers each patch; patch_boxes float32
    [batch, patches, 4]: x0, y0, x1, y1 of it in 0..1 of the side, all 0 where nothing does. dialogues: for each picture
    as many as are wanted, those that no longer fit into a row are left out; empty in stages for vision alone.
    """

    pixels: NDArray[np.uint8]
    patch_classes: NDArray[np.int64]
    patch_boxes: NDArray[np.float32]
    dialogues: Sequence[Sequence[Dialogue]]


@runtime_checkable
class TrainingData(Protocol):
    """The data class: built without arguments, without state between draws."""

    num_patch_classes: int

    def draw(self, stage: str, count: int, progress: float, rng: np.random.Generator) -> ImageBatch:
        """`count` pictures for the stage of that name, of which the share `progress` is over."""


def load_source(path: Path, class_name: str) -> TrainingData:
    """Build the data class in a Python file; other modules beside that file can be imported by it."""
    module = _load_module(path)
    if not hasattr(module, class_name):
        raise TrainingError(f'{path}: has no class "{class_name}"')
    source = getattr(module, class_name)()
    if not isinstance(source, TrainingData):
        raise TrainingError(f"{path}: {class_name} lacks a member of the protocol in vlmdeploy/train/training_data.py")
    return source


def _load_module(path: Path) -> ModuleType:
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, "every .py file has a loader"
    module = module_from_spec(spec)
    sys.modules[path.stem] = module  # where dataclasses look for their module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module

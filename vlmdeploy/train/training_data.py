"""The data class of a recipe: endless labelled pictures with dialogues about them.

Its Python file is beside the recipe, so this package does not depend on the content of the pictures.
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
"""Answered turns about one picture; training learns the last answer."""


@dataclass(frozen=True)
class ImageBatch:
    """Pictures and their labels.

    pixels uint8 [batch, S, S, 3]. patch_classes int64 [batch, patches]: what covers each patch; patch_boxes float32
    [batch, patches, 4]: x0, y0, x1, y1 of it in 0..1 of the side, all 0 where nothing does. dialogues: any number
    per picture; those that do not fit in a row are dropped. Empty in vision-only stages.
    """

    pixels: NDArray[np.uint8]
    patch_classes: NDArray[np.int64]
    patch_boxes: NDArray[np.float32]
    dialogues: Sequence[Sequence[Dialogue]]


@runtime_checkable
class TrainingData(Protocol):
    """The interface of a data class. It takes no arguments and keeps no state between draws."""

    num_patch_classes: int

    def draw(self, stage: str, count: int, progress: float, rng: np.random.Generator) -> ImageBatch:
        """Draw `count` pictures for a stage; `progress` is its finished share."""


def load_source(path: Path, class_name: str) -> TrainingData:
    """Build the data class in a Python file, which may import its neighbours."""
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
    sys.modules[path.stem] = module  # dataclasses look up their module here
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module

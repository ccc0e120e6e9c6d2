"""OUT.partial of a training run: the state to resume from, and the status.

The first worker writes state.pt, the optimizer's buffers and the place in the schedule, every few minutes, and
status.json, time and losses, every few seconds. recipe.json holds the recipe.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmdeploy.artifact import write_file
from vlmdeploy.errors import TrainingError
from vlmdeploy.records import read_object, record_of
from vlmdeploy.train.optimizer import FlatOptimizer

STATE, STATUS, RECIPE = "state.pt", "status.json", "recipe.json"


@dataclass
class Place:
    """The place in the schedule: stage number, its finished steps, CPU seconds and images before it; the weights'
    moving average (like FlatOptimizer.values; empty: none) and smoothed losses (language, dense, accuracy)."""

    stage: int = 0
    step: int = 0
    cpu_s_before: float = 0.0
    images_before: int = 0
    average: Tensor = field(default_factory=lambda: torch.empty(0))
    losses: Tensor = field(default_factory=lambda: torch.zeros(3))


@dataclass(frozen=True)
class Status:
    """The status of a run. Times cover all workers and attempts; images count this stage, all_images all stages."""

    stage: str = ""
    images: int = 0
    stage_images: int = 0
    all_images: int = 0
    lr: float = 0.0
    cpu_s: float = 0.0
    wall_s: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)


def save_state(folder: Path, place: Place, optimizer: FlatOptimizer) -> None:
    """Replace state.pt atomically and durably."""
    content = {**vars(place), **optimizer.state()}
    write_file(folder / STATE, lambda file: torch.save(content, file), sync=True)


def load_place(folder: Path) -> Place:
    """The place to resume from; the start if there is no state."""
    content = _read_state(folder)
    return Place(**{name: content[name] for name in vars(Place())}) if content else Place()


def load_optimizer(folder: Path, optimizer: FlatOptimizer) -> None:
    """Restore the optimizer of the state's stage."""
    optimizer.load_state(_read_state(folder))


def _read_state(folder: Path) -> dict[str, Any]:
    path = folder / STATE
    if not path.is_file():
        return {}
    try:
        content: dict[str, Any] = torch.load(path, weights_only=True)
    except Exception as error:  # unpickling raises anything
        raise TrainingError(f"{path}: damaged ({error}); remove {folder} to start over") from error
    return content


def write_status(folder: Path, status: Status) -> None:
    """Replace status.json atomically."""
    content = json.dumps(asdict(status)).encode()
    write_file(folder / STATUS, lambda file: file.write(content), sync=False)


def read_status(folder: Path) -> Status:
    """The last status; all zeros if there is none."""
    path = folder / STATUS
    return record_of(Status, read_object(path, TrainingError, is_optional=True), str(path), TrainingError)

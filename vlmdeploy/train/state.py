"""The folder OUT.partial: what a killed run needs to go on, and what it shows meanwhile.

state.pt holds the optimizer's buffers and the place in the schedule, written by the first worker every few minutes;
status.json the time used and the losses, renewed every few seconds; recipe.json the values of the recipe.
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
    """Where a run is: the stage's number, steps done in it, CPU seconds used and images seen before it began; the
    weights' moving average (like FlatOptimizer.values; empty: none), smoothed losses (language, dense, accuracy)."""

    stage: int = 0
    step: int = 0
    cpu_s_before: float = 0.0
    images_before: int = 0
    average: Tensor = field(default_factory=lambda: torch.empty(0))
    losses: Tensor = field(default_factory=lambda: torch.zeros(3))


@dataclass(frozen=True)
class Status:
    """What a run shows. Times are of all workers and all attempts; images of this stage and of all of them."""

    stage: str = ""
    images: int = 0
    stage_images: int = 0
    all_images: int = 0
    lr: float = 0.0
    cpu_s: float = 0.0
    wall_s: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)


def save_state(folder: Path, place: Place, optimizer: FlatOptimizer) -> None:
    """Replace state.pt in one step; it is on the disk when this returns."""
    content = {**vars(place), **optimizer.state()}
    write_file(folder / STATE, lambda file: torch.save(content, file), sync=True)


def load_place(folder: Path) -> Place:
    """Where to go on; the start if there is no state."""
    content = _read_state(folder)
    return Place(**{name: content[name] for name in vars(Place())}) if content else Place()


def load_optimizer(folder: Path, optimizer: FlatOptimizer) -> None:
    """Fill the optimizer of the stage that the state belongs to."""
    optimizer.load_state(_read_state(folder))


def _read_state(folder: Path) -> dict[str, Any]:
    path = folder / STATE
    if not path.is_file():
        return {}
    try:
        content: dict[str, Any] = torch.load(path, weights_only=True)
    except Exception as error:  # whatever unpickling stumbles over
        raise TrainingError(f"{path}: damaged ({error}); remove {folder} to start over") from error
    return content


def write_status(folder: Path, status: Status) -> None:
    """Replace status.json in one step."""
    content = json.dumps(asdict(status)).encode()
    write_file(folder / STATUS, lambda file: file.write(content), sync=False)


def read_status(folder: Path) -> Status:
    """The last status; all zero before the first."""
    path = folder / STATUS
    return record_of(Status, read_object(path, TrainingError, is_optional=True), str(path), TrainingError)

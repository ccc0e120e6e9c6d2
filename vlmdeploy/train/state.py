"""OUT.partial of a training run: the state to resume from, and the status.

The first worker writes state.pt, the optimizer's buffers and the place in the schedule, every few minutes, and
status.json, time and losses, every few seconds. recipe.json holds the recipe.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from vlmdeploy.artifact import write_file
from vlmdeploy.errors import TrainingError
from vlmdeploy.input_files import open_input
from vlmdeploy.records import read_object, record_of
from vlmdeploy.train.optimizer import FlatOptimizer

STATE, STATUS, RECIPE = "state.pt", "status.json", "recipe.json"
KINDS: dict[str, type] = {
    "stage": int, "step": int, "cpu_s_before": float, "images_before": int, "average": Tensor, "losses": Tensor,
    "values": Tensor, "first": Tensor, "second": Tensor, "num_steps": int,
}  # fmt: skip


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

    def write(file: BinaryIO) -> None:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # of the archive, closed after the system's error
            raise error.__context__ or error from None

    write_file(folder / STATE, write)


def load_place(folder: Path, num_stages: int) -> Place:
    """The place to resume from; the start if there is no state. Raises TrainingError for a damaged state."""
    content = _read_state(folder)
    if not content:
        return Place()
    place = Place(**{name: content[name] for name in vars(Place())})
    if place.stage >= num_stages or place.losses.shape != Place().losses.shape:
        raise _damaged(folder, f"of stage {place.stage}, the recipe has {num_stages}")
    return place


def load_optimizer(folder: Path, optimizer: FlatOptimizer) -> None:
    """Restore the optimizer of the state's stage. Raises TrainingError for the state of another model."""
    content = _read_state(folder)
    for name in ("values", "first", "second"):
        found, expected = content[name].shape, getattr(optimizer, name).shape
        if found != expected:
            raise _damaged(folder, f"{name} is {list(found)}, expected {list(expected)}")
    optimizer.load_state(content)


def _read_state(folder: Path) -> dict[str, Any]:
    """The content of state.pt, of the expected kinds; {} if there is none. Runs no code that the file may hold."""
    path = folder / STATE
    if not path.exists():
        return {}
    with open_input(path, TrainingError) as file:
        try:
            content = torch.load(file, weights_only=True)
        except Exception as error:  # unpickling raises anything, in many lines
            raise _damaged(folder, f"{str(error).partition('. ')[0]:.200}") from error  # advice follows
    odd = [name for name, kind in KINDS.items() if not isinstance(content, dict) or not _is(content.get(name), kind)]
    if odd:
        raise _damaged(folder, f'"{odd[0]}" is missing or of another kind')
    return content


def _is(value: Any, kind: type) -> bool:
    return type(value) is int and value >= 0 if kind is int else isinstance(value, kind)


def _damaged(folder: Path, found: str) -> TrainingError:
    return TrainingError(f"{folder / STATE}: damaged ({found}); remove {folder} to start over")


def write_status(folder: Path, status: Status) -> None:
    """Replace status.json atomically."""
    content = json.dumps(asdict(status)).encode()
    write_file(folder / STATUS, lambda file: file.write(content))


def read_status(folder: Path) -> Status:
    """The last status; all zeros if there is none."""
    path = folder / STATUS
    return record_of(Status, read_object(path, TrainingError, is_optional=True), str(path), TrainingError)

"""Train a recipe and publish a checkpoint folder in Hugging Face layout.

The folder appears whole or not at all. OUT.partial holds an unfinished run, which the same command resumes.
"""

import json
import logging
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vlmdeploy
from vlmdeploy.artifact import (
    check_not_read,
    check_output,
    locked,
    open_partial,
    partial_folder,
    remove_finished,
    remove_partial,
    staged_folder,
    unwritable_reported,
)
from vlmdeploy.errors import ConfigError, TrainingError
from vlmdeploy.model.load import save_checkpoint
from vlmdeploy.model.vlm import VisionLanguageModel
from vlmdeploy.progress import Progress
from vlmdeploy.records import read_object, record_of
from vlmdeploy.standard_streams import logged
from vlmdeploy.train.config import TrainConfig, load_config
from vlmdeploy.train.loop import train
from vlmdeploy.train.stages import build_optimizer
from vlmdeploy.train.state import (
    RECIPE,
    Status,
    load_optimizer,
    load_place,
    read_status,
)
from vlmdeploy.train.trainee import Trainee
from vlmdeploy.train.training_data import TrainingData, load_source
from vlmdeploy.train.workers import run_workers, uses_bfloat16

RECORD = "training.json"
LOG_EVERY_S = 60.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """The cost and the smoothed final losses of a run, with a one-line message."""

    message: str
    cpu_minutes: float
    wall_minutes: float
    images: int
    losses: dict[str, float]


def run(config_path: Path, out: Path, force: bool, progress: Progress) -> Result:
    """Train a recipe, or resume a killed run of it, and write `out`.

    A finished `out` of the same recipe stays unchanged. Raises ConfigError, TrainingError and ExportError.
    """
    config = load_config(config_path)
    record, folder = read_record(out), partial_folder(out.absolute())
    if record and not force and record["recipe"] == config.values:
        remove_finished(folder, RECIPE, config.values, TrainingError)
        return _result(record, out, "trained already with this recipe")
    check_output(out, force, is_ours)
    check_not_read(out, (config_path, config.data_path, config.tokenizer_path))
    source = load_source(config.data_path, config.recipe.data_class)
    with locked(folder), unwritable_reported(folder), _lines_on_stderr():
        open_partial(folder, RECIPE, config.values, force, TrainingError)
        run_workers(train, (config.path, folder), config.recipe.workers, Watch(folder, progress))
        record = build_record(config, read_status(folder))
        with staged_folder(out, force, is_ours) as staging:
            write_checkpoint(config, trained_model(config, source, folder), record, staging)
        remove_partial(folder, RECIPE)
    return _result(record, out, "trained")


class Watch:
    """Shows the status of running workers: a progress bar, and a log line every minute."""

    def __init__(self, folder: Path, progress: Progress) -> None:
        self._folder, self._progress = folder, progress
        self._last, self._last_s = read_status(folder), time.monotonic()

    def __call__(self) -> None:
        """Show the current status."""
        status = read_status(self._folder)
        self._progress(_headline(status), status.images, status.stage_images)
        if time.monotonic() - self._last_s >= LOG_EVERY_S:
            log.info("%s", _line(status, self._last))
            self._last, self._last_s = status, time.monotonic()


def _headline(status: Status) -> str:
    language, dense = status.losses.get("language", 0.0), status.losses.get("dense", 0.0)
    return f"{status.stage} loss {language:.3f} dense {dense:.3f} CPU {status.cpu_s / 60:.1f} min"


def _line(status: Status, last: Status) -> str:
    losses = ", ".join(f"{name} {value:.4f}" for name, value in status.losses.items())
    rate = (status.all_images - last.all_images) / max(status.cpu_s - last.cpu_s, 1e-3)
    return (
        f"{status.stage}: {status.images} of {status.stage_images} images, {losses}, lr {status.lr:.2e}, "
        f"{status.cpu_s / 60:.1f} CPU minutes, {status.wall_s / 60:.1f} minutes, {rate:.0f} images per CPU second"
    )


@contextmanager
def _lines_on_stderr() -> Iterator[None]:
    """Log to stderr if it shows no progress bar."""
    if sys.stderr.isatty():
        yield
        return
    level = log.level
    log.setLevel(logging.INFO)
    try:
        with logged(log, "%(asctime)s %(message)s", logging.INFO):
            yield
    finally:
        log.setLevel(level)


def read_record(out: Path) -> dict[str, Any]:
    """Read training.json of a finished run; {} if there is none."""
    try:
        record = read_object(out / RECORD, is_optional=True)
    except ConfigError:
        return {}
    return record if "recipe" in record else {}


def is_ours(out: Path) -> bool:
    """Whether a training run wrote a folder."""
    return bool(read_record(out))


def trained_model(config: TrainConfig, source: TrainingData, folder: Path) -> VisionLanguageModel:
    """Load the model that the workers trained."""
    trainee = Trainee(config.spec, source.num_patch_classes, config.recipe.seed)
    stages = config.recipe.stages
    stage = stages[load_place(folder, len(stages)).stage]
    load_optimizer(folder, build_optimizer(trainee, stage, config.recipe.optimizer))
    return trainee.model


def write_checkpoint(config: TrainConfig, model: VisionLanguageModel, record: dict[str, Any], folder: Path) -> None:
    """Write weights in bfloat16, configs, tokenizer and the record into an existing folder."""
    save_checkpoint(model, {**config.model_config, "torch_dtype": "bfloat16"}, folder, torch.bfloat16)
    tokens = config.spec.tokens
    stops = list(tokens.stop_ids)
    generation = {
        "bos_token_id": tokens.bos_id,
        "eos_token_id": stops[0] if len(stops) == 1 else stops,
        "pad_token_id": tokens.pad_id,
        "do_sample": False,
    }
    for name, content in (("generation_config.json", generation), (RECORD, record)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(config.tokenizer_path, folder / "tokenizer.json")


def build_record(config: TrainConfig, status: Status) -> dict[str, Any]:
    """The content of training.json: the recipe, and the cost of the run on this machine."""
    return {
        "recipe": config.values,
        "cpu_minutes": round(status.cpu_s / 60, 2),
        "wall_minutes": round(status.wall_s / 60, 2),
        "images": status.all_images,
        "losses": {name: round(value, 5) for name, value in status.losses.items()},
        "bfloat16": uses_bfloat16(config.recipe.dtype),
        "processor": _processor(),
        "versions": {
            "vlmdeploy": vlmdeploy.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


@dataclass(frozen=True)
class _Cost:
    """What training.json says a run took."""

    cpu_minutes: float
    wall_minutes: float
    images: int
    losses: dict[str, float]


def _result(record: dict[str, Any], out: Path, what: str) -> Result:
    took = record_of(_Cost, record, str(out / RECORD), TrainingError)
    message = f"{what}: {took.images} images in {took.cpu_minutes} CPU minutes ({took.wall_minutes} minutes)"
    return Result(message, took.cpu_minutes, took.wall_minutes, took.images, took.losses)

"""The training loop of one worker. All workers hold the same weights and take the same steps, each on its own pictures;
the first one also saves state and status."""

import time
from pathlib import Path

import torch

from vlmdeploy.train.batches import BatchMaker
from vlmdeploy.train.config import StageConfig, TrainConfig, load_config
from vlmdeploy.train.optimizer import FlatOptimizer
from vlmdeploy.train.stages import build_optimizer, dense_weight, learning_rate, progress_of
from vlmdeploy.train.state import Place, Status, load_optimizer, load_place, read_status, save_state, write_status
from vlmdeploy.train.trainee import Trainee
from vlmdeploy.train.training_data import load_source
from vlmdeploy.train.workers import Exchange, uses_bfloat16

STEPS_PER_STATUS = 20
SMOOTHING = 0.02  # of the losses shown
LOSS_NAMES = ("language", "dense", "accuracy")


def train(exchange: Exchange, config_path: Path, folder: Path) -> None:
    """Train all stages of a recipe, resuming from the state in the folder."""
    config = load_config(config_path)
    source = load_source(config.data_path, config.recipe.data_class)
    trainee = Trainee(config.spec, source.num_patch_classes, config.recipe.seed)
    batches = BatchMaker(config, source, exchange.worker)
    clock = Clock(exchange, read_status(folder))
    place = load_place(folder, len(config.recipe.stages))
    for number in range(place.stage, len(config.recipe.stages)):
        if number > place.stage:
            images = place.images_before + place.step * config.recipe.stages[place.stage].batch_images
            place = Place(number, cpu_s_before=clock.cpu_s, images_before=images)
        StageRun(config, trainee, batches, clock, folder).run(place)


class Clock:
    """CPU time of all workers and wall time, earlier attempts included. All workers read the same values."""

    def __init__(self, exchange: Exchange, before: Status) -> None:
        self.exchange, self._before, self._started = exchange, before, time.monotonic()
        self.cpu_s = before.cpu_s
        self.update()

    def update(self) -> None:
        """Sum over the workers. All must call it at the same step."""
        self.cpu_s = self._before.cpu_s + self.exchange.cpu_s()

    @property
    def wall_s(self) -> float:
        """Wall time, earlier attempts included."""
        return self._before.wall_s + time.monotonic() - self._started


class StageRun:
    """One stage: draw, forward, backward, average, step, until the stage is over."""

    def __init__(self, config: TrainConfig, trainee: Trainee, batches: BatchMaker, clock: Clock, folder: Path) -> None:
        self.recipe, self.trainee, self.batches = config.recipe, trainee, batches
        self.clock, self.folder = clock, folder
        self.bfloat16 = uses_bfloat16(config.recipe.dtype)
        self.is_first_worker = clock.exchange.worker == 0
        self.last_saved = time.monotonic()

    def run(self, place: Place) -> None:
        """Train from `place` to the end of its stage, then switch to the averaged weights."""
        stage = self.recipe.stages[place.stage]
        optimizer = build_optimizer(self.trainee, stage, self.recipe.optimizer)
        if place.step:
            load_optimizer(self.folder, optimizer)
        elif stage.average:
            place.average = optimizer.values.clone()
        while (progress := self.progress(place)) < 1:
            batch = self.batches.draw(place.stage, place.step, progress)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
                losses = self.trainee.losses(batch, dense_weight(stage, progress))
            losses.total.backward()
            self.clock.exchange.average(optimizer.grads)
            optimizer.step(learning_rate(stage, place.step, progress))
            move_average(place, optimizer, stage)
            place.losses.lerp_(losses.shown(), SMOOTHING if place.step else 1.0)
            place.step += 1
            self.report(place, optimizer, progress)
        if stage.average:
            optimizer.values.copy_(place.average)
        self.clock.update()
        if self.is_first_worker:
            self.write_status(place, progress)
            save_state(self.folder, place, optimizer)

    def progress(self, place: Place) -> float:
        """The finished share of the stage."""
        stage = self.recipe.stages[place.stage]
        shares = sum(stage.cpu_share for stage in self.recipe.stages[: place.stage + 1])
        budget_s = max(60 * self.recipe.max_cpu_minutes * shares - place.cpu_s_before, 1.0)
        return progress_of(stage, place.step * stage.batch_images, self.clock.cpu_s - place.cpu_s_before, budget_s)

    def report(self, place: Place, optimizer: FlatOptimizer, progress: float) -> None:
        """Update time and status every few steps, and the state every few minutes."""
        if place.step % STEPS_PER_STATUS == 0:
            self.clock.update()
            if self.is_first_worker:
                self.write_status(place, progress)
        if self.is_first_worker and time.monotonic() - self.last_saved >= self.recipe.save_every_s:
            save_state(self.folder, place, optimizer)
            self.last_saved = time.monotonic()

    def write_status(self, place: Place, progress: float) -> None:
        """Write the status file."""
        stage = self.recipe.stages[place.stage]
        images = place.step * stage.batch_images
        status = Status(
            stage=stage.name,
            images=images,
            stage_images=stage.images,
            all_images=place.images_before + images,
            lr=learning_rate(stage, place.step, progress),
            cpu_s=self.clock.cpu_s,
            wall_s=self.clock.wall_s,
            losses=dict(zip(LOSS_NAMES, place.losses.tolist(), strict=True)),
        )
        write_status(self.folder, status)


@torch.no_grad()
def move_average(place: Place, optimizer: FlatOptimizer, stage: StageConfig) -> None:
    """Update the moving average, with a decay that grows to the recipe's."""
    if stage.average:
        decay = min(stage.average, (place.step + 1) / (place.step + 10))
        place.average.lerp_(optimizer.values, 1 - decay)

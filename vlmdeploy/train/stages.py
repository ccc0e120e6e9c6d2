"""A stage: the parameters that it trains, its progress and its learning rate."""

import math

from torch import nn

from vlmdeploy.train.config import OptimizerConfig, StageConfig
from vlmdeploy.train.optimizer import FlatOptimizer
from vlmdeploy.train.trainee import Trainee

NOT_MATRICES = ("embedding", "positions", "lm_head", "head.")  # tables and classifiers use AdamW
NOT_DECAYED = ("embedding", "positions")
FREE_SHARE = 0.02  # of a stage's CPU budget, so that a slow start does not change the schedule


def build_optimizer(trainee: Trainee, stage: StageConfig, config: OptimizerConfig) -> FlatOptimizer:
    """Build the optimizer of a stage. Its parameters move into the optimizer's buffer."""
    module = _trained_part(trainee, stage)
    roles = {name: _role(name, tuple(value.shape), stage) for name, value in module.named_parameters()}
    return FlatOptimizer(module, roles, config)


def _trained_part(trainee: Trainee, stage: StageConfig) -> nn.Module:
    """The trained part of the trainee, under the same names."""
    if stage.trains == "all":
        return trainee
    return nn.ModuleDict({"model": nn.ModuleDict({"vision": trainee.model.vision}), "head": trainee.head})


def _role(name: str, shape: tuple[int, ...], stage: StageConfig) -> tuple[float, bool, int]:
    """Learning rate scale, whether it decays, and its number of stacked matrices (0: not for Muon)."""
    lr_scale = stage.vision_lr_scale if name.startswith(("model.vision.", "head.")) else 1.0
    decays = len(shape) >= 2 and not any(part in name for part in NOT_DECAYED)
    if len(shape) != 2 or any(part in name for part in NOT_MATRICES):
        return lr_scale, decays, 0
    is_qkv = ".qkv." in name and shape[0] == 3 * shape[1]
    return lr_scale, decays, 3 if is_qkv else 2 if ".gate_up." in name else 1


def progress_of(stage: StageConfig, images: int, cpu_s: float, budget_s: float) -> float:
    """The finished share of the stage (it may exceed 1), by images seen or CPU budget used, whichever is larger.

    So on a slow machine the whole schedule gets shorter instead of being cut.
    """
    by_cpu = (cpu_s / budget_s - FREE_SHARE) / (1 - FREE_SHARE)
    return max(images / stage.images, by_cpu)


def learning_rate(stage: StageConfig, step: int, progress: float) -> float:
    """Linear warm-up, then cosine decay to final_lr_share."""
    cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    height = stage.final_lr_share + (1 - stage.final_lr_share) * cosine
    return stage.lr * min(1.0, (step + 1) / stage.warmup_steps) * height


def dense_weight(stage: StageConfig, progress: float) -> float:
    """Weight of the patch losses: constant if they are the only ones, else falling to 0."""
    return stage.dense_weight if stage.trains == "vision" else stage.dense_weight * max(0.0, 1 - progress)

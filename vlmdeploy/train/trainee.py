"""The trained module: the model and a temporary head that classifies patches. Also computes the losses of a step."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmdeploy.model.vlm import VisionLanguageModel
from vlmdeploy.spec.matrices import matrices
from vlmdeploy.spec.model import ModelSpec
from vlmdeploy.train.batches import Batch
from vlmdeploy.train.forward import head_logits, text_states, use_plain_attention
from vlmdeploy.train.packing import TextRows

BOX_WEIGHT = 3.0  # in the patch losses
BOX_BETA = 0.05  # errors below this share of the image side count squared


@dataclass(frozen=True)
class Losses:
    """Scalars of one step. accuracy: of the classes of covered patches."""

    total: Tensor
    language: Tensor
    dense: Tensor
    accuracy: Tensor

    def shown(self) -> Tensor:
        """language, dense, accuracy."""
        return torch.stack((self.language, self.dense, self.accuracy)).detach().float()


class Trainee(nn.Module):
    """The model and its temporary head. The same seed gives the same weights."""

    def __init__(self, spec: ModelSpec, num_patch_classes: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = VisionLanguageModel(spec)
            initialize(self.model)
            use_plain_attention(self.model.vision)
            self.head = DenseHead(spec.vision.width, num_patch_classes)

    def losses(self, batch: Batch, dense_weight: float) -> Losses:
        """The losses of a batch; without texts, only the patch losses."""
        features = self.model.vision(batch.images)
        dense, accuracy = self.head(features, batch)
        if batch.text is None:
            return Losses(dense_weight * dense, torch.zeros(()), dense, accuracy)
        language = answer_loss(self.model, features, batch.text)
        return Losses(language + dense_weight * dense, language, dense, accuracy)


def answer_loss(model: VisionLanguageModel, features: Tensor, text: TextRows) -> Tensor:
    """Weighted mean cross entropy of the answer tokens; features [batch, patches, width]."""
    learned = text.weights > 0
    logits, weights = head_logits(model, text_states(model, features, text)[learned]), text.weights[learned]
    losses = F.cross_entropy(logits, text.targets[learned], reduction="none")
    return (losses * weights).sum() / weights.sum()


class DenseHead(nn.Module):
    """Predicts what covers each patch, and its box."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, num_classes + 4)

    def forward(self, features: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The sum of both losses, and the accuracy; features [batch, patches, width]."""
        logits, boxes = self.out(self.norm(features)).float().tensor_split((-4,), -1)
        covered = batch.patch_boxes[..., 2] > 0
        loss = F.cross_entropy(logits.flatten(0, 1), batch.patch_classes.flatten())
        loss = loss + BOX_WEIGHT * _box_loss(boxes, batch.patch_boxes, covered)
        right = (logits.argmax(-1) == batch.patch_classes) & covered
        return loss, right.sum() / covered.sum().clamp(min=1)


def _box_loss(boxes: Tensor, targets: Tensor, covered: Tensor) -> Tensor:
    """Mean over the covered patches; boxes, targets [batch, patches, 4], covered bool [batch, patches]."""
    errors = F.smooth_l1_loss(boxes, targets, reduction="none", beta=BOX_BETA).sum(-1)
    return (errors * covered).sum() / covered.sum().clamp(min=1)


def initialize(model: VisionLanguageModel) -> None:
    """Initialize parameters by their role.

    The encoder's norms are on the branch outputs, so their weight sets how much a fresh layer adds: half.
    """
    depth_scale = (2 * model.spec.decoder.num_layers) ** -0.5
    decoder = [matrix for matrix in matrices(model.spec) if matrix.part == "decoder"]
    branch_ends = {matrix.target for matrix in decoder if matrix.name in ("dense", "down")}
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.constant_(parameter, 0.5 if name.startswith("vision.") else 1.0)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif name.startswith("connector.boundary.") or name in ("vision.positions", "vision.class_embedding"):
            nn.init.normal_(parameter, std=0.3)
        elif name == "embedding.weight":
            nn.init.normal_(parameter, std=0.5)
        elif name == "lm_head.weight":
            nn.init.normal_(parameter, std=0.02)
        else:
            scale = depth_scale if name in branch_ends else 1.0
            nn.init.normal_(parameter, std=scale / math.sqrt(parameter[0].numel()))

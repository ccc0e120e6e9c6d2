"""What is trained: the model with fresh weights, and a head for the labels of patches and pictures that is dropped
afterwards. The losses of a step are computed here."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmdeploy.families.spec import ModelSpec
from vlmdeploy.model.vlm import VisionLanguageModel
from vlmdeploy.train.batches import Batch
from vlmdeploy.train.forward import TextRows, head_logits, patch_features, text_states
from vlmdeploy.train.source import Labels, Source

BOX_BETA = 0.05  # errors below this share of the image side count squared


@dataclass(frozen=True)
class Losses:
    """Scalars of one step; accuracy is that of the first patch label, where something covers the patch."""

    total: Tensor
    language: Tensor
    dense: Tensor
    accuracy: Tensor

    def shown(self) -> Tensor:
        """language, dense, accuracy."""
        return torch.stack((self.language, self.dense, self.accuracy)).detach().float()


class Trainee(nn.Module):
    """The model and its temporary head. The same seed gives the same weights."""

    def __init__(self, spec: ModelSpec, source: Source, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.model = VisionLanguageModel(spec)
        initialize(self.model)
        self.head = DenseHead(spec.vision.width, source)

    def losses(self, batch: Batch, dense_weight: float) -> Losses:
        """The losses of a batch; without texts the patch losses are all there is."""
        features = patch_features(self.model.vision, batch.images)
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
    """Labels and boxes of patches from their features, labels of pictures from the mean of them."""

    def __init__(self, width: int, source: Source) -> None:
        super().__init__()
        self.patch_kinds, self.image_kinds, self.box_weight = source.patch_labels, source.image_labels, source.box_weight
        self.patch_norm, self.image_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.patch_out = nn.Linear(width, 4 + sum(kind.num_classes for kind in self.patch_kinds))
        self.image_out = nn.Linear(width, sum(kind.num_classes for kind in self.image_kinds))

    def forward(self, features: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The weighted sum of all losses, and the accuracy; features [batch, patches, width]."""
        outputs = self.patch_out(self.patch_norm(features)).float()
        boxes, patch_outputs = outputs[..., :4], outputs[..., 4:]
        of_images = self.image_out(self.image_norm(features.float().mean(1))).float()
        covered = batch.patch_boxes[..., 2] > 0
        loss = self.box_weight * _box_loss(boxes, batch.patch_boxes, covered)
        loss = loss + _label_loss(patch_outputs, batch.patch_labels, self.patch_kinds)
        loss = loss + _label_loss(of_images, batch.image_labels, self.image_kinds)
        best = patch_outputs[..., : self.patch_kinds[0].num_classes].argmax(-1)
        right = (best == batch.patch_labels[..., 0]) & covered
        return loss, right.sum() / covered.sum().clamp(min=1)


def _box_loss(boxes: Tensor, targets: Tensor, covered: Tensor) -> Tensor:
    """Mean over the covered patches; boxes, targets [batch, patches, 4], covered bool [batch, patches]."""
    errors = F.smooth_l1_loss(boxes, targets, reduction="none", beta=BOX_BETA).sum(-1)
    return (errors * covered).sum() / covered.sum().clamp(min=1)


def _label_loss(outputs: Tensor, targets: Tensor, kinds: tuple[Labels, ...]) -> Tensor:
    """Weighted sum over the kinds; outputs [..., classes of all kinds], targets [..., kinds]."""
    total = outputs.new_zeros(())
    for index, logits in enumerate(outputs.split([kind.num_classes for kind in kinds], -1)):
        wanted, weights = targets[..., index].flatten(), kinds[index].class_weights
        weight = torch.tensor(weights) if weights else None
        losses = F.cross_entropy(logits.flatten(0, -2), wanted, weight, reduction="none", ignore_index=-1)
        total = total + kinds[index].loss_weight * losses.sum() / (wanted >= 0).sum().clamp(min=1)
    return total


def initialize(model: VisionLanguageModel) -> None:
    """Fresh weights, by the role that a parameter's name tells.

    The encoder's norms sit on the branch outputs, so their weights say how much a fresh layer adds: half.
    """
    depth_scale = (2 * model.spec.decoder.num_layers) ** -0.5
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
            ends_branch = name.startswith("decoder.") and (".dense." in name or ".down." in name)
            nn.init.normal_(parameter, std=(depth_scale if ends_branch else 1.0) / math.sqrt(parameter[0].numel()))

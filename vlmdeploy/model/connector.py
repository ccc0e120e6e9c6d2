"""The connector: patch features to rows of the decoder's width, one module per step of the ConnectorSpec."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmdeploy.model.vision import ACTIVATIONS
from vlmdeploy.spec.connector import (
    Activation,
    BoundaryRows,
    ConnectorSpec,
    ConnectorStep,
    Downsample,
    GatedMlp,
    Norm,
    Projection,
)


class DownsampleConv(nn.Conv2d):
    """Halves the patch grid on both sides."""

    def __init__(self, step: Downsample) -> None:
        super().__init__(step.in_width, step.out_width, kernel_size=2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[images, patches, in] -> [images, patches / 4, out]; an odd last row and column are lost."""
        side = round(x.shape[1] ** 0.5)
        grid = x.transpose(1, 2).unflatten(2, (side, side))
        return super().forward(grid).flatten(2).transpose(1, 2)


class GatedMlpModule(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one matrix."""

    def __init__(self, step: GatedMlp) -> None:
        super().__init__()
        self.gate_up = nn.Linear(step.in_width, 2 * step.mlp_width, bias=False)
        self.down = nn.Linear(step.mlp_width, step.out_width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class BoundaryRowsModule(nn.Module):
    """Puts a learned row before and after each image's rows."""

    def __init__(self, step: BoundaryRows) -> None:
        super().__init__()
        self.begin = nn.Parameter(torch.empty(step.width))
        self.end = nn.Parameter(torch.empty(step.width))

    def forward(self, x: Tensor) -> Tensor:
        """[images, rows, hidden] -> [images, rows + 2, hidden]."""
        begin, end = self.begin.expand(len(x), 1, -1), self.end.expand(len(x), 1, -1)
        return torch.cat((begin, x, end), 1)


class ActivationModule(nn.Module):
    """An elementwise function without weights."""

    def __init__(self, step: Activation) -> None:
        super().__init__()
        self.function = ACTIVATIONS[step.function]

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return self.function(x)


def build_step(step: ConnectorStep) -> nn.Module:
    """The module of one step."""
    match step:
        case Downsample():
            return DownsampleConv(step)
        case Projection():
            return nn.Linear(step.in_width, step.out_width, bias=False)
        case Norm():
            return nn.LayerNorm(step.width, step.eps)
        case Activation():
            return ActivationModule(step)
        case GatedMlp():
            return GatedMlpModule(step)
        case BoundaryRows():
            return BoundaryRowsModule(step)


class Connector(nn.Sequential):
    """Patch features [images, patches, width] -> decoder rows [images, rows, hidden], step by step."""

    def __init__(self, spec: ConnectorSpec) -> None:
        super().__init__()
        for step in spec.steps:
            self.add_module(step.name, build_step(step))

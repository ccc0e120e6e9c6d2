"""The toy connector step in PyTorch."""

import torch
from torch import Tensor, nn

from tests.toy_package.spec.smooth import Smooth
from vlmdeploy.model.products import RowMixer
from vlmdeploy.spec.connector import ConnectorStep


class Neighbours(RowMixer):
    """The mean of every row and the next one."""

    def shape(self, rows: int, width: int) -> tuple[int, int]:
        """As it was."""
        return rows, width

    def forward(self, x: Tensor) -> Tensor:
        """[images, rows, width] -> the same shape."""
        return (x + torch.cat((x[:, 1:], x[:, -1:]), 1)) / 2


class SmoothModule(nn.Module):
    """See Smooth."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.neighbours = Neighbours()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[images, rows, width] -> the same shape."""
        smoothed: Tensor = self.linear(self.neighbours(x))
        return x + smoothed


def build(step: ConnectorStep) -> nn.Module:
    """The module of the step."""
    assert isinstance(step, Smooth)
    return SmoothModule(step.width)

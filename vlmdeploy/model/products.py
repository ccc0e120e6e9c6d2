"""The building blocks of layers and connector steps, in three kinds by how they treat rows.

A product multiplies each row by a matrix. A RowMixer needs all rows of an image or prompt at once and holds no matrix.
All other modules are row-wise. Calibration runs the same layers over rows on disk and needs only a module's kind.
"""

from abc import abstractmethod
from collections.abc import Callable
from math import isqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmdeploy.overriding import override
from vlmdeploy.spec.vision import ActivationName


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's activation, of any shape."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[ActivationName, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu}


class RowMixer(nn.Module):
    """A module that mixes rows: [batch, rows, width] -> [batch, rows or others, width or another]."""

    @abstractmethod
    def shape(self, rows: int, width: int) -> tuple[int, int]:
        """The output rows and width of one image or prompt, given its input rows and width."""


class BlockConv(nn.Conv2d):
    """A convolution over a square grid with kernel = stride, as a product with blocks of neighbours."""

    def __init__(self, in_width: int, out_width: int, side: int) -> None:
        super().__init__(in_width, out_width, kernel_size=side, stride=side)
        self.arrange = Blocks(side)

    def forward(self, x: Tensor) -> Tensor:
        """[images, patches, in] -> [images, patches / side^2, out]."""
        return F.linear(self.arrange(x), self.weight.flatten(1), self.bias)


PRODUCTS = (nn.Linear, BlockConv)


class Blocks(RowMixer):
    """Flattens square blocks of neighbours into rows, channel slowest. Drops rows and columns that fill no block."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    @override
    def shape(self, rows: int, width: int) -> tuple[int, int]:
        return (isqrt(rows) // self.side) ** 2, width * self.side**2

    def forward(self, x: Tensor) -> Tensor:
        """[images, patches, width] -> [images, blocks, width * side^2]."""
        grid, side = isqrt(x.shape[1]), self.side
        blocks = grid // side
        x = x.unflatten(1, (grid, grid))[:, : blocks * side, : blocks * side]
        x = x.unflatten(2, (blocks, side)).unflatten(1, (blocks, side))  # [images, blocks, side, blocks, side, width]
        return x.permute(0, 1, 3, 5, 2, 4).flatten(3).flatten(1, 2)


class Attention(RowMixer):
    """Unmasked multi-head attention, from packed queries, keys and values."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim

    @override
    def shape(self, rows: int, width: int) -> tuple[int, int]:
        return rows, self.num_heads * self.head_dim

    def heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [images, heads, rows, head_dim], of qkv [images, rows, 3 * width]."""
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, qkv: Tensor) -> Tensor:
        """[images, rows, 3 * width] -> [images, rows, width]."""
        return F.scaled_dot_product_attention(*self.heads(qkv)).transpose(1, 2).flatten(2)


class AroundRows(RowMixer):
    """Adds a learned row before and after the rows of each image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.begin = nn.Parameter(torch.empty(width))
        self.end = nn.Parameter(torch.empty(width))

    @override
    def shape(self, rows: int, width: int) -> tuple[int, int]:
        return rows + 2, width

    def forward(self, x: Tensor) -> Tensor:
        """[images, rows, width] -> [images, rows + 2, width]."""
        begin, end = self.begin.expand(len(x), 1, -1), self.end.expand(len(x), 1, -1)
        return torch.cat((begin, x, end), 1)


class WithoutFirst(RowMixer):
    """Drops the first row, the class token."""

    @override
    def shape(self, rows: int, width: int) -> tuple[int, int]:
        return rows - 1, width

    def forward(self, x: Tensor) -> Tensor:
        """[images, 1 + rows, width] -> [images, rows, width]."""
        return x[:, 1:]


class Elementwise(nn.Module):
    """An activation function, by its name in the spec."""

    def __init__(self, function: ActivationName) -> None:
        super().__init__()
        self.function = ACTIVATIONS[function]

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return self.function(x)


class Times(nn.Module):
    """Multiplies by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return x * self.factor


class SiluGate(nn.Module):
    """silu(gate) * up, of rows that hold both, gate first."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., 2 * width] -> [..., width]."""
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

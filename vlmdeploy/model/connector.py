"""The connector: one module per step of the ConnectorSpec."""

from torch import Tensor, nn

from vlmdeploy.model.products import AroundRows, BlockConv, Elementwise, SiluGate, Times
from vlmdeploy.spec.connector import (
    Activation,
    BoundaryRows,
    ConnectorSpec,
    ConnectorStep,
    Downsample,
    GatedMlp,
    Norm,
    Projection,
    Scale,
)


class GatedMlpModule(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one matrix."""

    def __init__(self, step: GatedMlp) -> None:
        super().__init__()
        self.gate_up = nn.Linear(step.in_width, 2 * step.mlp_width, bias=False)
        self.gate = SiluGate()
        self.down = nn.Linear(step.mlp_width, step.out_width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.down(self.gate(self.gate_up(x)))


def build(step: ConnectorStep) -> nn.Module:
    """Build the module of a step in spec/connector.py; its parameters are named like the step's matrices."""
    match step:
        case Downsample():
            return BlockConv(step.in_width, step.out_width, side=2)
        case Projection():
            return nn.Linear(step.in_width, step.out_width, bias=step.has_bias)
        case Norm():
            return nn.LayerNorm(step.width, step.eps)
        case Activation():
            return Elementwise(step.function)
        case GatedMlp():
            return GatedMlpModule(step)
        case BoundaryRows():
            return AroundRows(step.width)
        case Scale():
            return Times(step.factor)
    raise AssertionError(f"{step}: not a step of this module")


def build_step(step: ConnectorStep) -> nn.Module:
    """Build the module of any step, [images, rows, width] in and out, with the namesake of the step's own file."""
    module: nn.Module = step.counterpart("model").build(step)
    return module


class Connector(nn.Sequential):
    """Patch features [images, patches, width] -> decoder rows [images, rows, hidden], step by step."""

    def __init__(self, spec: ConnectorSpec) -> None:
        super().__init__()
        for step in spec.steps:
            self.add_module(step.name, build_step(step))

"""The connector in the vision graph, step by step. This second definition of each step is independent of the PyTorch
module; verification proves that they agree."""

from math import isqrt

import numpy as np

from vlmdeploy.export.graphs.builder import GraphBuilder
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


def write_connector(builder: GraphBuilder, connector: ConnectorSpec, x: str, rows: int) -> str:
    """Write all steps after patch features x [images, rows, width]; returns the name of the last output.

    The module named like a step's own writes it; its output is called connector.NAME.out.
    """
    for step in connector.steps:
        x = step.counterpart("export.graphs").write(builder, step, f"connector.{step.name}", x, rows)
        rows = step.rows(rows)
    return x


def write(builder: GraphBuilder, step: ConnectorStep, name: str, x: str, rows: int) -> str:
    """Write one of the steps in spec/connector.py from x [images, rows, width] to NAME.out, which is returned."""
    match step:
        case Downsample():
            blocks = _blocks_of_four(builder, isqrt(rows), step.in_width, x)
            return builder.linear(blocks, name, f"{name}.out", has_bias=True)
        case Projection():
            return builder.linear(x, name, f"{name}.out", has_bias=step.has_bias)
        case Norm():
            return layer_norm(builder, name, x, step.eps)
        case Activation():
            return builder.activation(step.function, x, f"{name}.out")
        case GatedMlp():
            return gated_mlp(builder, name, x, axis=2)
        case BoundaryRows():
            return _with_boundary(builder, step, name, x)
        case Scale():
            return builder.node("Mul", [x, builder.constant(name, np.array(step.factor, np.float32))], f"{name}.out")
    raise AssertionError(f"{step}: not a step of this module")


def layer_norm(builder: GraphBuilder, name: str, x: str, eps: float) -> str:
    """Layer norm over the last axis, with weight and bias."""
    inputs = [x, builder.parameter(f"{name}.weight"), builder.parameter(f"{name}.bias")]
    return builder.node("LayerNormalization", inputs, f"{name}.out", axis=-1, epsilon=eps)


def _blocks_of_four(builder: GraphBuilder, grid: int, width: int, x: str) -> str:
    """Put 2 x 2 neighbours side by side, to make the convolution a matrix product: channel slowest, then row, column.

    [images, grid * grid, C] -> [images, (grid / 2)^2, 4 C]; drops an odd last row and column.
    """
    half = grid // 2
    x = builder.node("Reshape", [x, builder.ints(0, grid, grid, width)], "downsample.grid")
    if grid % 2:
        ends = builder.ints(2 * half, 2 * half)
        x = builder.node("Slice", [x, builder.ints(0, 0), ends, builder.ints(1, 2)], "downsample.even")
    x = builder.node("Reshape", [x, builder.ints(0, half, 2, half, 2, width)], "downsample.split")
    x = builder.node("Transpose", [x], "downsample.moved", perm=[0, 1, 3, 5, 2, 4])
    return builder.node("Reshape", [x, builder.ints(0, half * half, 4 * width)], "downsample.blocks")


def gated_mlp(builder: GraphBuilder, name: str, x: str, axis: int) -> str:
    """down(silu(gate(x)) * up(x)); gate and up are one matrix, gate rows first."""
    return builder.linear(builder.gated(x, name, axis), f"{name}.down", f"{name}.out")


def _with_boundary(builder: GraphBuilder, step: BoundaryRows, name: str, x: str) -> str:
    images = builder.node("Shape", [x], f"{name}.images", start=0, end=1)
    shape = builder.node("Concat", [images, builder.ints(1, step.width)], f"{name}.shape", axis=0)
    begin, end = (
        builder.node("Expand", [builder.parameter(f"{name}.{side}"), shape], f"{name}.{side}.row")
        for side in ("begin", "end")
    )
    return builder.node("Concat", [begin, x, end], f"{name}.out", axis=1)

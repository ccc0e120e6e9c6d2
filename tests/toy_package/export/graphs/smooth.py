"""The toy connector step as a graph."""

import numpy as np

from vlmdeploy.export.graphs.builder import GraphBuilder
from vlmdeploy.spec.connector import ConnectorStep


def write(builder: GraphBuilder, step: ConnectorStep, name: str, x: str, rows: int) -> str:
    """x [images, rows, width] -> NAME.out, the same shape."""
    neighbour = np.minimum(np.arange(rows) + 1, rows - 1)
    next_row = builder.node("Gather", [x, builder.ints(*neighbour.tolist())], f"{name}.next", axis=1)
    total = builder.node("Add", [x, next_row], f"{name}.total")
    mean = builder.node("Mul", [total, builder.constant(f"{name}.half", np.array(0.5, np.float32))], f"{name}.mean")
    product = builder.linear(mean, f"{name}.linear", f"{name}.product", has_bias=True)
    return builder.node("Add", [x, product], f"{name}.out")

"""The `vision` graph: pixels [images, 3, S, S] -> decoder rows [images, rows, hidden], encoder and connector in one."""

from vlmdeploy.export.graphs.builder import GraphBuilder
from vlmdeploy.spec.connector import Activation, BoundaryRows, ConnectorStep, Downsample, GatedMlp, Norm, Projection
from vlmdeploy.spec.model import ModelSpec
from vlmdeploy.spec.vision import VisionSpec

ACTIVATION_OPS = {"gelu": "Gelu"}  # the standard operator's default is the exact one (erf)


def build_vision(builder: GraphBuilder, spec: ModelSpec) -> None:
    """Add the whole graph to the builder."""
    rows = spec.connector.rows(spec.vision)
    side = spec.vision.image_px
    builder.input("pixels", "fp32", ("images", 3, side, side))
    x = _embed(builder, spec.vision)
    for index in range(spec.vision.num_layers):
        x = _layer(builder, spec.vision, f"vision.layers.{index}", x)
    x = builder.node("Slice", [x, builder.ints(1), builder.ints(1 << 30), builder.ints(1)], "vision.features")
    for step in spec.connector.steps:
        x = _step(builder, spec, step, x)
    builder.node("Identity", [x], "rows")
    builder.output("rows", "fp32", ("images", rows, spec.decoder.hidden))


def _embed(builder: GraphBuilder, vision: VisionSpec) -> str:
    """Patches by convolution, the class token before them, positions added."""
    inputs = ["pixels", builder.parameter("vision.patch.weight"), builder.parameter("vision.patch.bias")]
    sides = [vision.patch_px, vision.patch_px]
    grid = builder.node("Conv", inputs, "patches.grid", kernel_shape=sides, strides=sides)
    flat = builder.node("Reshape", [grid, builder.ints(0, vision.width, -1)], "patches.flat")
    patches = builder.node("Transpose", [flat], "patches", perm=[0, 2, 1])
    images = builder.node("Shape", ["pixels"], "images", start=0, end=1)
    shape = builder.node("Concat", [images, builder.ints(1, vision.width)], "class.shape", axis=0)
    class_token = builder.node("Expand", [builder.parameter("vision.class_embedding"), shape], "class")
    x = builder.node("Concat", [class_token, patches], "embedded", axis=1)
    return builder.node("Add", [x, builder.parameter("vision.positions")], "vision.embed")


def _layer(builder: GraphBuilder, vision: VisionSpec, name: str, x: str) -> str:
    """x + norm(attention(x)), then x + norm(mlp(x))."""
    order = builder.encoder_rows(vision.num_heads, vision.width)
    qkv = builder.linear(x, f"{name}.qkv", f"{name}.qkv", order, has_bias=True)
    mixed = builder.encoder_attention(qkv, f"{name}.mixed", vision.num_heads, vision.width)
    dense = builder.linear(mixed, f"{name}.dense", f"{name}.dense", has_bias=True)
    x = builder.node(
        "Add", [x, _layer_norm(builder, f"{name}.attention_norm", dense, vision.norm_eps)], f"{name}.middle"
    )
    fc1 = builder.linear(x, f"{name}.fc1", f"{name}.fc1", has_bias=True)
    active = builder.node(ACTIVATION_OPS[vision.activation], [fc1], f"{name}.active")
    fc2 = builder.linear(active, f"{name}.fc2", f"{name}.fc2", has_bias=True)
    return builder.node("Add", [x, _layer_norm(builder, f"{name}.mlp_norm", fc2, vision.norm_eps)], f"{name}.out")


def _layer_norm(builder: GraphBuilder, name: str, x: str, eps: float) -> str:
    inputs = [x, builder.parameter(f"{name}.weight"), builder.parameter(f"{name}.bias")]
    return builder.node("LayerNormalization", inputs, f"{name}.out", axis=-1, epsilon=eps)


def _step(builder: GraphBuilder, spec: ModelSpec, step: ConnectorStep, x: str) -> str:
    """One step of the connector, [images, rows, width] in and out."""
    name = f"connector.{step.name}"
    match step:
        case Downsample():
            return builder.linear(
                _blocks_of_four(builder, spec.vision.grid, step, x), name, f"{name}.out", has_bias=True
            )
        case Projection():
            return builder.linear(x, name, f"{name}.out")
        case Norm():
            return _layer_norm(builder, name, x, step.eps)
        case Activation():
            return builder.node(ACTIVATION_OPS[step.function], [x], f"{name}.out")
        case GatedMlp():
            return gated_mlp(builder, name, x, axis=2)
        case BoundaryRows():
            return _with_boundary(builder, step, name, x)


def _blocks_of_four(builder: GraphBuilder, grid: int, step: Downsample, x: str) -> str:
    """2 x 2 neighbours side by side, so that the convolution is a matrix product: channel slowest, then row, column.

    [images, grid * grid, C] -> [images, (grid / 2)^2, 4 C]; an odd last row and column are lost.
    """
    half, width = grid // 2, step.in_width
    x = builder.node("Reshape", [x, builder.ints(0, grid, grid, width)], "downsample.grid")
    if grid % 2:
        ends = builder.ints(2 * half, 2 * half)
        x = builder.node("Slice", [x, builder.ints(0, 0), ends, builder.ints(1, 2)], "downsample.even")
    x = builder.node("Reshape", [x, builder.ints(0, half, 2, half, 2, width)], "downsample.split")
    x = builder.node("Transpose", [x], "downsample.moved", perm=[0, 1, 3, 5, 2, 4])
    return builder.node("Reshape", [x, builder.ints(0, half * half, 4 * width)], "downsample.blocks")


def gated_mlp(builder: GraphBuilder, name: str, x: str, axis: int) -> str:
    """down(silu(gate(x)) * up(x)); gate and up are one matrix, gate rows first."""
    both = builder.linear(x, f"{name}.gate_up", f"{name}.gate_up")
    gate, up = builder.nodes("Split", [both], [f"{name}.gate", f"{name}.up"], axis=axis, num_outputs=2)
    product = builder.node("Mul", [builder.silu(gate, f"{name}.silu"), up], f"{name}.product")
    return builder.linear(product, f"{name}.down", f"{name}.out")


def _with_boundary(builder: GraphBuilder, step: BoundaryRows, name: str, x: str) -> str:
    images = builder.node("Shape", [x], f"{name}.images", start=0, end=1)
    shape = builder.node("Concat", [images, builder.ints(1, step.width)], f"{name}.shape", axis=0)
    begin, end = (
        builder.node("Expand", [builder.parameter(f"{name}.{side}"), shape], f"{name}.{side}.row")
        for side in ("begin", "end")
    )
    return builder.node("Concat", [begin, x, end], f"{name}.out", axis=1)


def vision_taps(spec: ModelSpec) -> dict[str, str]:
    """Stages of the graph that verification reads: our stage name -> the value's name."""
    layers = {f"vision.layer.{index}": f"vision.layers.{index}.out" for index in range(spec.vision.num_layers)}
    steps = {f"connector.{step.name}": f"connector.{step.name}.out" for step in spec.connector.steps}
    return {"vision.embed": "vision.embed", **layers, **steps}

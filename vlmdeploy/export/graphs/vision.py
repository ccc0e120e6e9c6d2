"""The `vision` graph: pixels [images, 3, S, S] -> decoder rows [images, rows, hidden], encoder and connector in one."""

from vlmdeploy.export.graphs.builder import GraphBuilder
from vlmdeploy.export.graphs.connector import layer_norm, write_connector
from vlmdeploy.spec.model import ModelSpec
from vlmdeploy.spec.vision import VisionSpec


def build_vision(builder: GraphBuilder, spec: ModelSpec) -> None:
    """Add the whole graph to the builder."""
    rows = spec.connector.rows(spec.vision)
    side = spec.vision.image_px
    builder.input("pixels", "fp32", ("images", 3, side, side))
    x = _embed(builder, spec.vision)
    for index in range(spec.vision.num_layers):
        x = _layer(builder, spec.vision, f"vision.layers.{index}", x)
    x = builder.node("Slice", [x, builder.ints(1), builder.ints(1 << 30), builder.ints(1)], "vision.features")
    x = write_connector(builder, spec.connector, x, spec.vision.num_patches)
    builder.node("Identity", [x], "rows")
    builder.output("rows", "fp32", ("images", rows, spec.decoder.hidden))


def _embed(builder: GraphBuilder, vision: VisionSpec) -> str:
    """Patches by convolution, a class token before them, plus positions; normed if the encoder does so."""
    names = ["vision.patch.weight", *(["vision.patch.bias"] if vision.patch_bias else [])]
    inputs = ["pixels", *(builder.parameter(name) for name in names)]
    sides = [vision.patch_px, vision.patch_px]
    grid = builder.node("Conv", inputs, "patches.grid", kernel_shape=sides, strides=sides)
    flat = builder.node("Reshape", [grid, builder.ints(0, vision.width, -1)], "patches.flat")
    patches = builder.node("Transpose", [flat], "patches", perm=[0, 2, 1])
    images = builder.node("Shape", ["pixels"], "images", start=0, end=1)
    shape = builder.node("Concat", [images, builder.ints(1, vision.width)], "class.shape", axis=0)
    class_token = builder.node("Expand", [builder.parameter("vision.class_embedding"), shape], "class")
    x = builder.node("Concat", [class_token, patches], "embedded", axis=1)
    x = builder.node("Add", [x, builder.parameter("vision.positions")], "vision.embed")
    return x if vision.embed_norm_eps is None else layer_norm(builder, "vision.embed_norm", x, vision.embed_norm_eps)


def _layer(builder: GraphBuilder, vision: VisionSpec, name: str, x: str) -> str:
    """Attention, then the MLP, each with its norm behind it or before it."""

    def normed(norm: str, x: str, place: str) -> str:
        return layer_norm(builder, f"{name}.{norm}", x, vision.norm_eps) if vision.norm_place == place else x

    order = builder.encoder_rows(vision.num_heads, vision.width)
    start = normed("attention_norm", x, "before")
    qkv = builder.linear(start, f"{name}.qkv", f"{name}.qkv", order, has_bias=True)
    mixed = builder.encoder_attention(qkv, f"{name}.mixed", vision.num_heads, vision.width)
    dense = builder.linear(mixed, f"{name}.dense", f"{name}.dense", has_bias=True)
    x = builder.node("Add", [x, normed("attention_norm", dense, "branch")], f"{name}.middle")
    middle = normed("mlp_norm", x, "before")
    active = builder.activated(middle, f"{name}.fc1", vision.activation, f"{name}.active")
    fc2 = builder.linear(active, f"{name}.fc2", f"{name}.fc2", has_bias=True)
    return builder.node("Add", [x, normed("mlp_norm", fc2, "branch")], f"{name}.out")


def vision_taps(spec: ModelSpec) -> dict[str, str]:
    """Stages that verification reads: stage name -> name of the value in the graph."""
    embed = "vision.embed" if spec.vision.embed_norm_eps is None else "vision.embed_norm.out"
    layers = {f"vision.layer.{index}": f"vision.layers.{index}.out" for index in range(spec.vision.num_layers)}
    steps = {f"connector.{step.name}": f"connector.{step.name}.out" for step in spec.connector.steps}
    return {"vision.embed": embed, **layers, **steps}

"""The two operators of the routed decoder graph as functions of standard ONNX operators.

ONNX Runtime runs these bodies: slow, but exactly what the plugin's kernels compute, so the graph that passes the gate
is the one that goes into an engine. Shapes, types and the layout of the codes: docs/plugin.md.
"""

import onnx
from onnx import parser

from vlmdeploy.runtime.backends.plugin_library import NAMESPACE, OPERATIONS, VERSION

ROUTED_DOMAIN = NAMESPACE
PARTITION, LINEAR = OPERATIONS
PLUGIN_ATTRIBUTES = {"plugin_namespace": NAMESPACE, "plugin_version": VERSION}  # how TensorRT finds the plugin

# The indices of the language rows, then those of the vision rows, each in their order; and how many are the language's.
PARTITION_BODY = """
<domain: "vlmdeploy", opset_import: ["" : 24]>
RoutedPartition <plugin_namespace, plugin_version> (experts) => (order, language_count)
{
    one_axis = Constant <value_ints: ints = [-1]> ()
    first_axis = Constant <value_ints: ints = [0]> ()
    is_vision_bool = Cast <to: int = 9> (experts)
    is_language_bool = Not (is_vision_bool)
    language_found = NonZero (is_language_bool)
    vision_found = NonZero (is_vision_bool)
    language = Reshape (language_found, one_axis)
    vision = Reshape (vision_found, one_axis)
    both = Concat <axis: int = 0> (language, vision)
    order = Cast <to: int = 6> (both)
    is_language = Cast <to: int = 6> (is_language_bool)
    language_count = ReduceSum <keepdims: int = 1> (is_language, first_axis)
}
"""

# Rows [rows, in] of one expert: float32 products with the codes [1, out, in / 2] as they are packed, and the bias.
EXPERT_BODY = """
<domain: "vlmdeploy", opset_import: ["" : 24]>
ExpertLinear <group_size> (x, codes, scales, bias) => (y)
{
    first_axis = Constant <value_ints: ints = [0]> ()
    last_axis = Constant <value_ints: ints = [-1]> ()
    low_mask = Constant <value: tensor = uint8[1] {15}> ()
    four = Constant <value: tensor = uint8[1] {4}> ()
    middle = Constant <value: tensor = uint8[1] {8}> ()
    signed_bytes = Squeeze (codes, first_axis)
    bytes = Cast <to: int = 2> (signed_bytes)
    low = BitwiseAnd (bytes, low_mask)
    high = BitShift <direction: string = "RIGHT"> (bytes, four)
    out_width = Shape <start: int = 0, end: int = 1> (bytes)
    stored_scales = Squeeze (scales, first_axis)
    turned = Transpose <perm: ints = [1, 0]> (stored_scales)
    wide_scales = Cast <to: int = 1> (turned)
    scales_shape = Shape (wide_scales)
    by_group = Concat <axis: int = 0> (scales_shape, last_axis)
    low_half = Reshape (low, by_group)
    high_half = Reshape (high, by_group)
    groups = Concat <axis: int = 2> (low_half, high_half)
    by_row = Concat <axis: int = 0> (out_width, last_axis)
    ordered = Reshape (groups, by_row)
    middles = Expand (middle, scales_shape)
    weight = DequantizeLinear <axis: int = 1, block_size: int = @group_size> (ordered, wide_scales, middles)
    columns = Transpose <perm: ints = [1, 0]> (weight)
    product = MatMul (x, columns)
    y = Add (product, bias)
}
"""

# Every row of x [tokens, in] through its expert's weights, in float32 and rounded to x's type once.
LINEAR_BODY = """
<domain: "vlmdeploy", opset_import: ["" : 24, "vlmdeploy" : 1]>
RoutedLinear <group_size, plugin_namespace, plugin_version>
    (x, experts, order, language_count, codes, scales, bias) => (y)
{
    first_axis = Constant <value_ints: ints = [0]> ()
    last_axis = Constant <value_ints: ints = [-1]> ()
    one = Constant <value_ints: ints = [1]> ()
    two = Constant <value_ints: ints = [2]> ()
    wide = Cast <to: int = 1> (x)
    rows = Cast <to: int = 7> (order)
    count = Cast <to: int = 7> (language_count)
    tokens = Shape <start: int = 0, end: int = 1> (x)
    language_rows = Slice (rows, first_axis, count, first_axis)
    vision_rows = Slice (rows, count, tokens, first_axis)
    language_x = Gather <axis: int = 0> (wide, language_rows)
    vision_x = Gather <axis: int = 0> (wide, vision_rows)
    language_codes = Slice (codes, first_axis, one, first_axis)
    vision_codes = Slice (codes, one, two, first_axis)
    language_scales = Slice (scales, first_axis, one, first_axis)
    vision_scales = Slice (scales, one, two, first_axis)
    language_bias = Slice (bias, first_axis, one, first_axis)
    vision_bias = Slice (bias, one, two, first_axis)
    language_y = vlmdeploy.ExpertLinear <group_size: int = @group_size>
        (language_x, language_codes, language_scales, language_bias)
    vision_y = vlmdeploy.ExpertLinear <group_size: int = @group_size>
        (vision_x, vision_codes, vision_scales, vision_bias)
    sorted = Concat <axis: int = 0> (language_y, vision_y)
    places = Unsqueeze (rows, last_axis)
    out_width = Shape <start: int = 1, end: int = 2> (bias)
    shape = Concat <axis: int = 0> (tokens, out_width)
    empty = ConstantOfShape (shape)
    placed = ScatterND (empty, places, sorted)
    y = CastLike (placed, x)
}
"""


def routed_functions() -> tuple[onnx.FunctionProto, ...]:
    """The functions that a routed graph contains."""
    return tuple(parser.parse_function(body) for body in (PARTITION_BODY, EXPERT_BODY, LINEAR_BODY))


def without_routed_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove the functions, in place: TensorRT does not look for a plugin if there is a function body."""
    kept = [function for function in model.functions if function.domain != ROUTED_DOMAIN]
    del model.functions[:]
    model.functions.extend(kept)
    return model

"""Single stages of a bundle's graphs, cut out in memory: one layer becomes a small graph with its own input and output,
whose weights stay in the bundle's data file. What each node computes is what it computes in the bundle.
"""

import re
from collections.abc import Sequence

import onnx
from onnx import TensorProto, helper

from vlmdeploy.export.graphs.ort_dialect import CONTRIB

INPUT = "hidden"  # what a decoder graph calls its rows; the input of every cut stage but the first
DECODER_LAYER = re.compile(r"layer\.(\d+)\.out")
STAGES = (  # a value's name in a graph -> the name of the stage that it is the output of
    (re.compile(r"vision\.embed"), "vision.embed"),
    (re.compile(r"vision\.layers\.(\d+)\.out"), "vision.layer.{}"),
    (re.compile(r"connector\.([^.]+)\.out"), "connector.{}"),
    (DECODER_LAYER, "decoder.layer.{}"),
)


class StageGraphs:
    """One graph of a bundle, and how to cut stages out of it. `values`: stage -> name of its output, in their order."""

    def __init__(self, model: onnx.ModelProto) -> None:
        """Take over a graph that was read without its external data; it is edited in place."""
        _split_sums_from_norms(model)
        self._model = model
        self._maker = {output: node for node in model.graph.node for output in node.output if output}
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self.values = _values_of(model)

    def dims(self, name: str) -> tuple[int, ...]:
        """The shape of a stored tensor."""
        return tuple(self._tensors[name].dims)

    def cut(self, source: str, wanted: Sequence[str], layer: int | None = None) -> onnx.ModelProto:
        """The nodes from the value `source` to the wanted ones; `source` becomes the input "hidden".

        layer: keys and values of this decoder layer come in and go out beside it, under the names of layer 0.
        """
        present = [f"present_{kind}.{layer}" for kind in ("key", "value")] if layer is not None else []
        nodes = self._nodes_between(source, [*wanted, *present])
        names = {f"{part}.{layer}": f"{part}.0" for part in ("past_key", "past_value", "present_key", "present_value")}
        names |= {source: INPUT} if source in self._maker else {}
        read = {name for node in nodes for name in node.input}
        graph = helper.make_graph(
            [_renamed(node, names) for node in nodes],
            self._model.graph.name,
            self._inputs(source, layer, names),
            [_float_value(name) for name in wanted] + self._outputs(present, names),
            [tensor for name, tensor in self._tensors.items() if name in read],
        )
        model = helper.make_model(
            graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version,
            functions=self._model.functions,
        )  # fmt: skip
        assert isinstance(model, onnx.ModelProto), "what the helper makes"
        return model

    def _nodes_between(self, source: str, wanted: Sequence[str]) -> list[onnx.NodeProto]:
        """In the graph's order, the nodes that the wanted values need when `source` is given."""
        needed: set[str] = set()
        open_names = list(wanted)
        while open_names:
            name = open_names.pop()
            if name == source or name not in self._maker or self._maker[name].name in needed:
                continue
            needed.add(self._maker[name].name)
            open_names += self._maker[name].input
        return [node for node in self._model.graph.node if node.name in needed]

    def _inputs(self, source: str, layer: int | None, names: dict[str, str]) -> list[onnx.ValueInfoProto]:
        """The cut stage's own input, and for a decoder layer the counters and its part of the cache."""
        given = {value.name: value for value in self._model.graph.input}
        if layer is None:
            return [given[source] if source in given else _float_value(INPUT)]
        others = [value for name, value in given.items() if name != INPUT and not name.startswith("past_")]
        past = [_renamed_value(given[name], names) for name in (f"past_key.{layer}", f"past_value.{layer}")]
        return [_float_value(INPUT), *others, *past]

    def _outputs(self, present: list[str], names: dict[str, str]) -> list[onnx.ValueInfoProto]:
        given = {value.name: value for value in self._model.graph.output}
        return [_renamed_value(given[name], names) for name in present]


def _values_of(model: onnx.ModelProto) -> dict[str, str]:
    """Stage -> name of its output. The decoder's final norm is read off the last layer's."""
    values = {}
    made = [name for node in model.graph.node for name in node.output]
    for name in made:
        for pattern, stage in STAGES:
            if match := pattern.fullmatch(name):
                values[stage.format(*match.groups())] = name
    if "logits" in made:
        last = [name for stage, name in values.items() if stage.startswith("decoder.layer.")][-1]
        values |= {"decoder.norm": f"{last}.normed", "logits": "logits"}
    return values


def _split_sums_from_norms(model: onnx.ModelProto) -> None:
    """Write the fused sum and norm between two layers as the two nodes that it stands for, in place: the sum ends one
    layer, the norm begins the next."""
    nodes = []
    for node in model.graph.node:
        is_fused = node.domain == CONTRIB and node.op_type == "SkipSimplifiedLayerNormalization"
        if is_fused and DECODER_LAYER.fullmatch(node.output[3]):
            x, branch, weight = node.input
            normed, total = node.output[0], node.output[3]
            epsilon = next(item.f for item in node.attribute if item.name == "epsilon")
            nodes.append(helper.make_node("Add", [x, branch], [total], name=total))
            nodes.append(
                helper.make_node("RMSNormalization", [total, weight], [normed], name=normed, axis=-1, epsilon=epsilon)
            )
        else:
            nodes.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def _renamed(node: onnx.NodeProto, names: dict[str, str]) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    for values in (copy.input, copy.output):
        values[:] = [names.get(name, name) for name in values]
    return copy


def _renamed_value(value: onnx.ValueInfoProto, names: dict[str, str]) -> onnx.ValueInfoProto:
    copy = onnx.ValueInfoProto()
    copy.CopyFrom(value)
    copy.name = names[value.name]
    return copy


def _float_value(name: str) -> onnx.ValueInfoProto:
    """A float32 value of any shape."""
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)

"""Cuts single stages out of a bundle's graphs in memory: one layer becomes a small graph with its own input and output,
whose weights stay in the bundle's data file. Every node computes what it computes in the bundle.
"""

import re
from collections.abc import Sequence

import onnx
from onnx import TensorProto, helper

from vlmdeploy.export.engines.parts import reachable, renamed
from vlmdeploy.export.graphs.ort_dialect import CONTRIB

INPUT = "hidden"  # the rows of a decoder graph, and the input of every stage except the first
DECODER_LAYER = re.compile(r"layer\.(\d+)\.out")
STAGES = (  # name of a value in a graph -> the stage with this output
    (re.compile(r"vision\.embed"), "vision.embed"),
    (re.compile(r"vision\.layers\.(\d+)\.out"), "vision.layer.{}"),
    (re.compile(r"connector\.([^.]+)\.out"), "connector.{}"),
    (DECODER_LAYER, "decoder.layer.{}"),
)


class StageGraphs:
    """One graph of a bundle, to cut stages from. `values`: stage -> name of its output, in order."""

    def __init__(self, model: onnx.ModelProto) -> None:
        """Take a graph read without its external data; edits it in place."""
        _split_sums_from_norms(model)
        self._model = model
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self.values = _values_of(model)

    def dims(self, name: str) -> tuple[int, ...]:
        """The shape of a stored tensor."""
        return tuple(self._tensors[name].dims)

    def cut(self, source: str, wanted: Sequence[str], layer: int | None = None) -> onnx.ModelProto:
        """The nodes from the value `source` to the wanted ones; `source` becomes the input "hidden".

        layer: the decoder layer whose keys and values become inputs and outputs too, named as those of layer 0.
        """
        present = [f"present_{kind}.{layer}" for kind in ("key", "value")] if layer is not None else []
        nodes, read = reachable(self._model.graph.node, [*wanted, *present], source)
        given = {value.name: value for value in (*self._model.graph.input, *self._model.graph.output)}
        names = {f"{part}.{layer}": f"{part}.0" for part in ("past_key", "past_value", "present_key", "present_value")}
        names |= {} if source in given else {source: INPUT}
        graph = helper.make_graph(
            [_with_names(node, names) for node in nodes],
            self._model.graph.name,
            self._inputs(source, layer),
            [_float_value(name) for name in wanted] + [renamed(given[name], names[name]) for name in present],
            [tensor for name, tensor in self._tensors.items() if name in read],
        )
        model = helper.make_model(
            graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version,
            functions=self._model.functions,
        )  # fmt: skip
        assert isinstance(model, onnx.ModelProto), "what the helper makes"
        return model

    def _inputs(self, source: str, layer: int | None) -> list[onnx.ValueInfoProto]:
        """The stage's own input, and for a decoder layer the counters and its part of the cache."""
        given = {value.name: value for value in self._model.graph.input}
        if layer is None:
            return [given[source] if source in given else _float_value(INPUT)]
        others = [value for name, value in given.items() if name != INPUT and not name.startswith("past_")]
        past = [renamed(given[f"past_{kind}.{layer}"], f"past_{kind}.0") for kind in ("key", "value")]
        return [_float_value(INPUT), *others, *past]


def _values_of(model: onnx.ModelProto) -> dict[str, str]:
    """Stage -> name of its output. The name of the final norm follows from the last layer's."""
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
    """Split the fused sum and norm between two layers in place: the sum ends one layer, the norm begins the next."""
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


def _with_names(node: onnx.NodeProto, names: dict[str, str]) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    for values in (copy.input, copy.output):
        values[:] = [names.get(name, name) for name in values]
    return copy


def _float_value(name: str) -> onnx.ValueInfoProto:
    """A float32 value of any shape."""
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)

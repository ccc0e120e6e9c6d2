"""A bundle's written graphs, and faults built into them for the gate to find."""

from collections.abc import Callable
from pathlib import Path

import onnx

from tests.tiny_bundle import flip_byte

Edit = Callable[[Path], None]


def graph_of(bundle: Path, name: str) -> onnx.ModelProto:
    """One graph of a bundle, without its weights."""
    return onnx.load(str(bundle / f"{name}.onnx"), load_external_data=False)


def names_of(bundle: Path, graph: str) -> list[str]:
    """Names of the stored tensors of a graph."""
    return [tensor.name for tensor in graph_of(bundle, graph).graph.initializer]


def edit_nodes(graph: str, op: str, edit: Callable[[onnx.NodeProto], None]) -> Edit:
    """Change every node of one operator in one graph and its functions."""

    def edit_file(folder: Path) -> None:
        model = graph_of(folder, graph)
        bodies = (model.graph, *model.functions)
        nodes = [node for body in bodies for node in body.node if node.op_type == op]
        assert nodes, f"{graph} has no {op}"
        for node in nodes:
            edit(node)
        (folder / f"{graph}.onnx").write_bytes(model.SerializeToString())

    return edit_file


def set_attribute(name: str, value: float | int | None) -> Callable[[onnx.NodeProto], None]:
    """Give a node's attribute another value; None removes it."""

    def edit(node: onnx.NodeProto) -> None:
        kept = [attribute for attribute in node.attribute if attribute.name != name]
        assert len(kept) == len(node.attribute) - 1, f"{node.op_type} has no {name}"
        del node.attribute[:]
        node.attribute.extend(kept if value is None else [*kept, onnx.helper.make_attribute(name, value)])

    return edit


def swap_outputs(node: onnx.NodeProto) -> None:
    node.output[:] = reversed(node.output)


def flip_weight(graph: str, tensor_name: str) -> Edit:
    """Change the first byte of one stored tensor."""

    def edit(folder: Path) -> None:
        tensor = next(tensor for tensor in graph_of(folder, graph).graph.initializer if tensor.name == tensor_name)
        place = {entry.key: entry.value for entry in tensor.external_data}
        flip_byte(folder / place["location"], int(place["offset"]))

    return edit

"""Contract tests of the check before ONNX Runtime parses a graph: what every target exports passes, its tables hold
nothing that no target writes, and graphs of other hands are one BundleError each: operators and functions that are not
ours, data elsewhere, sizes that do not fit, and protobuf that is broken on purpose."""

import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from tests.tiny_bundle import export
from tests.tiny_checkpoint import write_tiny_checkpoint
from vlmdeploy.bundle import read_manifest
from vlmdeploy.errors import BundleError
from vlmdeploy.quant.precision import TARGETS, is_tensorrt
from vlmdeploy.runtime import graph_check
from vlmdeploy.runtime.graph_check import MESSAGES, WIRE_TYPES, check_graph

SIZES: dict[str, Any] = {"hidden": 64, "heads": 2, "mlp": 64, "vision_width": 64, "vision_mlp": 64, "image_px": 10}
DATA = "decoder.data"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One bundle of every target and provider, and of the routed decoder. Shared: do not change them."""
    out = tmp_path_factory.mktemp("graphs")
    ckpt = write_tiny_checkpoint(out / "ckpt", "cogvlm2", **SIZES)  # whose operators are CogVLM's and a few more
    options: list[tuple[str, dict[str, Any]]] = [(target, {}) for target in TARGETS]
    options += [(target, {"provider": "cuda"}) for target in TARGETS if not is_tensorrt(target)]
    options += [("trt-int4", {"routed_plugin": "on"}), ("trt-int4", {"precisions": {"vision": "fp32"}})]
    options += [("ort-int4", {"kv": kind}) for kind in ("fp16", "int8")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlmdeploy.export.exporter.import_tensorrt", lambda _: None)  # no engines: graphs are compared
        return [
            export(ckpt, out / str(index), target, group=32, **chosen) for index, (target, chosen) in enumerate(options)
        ]


@dataclass
class Written:
    """What graphs hold, read by the onnx package."""

    operators: set[tuple[str, str]] = field(default_factory=set)
    functions: set[tuple[str, str]] = field(default_factory=set)
    opsets: set[tuple[str, int]] = field(default_factory=set)
    element_types: set[int] = field(default_factory=set)
    value_types: set[int] = field(default_factory=set)
    fields: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # message -> names
    external_bytes: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # file -> bytes that tensors take

    def add(self, message: Any) -> None:
        """Add a message and all within it."""
        match message:
            case NodeProto():
                self.operators.add((message.domain, message.op_type))
            case onnx.FunctionProto():
                self.functions.add((message.domain, message.name))
            case onnx.OperatorSetIdProto():
                self.opsets.add((message.domain, message.version))
            case AttributeProto():
                self.value_types.add(message.type)
            case TensorProto():
                self._add_tensor(message)
        for descriptor, value in message.ListFields():
            self.fields[message.DESCRIPTOR.full_name.removeprefix("onnx.")].add(descriptor.name)
            if descriptor.message_type:
                for inner in [value] if hasattr(value, "ListFields") else value:
                    self.add(inner)

    def _add_tensor(self, tensor: TensorProto) -> None:
        self.element_types.add(tensor.data_type)
        assert all(size >= 0 for size in tensor.dims)
        if tensor.external_data:
            place = {entry.key: entry.value for entry in tensor.external_data}
            self.external_bytes[place["location"]] += int(place["length"])
            assert int(place["offset"]) >= 0


@pytest.fixture(scope="module")
def written(bundles: list[Path]) -> Written:
    found = Written()
    for path in (path for bundle in bundles for path in bundle.glob("*.onnx")):
        found.add(onnx.load(str(path), load_external_data=False))
    return found


# What we write


def test_every_exported_graph_passes(bundles: list[Path]) -> None:
    assert {read_manifest(bundle).target for bundle in bundles} == set(TARGETS)
    for bundle in bundles:
        for graph in read_manifest(bundle).graphs.values():
            content, size = (bundle / graph.file).read_bytes(), (bundle / graph.data_file).stat().st_size
            check_graph(content, graph.file, graph.data_file, size)


def test_tables_hold_what_the_targets_write_and_nothing_else(written: Written) -> None:
    known = {(domain, kind) for domain, kinds in graph_check.OPERATORS.items() for kind in kinds}
    assert known == written.operators
    assert written.opsets == graph_check.OPSETS
    assert {(domain, kind) for domain, kind in known if domain in graph_check.FUNCTION_DOMAINS} == written.functions
    assert set(graph_check.ELEMENT_BITS) == written.element_types
    assert set(graph_check.VALUE_TYPES.values()) == written.value_types
    assert {name: {field.name for field in fields.values()} for name, fields in MESSAGES.items()} == written.fields


@pytest.mark.parametrize("name", MESSAGES)
def test_fields_are_those_of_onnx(name: str) -> None:
    """Number, kind and whether it may be repeated; "bytes" stand for packed numbers, and "string" for text in bytes."""
    kind: Any = reduce(getattr, name.split("."), onnx)
    message = kind()
    kinds = {3: "int", 5: "int", 14: "int", 2: "float", 9: "string", 11: "message", 12: "bytes"}  # of descriptor.proto
    for tag, found in MESSAGES[name].items():
        theirs = message.DESCRIPTOR.fields_by_name[found.name]
        assert tag == theirs.number << 3 | WIRE_TYPES[found.kind]
        if (found.name, found.kind) in {("s", "string"), ("int32_data", "bytes")}:
            continue
        assert found.kind == kinds[theirs.type]
        assert found.is_repeated == hasattr(getattr(message, found.name), "extend")


def test_sizes_and_types_are_those_of_onnx() -> None:
    for kind, bits in graph_check.ELEMENT_BITS.items():
        tensor = helper.make_tensor("x", kind, [8], np.zeros(8))
        assert len(numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data) == bits
    values = {"f": 1.0, "i": 1, "s": "a", "t": tensor, "ints": [1]}
    for name, value in values.items():
        made = helper.make_attribute("a", value)
        assert made.HasField(name) if name != "ints" else made.ints
        assert made.type == graph_check.VALUE_TYPES[name]
    assert graph_check.EXTERNAL == TensorProto.EXTERNAL


# What others write

Edit = Callable[[ModelProto], None]


@pytest.fixture(scope="module")
def routed(bundles: list[Path]) -> tuple[bytes, int]:
    """A graph with functions, and the size of its data file."""
    bundle = next(bundle for bundle in bundles if read_manifest(bundle).is_routed)
    return (bundle / "decoder.onnx").read_bytes(), (bundle / DATA).stat().st_size


def model_of(content: bytes) -> ModelProto:
    model = ModelProto()
    model.ParseFromString(content)
    return model


def refusal(content: bytes, data_bytes: int, data_file: str = DATA) -> str:
    """The message of the one error."""
    with pytest.raises(BundleError, match=r"^decoder\.onnx: ") as error:
        check_graph(content, "decoder.onnx", data_file, data_bytes)
    return str(error.value)


def node(op: str, domain: str = "", **attributes: Any) -> NodeProto:
    return helper.make_node(op, ["hidden"], ["made"], domain=domain, **attributes)


def added(made: NodeProto) -> Edit:
    return lambda model: model.graph.node.append(made)


def added_to_function(made: NodeProto, number: int = 0) -> Edit:
    return lambda model: model.functions[number].node.append(made)


def subgraphs(depth: int) -> NodeProto:
    """If in If in If."""
    inner = node("Identity")
    for _ in range(depth):
        inner = node("If", then_branch=helper.make_graph([inner], "inner", [], []))
    return inner


def hidden_graph() -> NodeProto:
    """A graph in an attribute of an operator that takes none."""
    made = node("Add")
    made.attribute.append(helper.make_attribute("body", helper.make_graph([node("Loop")], "inner", [], [])))
    return made


def function(domain: str, name: str, *nodes: NodeProto) -> onnx.FunctionProto:
    return helper.make_function(domain, name, ["x"], ["y"], list(nodes), [helper.make_opsetid("", 24)])


def added_function(domain: str, name: str) -> Edit:
    return lambda model: model.functions.append(function(domain, name, node("Mul")))


def functions(*made: onnx.FunctionProto) -> Edit:
    """Leave a model with these functions and one call of the last."""

    def edit(model: ModelProto) -> None:
        del model.functions[:], model.graph.node[:]
        model.functions.extend(made)
        model.graph.node.append(node(made[-1].name, made[-1].domain))

    return edit


def with_opset(domain: str, version: int) -> Edit:
    return lambda model: model.opset_import.append(helper.make_opsetid(domain, version))


OPERATIONS: dict[str, tuple[Edit, str]] = {
    "custom domain": (added(node("Run", "com.evil")), 'has operator "com.evil.Run"'),
    "other operator": (added(node("Sin")), 'has operator "Sin"'),
    "contrib operator": (added(node("EPContext", "com.microsoft")), 'has operator "com.microsoft.EPContext"'),
    "ours elsewhere": (added(node("MatMulNBits")), 'has operator "MatMulNBits"'),
    "loop": (added(node("Loop")), 'has operator "Loop"'),
    "if": (added(subgraphs(1)), "AttributeProto has field 6"),
    "deep subgraphs": (added(subgraphs(20)), "AttributeProto has field 6"),
    "graph in an attribute": (added(hidden_graph()), "AttributeProto has field 6"),
    "attribute for a graph": (lambda model: model.graph.node[0].attribute.add(type=5), "of type 5 has values of"),
    "value of another type": (lambda model: model.graph.node[0].attribute.add(type=1, i=1), "of type 1 has values of"),
    "in a function": (added_to_function(node("Run", "com.evil")), 'has operator "com.evil.Run"'),
    "unnamed": (added(NodeProto()), 'has operator ""'),
    "function that replaces": (added_function("", "Add"), 'defines function "Add"'),
    "function of theirs": (added_function("com.evil", "Run"), 'defines function "com.evil.Run"'),
    "unknown function of ours": (added_function("trt", "Run"), 'defines function "trt.Run"'),
    "function twice": (
        functions(*[function("trt", "TRT_Attention", node("Mul"))] * 2), '"trt.TRT_Attention" is there twice'
    ),
    "calls itself": (
        functions(function("trt", "TRT_Attention", node("TRT_Attention", "trt"))), "is called, and not defined before"
    ),
    "calls a later one": (
        functions(
            function("vlmdeploy", "ExpertLinear", node("RoutedLinear", "vlmdeploy")),
            function("vlmdeploy", "RoutedLinear", node("ExpertLinear", "vlmdeploy")),
        ),
        '"vlmdeploy.RoutedLinear" is called, and not defined before',
    ),
    "not defined": (lambda model: model.functions.pop(0), '"trt.TRT_Attention" is called, and not defined'),
    "grows when written out": (
        functions(
            function("vlmdeploy", "ExpertLinear", *[node("Add")] * 300),
            function("vlmdeploy", "RoutedPartition", *[node("ExpertLinear", "vlmdeploy")] * 300),
            function("vlmdeploy", "RoutedLinear", *[node("RoutedPartition", "vlmdeploy")] * 300),
        ),
        "it has 27000000 nodes with functions written out",
    ),
    "domain": (with_opset("com.evil", 1), 'imports version 1 of domain "com.evil"'),
    "version": (with_opset("", 99), 'imports version 99 of domain ""'),
    "domain in a function": (
        lambda model: model.functions[1].opset_import.append(helper.make_opsetid("ai.onnx.ml", 1)),
        'imports version 1 of domain "ai.onnx.ml"',
    ),
    "training": (lambda model: model.training_info.add(), "ModelProto has field 20"),
    "sparse tensor": (lambda model: model.graph.sparse_initializer.add(), "GraphProto has field 15"),
    "text beside": (lambda model: model.metadata_props.add(key="a", value="b"), "ModelProto has field 14"),
    "no graph": (lambda model: model.ClearField("graph"), "there is no graph in it"),
    "negative input": (
        lambda model: setattr(model.graph.input[0].type.tensor_type.shape.dim[1], "dim_value", -5), "has size -5"
    ),
    "input that is no tensor": (
        lambda model: model.graph.input.append(
            helper.make_value_info("x", helper.make_sequence_type_proto(helper.make_tensor_type_proto(1, [1])))
        ),
        "TypeProto has field 4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OPERATIONS)
def test_graph_with_other_parts_is_refused(case: str, routed: tuple[bytes, int]) -> None:
    edit, message = OPERATIONS[case]
    model = model_of(routed[0])
    edit(model)
    assert message in refusal(model.SerializeToString(), routed[1])


def external(model: ModelProto) -> Any:
    """The first tensor in the data file."""
    return next(tensor for tensor in model.graph.initializer if tensor.external_data)


def placed(**place: str) -> Edit:
    """Change entries of the first external tensor's place."""

    def edit(model: ModelProto) -> None:
        for entry in external(model).external_data:
            entry.value = place.get(entry.key, entry.value)

    return edit


def elsewhere(kind: int = TensorProto.FLOAT) -> TensorProto:
    """A tensor whose values lie in another file."""
    tensor = TensorProto(name="made", data_type=kind, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "/etc/passwd"), ("offset", "0"), ("length", "8")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def tensor(dims: list[int], kind: int = TensorProto.FLOAT, **held: Any) -> Edit:
    return lambda model: model.graph.initializer.append(TensorProto(name="made", dims=dims, data_type=kind, **held))


LOCATIONS = ["../../etc/passwd", "/etc/passwd", "vision.data", "manifest.json", f"./{DATA}", f"{DATA}\0", "",
             "*/_ORT_MEM_ADDR_/*"]  # fmt: skip
NUMBERS = ["-1", "+1", "0x10", " 1", "1e3", "٣", "1_0", "", "00", "9" * 40]
TENSORS: dict[str, tuple[Edit, str]] = {
    **{f"location {place!r}": (placed(location=place), f"expected a place in {DATA}") for place in LOCATIONS},
    **{f"offset {number!r}": (placed(offset=number), "expected whole numbers") for number in NUMBERS},
    **{f"length {number!r}": (placed(length=number), "expected whole numbers") for number in NUMBERS},
    "offset beyond the end": (placed(offset="999999999"), "from 999999999 on"),
    "offset beyond any end": (placed(offset=str(2**62)), f"from {2**62} on"),
    "length beyond the end": (placed(length="999999999"), "takes 999999999 bytes"),
    "another length": (placed(length="3"), "takes 3 bytes"),
    "no place": (lambda model: external(model).ClearField("external_data"), f"expected a place in {DATA}"),
    "no length": (lambda model: external(model).external_data.pop(), f"expected a place in {DATA}"),
    "two offsets": (
        lambda model: setattr(external(model).external_data[2], "key", "offset"), f"expected a place in {DATA}"
    ),
    "two locations": (
        lambda model: external(model).external_data.add(key="location", value="/etc/passwd"), "entries of its place"
    ),
    "place without the flag": (
        tensor([1], raw_data=bytes(4), external_data=elsewhere().external_data), "in the graph, 3 entries of a place"
    ),
    "place and values": (lambda model: setattr(external(model), "raw_data", b"a"), "entries of a place elsewhere"),
    "same bytes for many": (
        lambda model: model.graph.initializer.extend([external(model)] * 200), "for all tensors together"
    ),
    "in an attribute": (added(node("Constant", value=elsewhere())), f"expected a place in {DATA}"),
    "in a function": (added_to_function(node("Constant", value=elsewhere()), 1), f"expected a place in {DATA}"),
    "list of tensors": (added(node("Constant", value=[elsewhere()])), "AttributeProto has field 10"),
    "sparse": (
        added(node("Constant", sparse_value=onnx.SparseTensorProto(values=elsewhere(), indices=elsewhere(7)))),
        "AttributeProto has field 22",
    ),
    "negative size": (tensor([4, -1], raw_data=bytes(4)), "type 1 and sizes [4, -1]"),
    "sizes that overflow": (tensor([2**62, 8], raw_data=b""), "expected 147573952589676412928 bytes"),
    "sizes beyond the content": (tensor([1 << 40], raw_data=bytes(4)), "expected 4398046511104 bytes"),
    "sizes beyond the file": (
        lambda model: external(model).dims.append(1 << 30), "bytes of decoder.data"
    ),
    "more values": (tensor([2], raw_data=bytes(12)), "has [12] bytes in the graph"),
    "no values": (tensor([2]), "has no bytes in the graph"),
    "empty without values": (tensor([0]), "has no bytes in the graph"),
    "many sizes": (tensor([1] * 9, raw_data=bytes(4)), "more than 8 sizes"),
    "strings": (tensor([1], TensorProto.STRING, string_data=[b"a"]), "TensorProto has field 6"),
    "type of none": (tensor([1], 0, raw_data=b"a"), "type 0 and sizes [1]"),
    "type that nobody knows": (tensor([1], 99, raw_data=b"a"), "type 99 and sizes [1]"),
    "two holders": (tensor([1], TensorProto.UINT8, raw_data=b"a", int32_data=[1]), "has [1, 1] bytes in the graph"),
    "floats in int32_data": (tensor([1], int32_data=[1, 1, 1, 1]), "int32_data other than values of one byte"),
    "more of int32_data": (tensor([1], TensorProto.UINT8, int32_data=[1, 1]), "has [2] bytes in the graph"),
    "segment": (lambda model: external(model).segment.SetInParent(), "TensorProto has field 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_tensor_that_is_not_ours_is_refused(case: str, routed: tuple[bytes, int]) -> None:
    edit, message = TENSORS[case]
    model = model_of(routed[0])
    edit(model)
    assert message in refusal(model.SerializeToString(), routed[1])


def test_data_file_shorter_than_its_tensors_is_refused(routed: tuple[bytes, int]) -> None:
    content, size = routed
    assert f"of {size - 1} for all tensors together" in refusal(content, size - 1)
    assert "expected a place in other.data" in refusal(content, size, "other.data")


# Broken protobuf


def number(value: int) -> bytes:
    """A varint."""
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + number(rest) if rest else bytes([low])


def block(field_number: int, content: bytes) -> bytes:
    """A field with bytes or a message in it."""
    return number(field_number << 3 | 2) + number(len(content)) + content


def add_node(*more: bytes) -> bytes:
    """A model of one Add, with more fields in the node."""
    return block(7, block(1, block(4, b"Add") + b"".join(more)))


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "there is no graph in it"),
    "no protobuf": (b"\x89PNG\r\n\x1a\n", "ModelProto has field"),
    "text": (b'{"graph": 1}', "ModelProto has field"),
    "group": (add_node(b"\x0b\x0c"), "NodeProto has field 1 of wire type 3"),
    "many groups": (b"\x0b" * 10000, "ModelProto has field 1 of wire type 3"),
    "end of a group": (b"\x0c", "ModelProto has field 1 of wire type 4"),
    "field 0": (b"\x00\x00", "ModelProto has field 0"),
    "unknown field": (add_node(block(99, b"")), "NodeProto has field 99"),
    "another wire type": (add_node(b"\x20\x01"), "NodeProto has field 4 of wire type 0"),
    "packed sizes": (block(7, block(5, block(1, b"\x01"))), "TensorProto has field 1 of wire type 2"),
    "two graphs": (add_node() + add_node(), "ModelProto.graph is there twice"),
    "two operators": (add_node(block(4, b"Mul")), "NodeProto.op_type is there twice"),
    "two types": (block(7, block(5, b"\x10\x01\x10\x07")), "TensorProto.data_type is there twice"),
    "longer than the message": (b"\x3a\x05\x0a", "ModelProto.graph is cut off: 5 bytes from byte 2 on"),
    "longer than the outer one": (block(7, b"\x0a\x7f") + bytes(200), "GraphProto.node is cut off: 127 bytes"),
    "length of 2^63": (b"\x3a" + number(1 << 63), "ModelProto.graph is cut off"),
    "length without an end": (b"\x3a" + b"\xff" * 20, "there is no whole number at byte 1"),
    "number of 2^64": (b"\x08" + number(1 << 64), "there is no whole number at byte 1"),
    "number longer than needed": (b"\x08\x81\x00", "there is no whole number at byte 1"),
    "tag longer than needed": (b"\x88\x00\x01", "there is no whole number at byte 0"),
    "number without its end": (b"\x08\x81", "there is no whole number at byte 1"),
    "number over the message's end": (block(7, block(5, b"\x08\x81")) + b"\x01", "there is no whole number at byte"),
    "float without its end": (add_node(block(5, b"\x15\x00")), "AttributeProto.f is cut off"),
    "name that is no text": (add_node(block(3, b"\xff\xfe")), "there is no text at byte"),
    "operator that is no text": (block(7, block(1, block(4, b"A\xc0\x80"))), "there is no text at byte"),
    "values without an end": (block(7, block(5, b"\x08\x01\x10\x02" + block(5, b"\x81"))), "values of one byte"),
    "value without an end": (block(7, block(5, b"\x08\x01\x10\x02" + block(5, b"\xff" * 11 + b"\1"))), "of one byte"),
    "type beyond 32 bits": (block(7, block(5, b"\x10" + number(1 << 32 | 1))), "has type 4294967297"),
    "place beyond 32 bits": (block(7, block(5, b"\x10\x01\x70" + number(1 << 32 | 1))), "has no bytes in the graph"),
    "place of no kind": (block(7, block(5, b"\x10\x02\x70\x02" + block(9, b"a"))), "has [1] bytes in the graph"),
    "lines in a name": (add_node(block(3, b"a\nb"), block(7, b"\n\x1b[31m")), r'has operator " \x1b[31m.Add"'),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_protobuf_is_one_line(case: str) -> None:
    content, message = BROKEN[case]
    line = refusal(content, 0)
    assert message in line and line.isprintable()


TINY: dict[str, bytes] = {
    "inputs": block(1, b""), "outputs": block(2, b""), "attributes": block(5, number(20 << 3) + b"\x07")
}  # fmt: skip


@pytest.mark.parametrize("case", TINY)
def test_graph_of_endless_tiny_fields_is_refused_early(case: str) -> None:
    """Not after all of them: time is bounded whatever the size."""
    few = add_node(TINY[case] * 1000)
    check_graph(few, "decoder.onnx", DATA, 0)
    assert f"more than {graph_check.MOST_FIELDS} fields" in refusal(add_node(TINY[case] * 600_000), 0)


def test_cut_graphs_are_refused(routed: tuple[bytes, int]) -> None:
    """What is cut between two functions is complete, but for the function that is called."""
    content, size = routed
    for end in range(0, len(content), 89):
        refusal(content[:end], size)


def mutations(content: bytes, seed: int, count: int) -> Iterator[bytes]:
    """Copies with a few bytes changed, taken out, put in or repeated; most near the beginning, where the nodes are."""
    chosen = random.Random(seed)
    for _ in range(count):
        altered = bytearray(content)
        for _ in range(chosen.choice([1, 1, 2, 4])):
            place = chosen.randrange(len(altered) // chosen.choice([1, 4]))
            width = chosen.choice([0, 1, 1, 2, 9])
            source = chosen.randrange(len(altered))
            new = [bytes([chosen.choice([0, 1, 0x0B, 0x7F, 0x80, 0xFF])]), bytes(altered[source : source + width]), b""]
            altered[place : place + width] = chosen.choice([*new, bytes([altered[place] ^ 1 << chosen.randrange(8)])])
        yield bytes(altered)


def test_altered_graphs_are_refused_or_still_ours(routed: tuple[bytes, int]) -> None:
    """What passes is read by the onnx package as what the check took it for."""
    content, size = routed
    known = {(domain, kind) for domain, kinds in graph_check.OPERATORS.items() for kind in kinds}
    passed = 0
    for altered in mutations(content, 7, 600):
        try:
            check_graph(altered, "decoder.onnx", DATA, size)
        except BundleError:
            continue
        passed += 1
        found, model = Written(), model_of(altered)
        found.add(model)
        known_bytes = model.ByteSize()
        model.DiscardUnknownFields()
        assert model.ByteSize() == known_bytes, "a field passed that onnx does not know"
        assert found.operators <= known and found.opsets <= graph_check.OPSETS
        assert set(found.external_bytes) <= {DATA} and found.external_bytes[DATA] <= size
    assert 50 < passed < 450, "the mutations are too wild or too tame to tell anything"

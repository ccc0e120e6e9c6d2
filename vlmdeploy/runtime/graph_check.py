"""Is this a graph that our exporter could have written? Asked before an engine parses it, on the wire: the messages of
onnx.proto in protobuf's encoding (protobuf.dev/programming-guides/encoding).

The tables hold what the graph builders write, field by field; everything else is refused. No message in them contains
itself: there are no subgraphs, and depth ends with the tables. One pass, linear in the bytes, which keeps none of them.
"""

import re
from collections import Counter
from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

from vlmdeploy.errors import BundleError

Span = tuple[int, int]  # the first byte of a message, and the one after its last
Operator = tuple[str, str]  # domain, type

MOST_FIELDS = 1 << 19  # a decoder of a hundred layers has an eighth
MOST_NODES = 1 << 20  # with every function written out where it is called
MOST_DIMS = 8

OPSETS = {("", 23), ("", 24), ("com.microsoft", 1), ("trt", 1), ("vlmdeploy", 1), ("vlmdeploy.compiled", 1)}
FUNCTION_DOMAINS = {"trt", "vlmdeploy"}  # a graph defines their operators itself
OPERATORS = {
    "": {
        "Add", "Attention", "BitShift", "BitwiseAnd", "Cast", "CastLike", "Concat", "Constant", "ConstantOfShape",
        "Conv", "DequantizeLinear", "Expand", "Gather", "Gelu", "Identity", "LayerNormalization", "MatMul", "Mul",
        "NonZero", "Not", "RMSNormalization", "ReduceSum", "Reshape", "RotaryEmbedding", "ScatterND", "Shape", "Slice",
        "Split", "Squeeze", "Swish", "TensorScatter", "Transpose", "Unsqueeze",
    },
    "com.microsoft": {
        "FusedMatMul", "GroupQueryAttention", "MatMulNBits", "MultiHeadAttention", "QuickGelu",
        "SkipSimplifiedLayerNormalization",
    },
    "trt": {"TRT_Attention"},
    "vlmdeploy": {
        "CachedAttention", "EncoderAttention", "ExpertLinear", "GatedLinear", "GeluLinear", "QuantizedLinear",
        "RoutedLinear", "RoutedPartition", "WriteCache",
    },
    "vlmdeploy.compiled": {"CachedAttentionFp16", "CachedAttentionInt8", "WriteCacheFp16", "WriteCacheInt8"},
}  # fmt: skip
ELEMENT_BITS = {1: 32, 2: 8, 3: 8, 7: 64, 10: 16, 22: 4}  # TensorProto.DataType: fp32, uint8, int8, int64, fp16, int4
VALUE_TYPES = {"f": 1, "i": 2, "s": 3, "t": 4, "ints": 7}  # a value's field -> AttributeProto.AttributeType
EXTERNAL = 1  # TensorProto.DataLocation
PLACE_KEYS = {"location", "offset", "length"}  # of external data

WIRE_TYPES = {"int": 0, "bytes": 2, "string": 2, "message": 2, "float": 5}
# Number -> kind and name, as in onnx.proto; a kind in the plural may be repeated.
_FIELDS = {
    "ModelProto": {
        1: "int ir_version", 2: "string producer_name", 7: "message graph", 8: "messages opset_import",
        25: "messages functions",
    },
    "OperatorSetIdProto": {1: "string domain", 2: "int version"},
    "GraphProto": {
        1: "messages node", 2: "string name", 5: "messages initializer", 11: "messages input", 12: "messages output",
    },
    "FunctionProto": {
        1: "string name", 4: "strings input", 5: "strings output", 6: "strings attribute", 7: "messages node",
        9: "messages opset_import", 10: "string domain",
    },
    "NodeProto": {
        1: "strings input", 2: "strings output", 3: "string name", 4: "string op_type", 5: "messages attribute",
        7: "string domain",
    },
    "AttributeProto": {
        1: "string name", 2: "float f", 3: "int i", 4: "string s", 5: "message t", 8: "ints ints", 20: "int type",
        21: "string ref_attr_name",
    },
    "TensorProto": {
        1: "ints dims", 2: "int data_type", 5: "bytes int32_data", 8: "string name", 9: "bytes raw_data",
        13: "messages external_data", 14: "int data_location",
    },
    "StringStringEntryProto": {1: "string key", 2: "string value"},
    "ValueInfoProto": {1: "string name", 2: "message type"},
    "TypeProto": {1: "message tensor_type"},
    "TypeProto.Tensor": {1: "int elem_type", 2: "message shape"},
    "TensorShapeProto": {1: "messages dim"},
    "TensorShapeProto.Dimension": {1: "int dim_value", 2: "string dim_param"},
}  # fmt: skip
_TYPE_LEVELS = {
    "type": "TypeProto", "tensor_type": "TypeProto.Tensor", "shape": "TensorShapeProto",
    "dim": "TensorShapeProto.Dimension",
}  # fmt: skip

_WHOLE_NUMBER = re.compile(r"0|[1-9][0-9]{0,18}")
_ENDLESS_VARINT = re.compile(rb"[\x80-\xff]{10}")
_CONTINUED = bytes(range(0x80, 0x100))  # the bytes of a varint before its last


class Field(NamedTuple):
    """A field of a message: its name in onnx.proto, and how its values are written."""

    name: str
    kind: str  # of WIRE_TYPES
    is_repeated: bool


def _field(text: str) -> Field:
    kind, name = text.split()
    return Field(name, kind, False) if kind in WIRE_TYPES else Field(name, kind.removesuffix("s"), True)


def _by_tag(fields: dict[int, str]) -> dict[int, Field]:
    found = {number: _field(text) for number, text in fields.items()}
    return {number << 3 | WIRE_TYPES[field.kind]: field for number, field in found.items()}


MESSAGES = {name: _by_tag(fields) for name, fields in _FIELDS.items()}  # message -> tag on the wire -> field


def check_graph(content: bytes, where: str, data_file: str, data_bytes: int) -> None:
    """Raise BundleError, naming `where`, unless a serialized ONNX model is one that our graph builders can write.

    data_file, data_bytes: name and size of the one file that its external data may lie in.
    """
    _Graph(content, where, data_file, data_bytes).check_model()


class _Wire:
    """The fields of messages, as they lie in the content."""

    def __init__(self, content: bytes, where: str) -> None:
        self.content = content
        self.where = where
        self.fields_left = MOST_FIELDS

    def error(self, problem: str) -> BundleError:
        return BundleError(f"{self.where}: {problem}; vlmdeploy writes no such graph: copy or export the bundle again")

    def fields(self, message: str, span: Span) -> Iterator[tuple[str, Any]]:
        """Name and value of each field, one after the other: an int, a str, or where a message or bytes lie."""
        known, seen = MESSAGES[message], set()
        place, end = span
        while place < end:
            tag, place = self._varint(place, end)
            field = known.get(tag)
            if field is None or tag in seen or not self.fields_left:
                raise self.error(self._why_not(message, tag, field, place))
            self.fields_left -= 1
            if not field.is_repeated:
                seen.add(tag)
            if field.kind == "int":
                value, place = self._varint(place, end)
                yield field.name, value
                continue
            length, start = (4, place) if field.kind == "float" else self._varint(place, end)
            place = start + length
            if place > end:
                raise self.error(f"{message}.{field.name} is cut off: {length} bytes from byte {start} on")
            yield field.name, self._text(start, place) if field.kind == "string" else (start, place)

    def _why_not(self, message: str, tag: int, field: Field | None, place: int) -> str:
        if field is None:
            return f"{message} has field {tag >> 3} of wire type {tag & 7}, before byte {place}"
        return f"{message}.{field.name} is there twice" if self.fields_left else f"more than {MOST_FIELDS} fields"

    def _varint(self, place: int, end: int) -> tuple[int, int]:
        """The number from `place` on, below 2^64 and written as short as possible, and the place after it."""
        value = 0
        for position, byte in enumerate(self.content[place : min(end, place + 10)]):
            value |= (byte & 0x7F) << 7 * position
            if byte < 0x80:
                if value >> 64 or (position and not byte):
                    break
                return value, place + position + 1
        raise self.error(f"there is no whole number at byte {place}")

    def _text(self, start: int, end: int) -> str:
        try:
            return self.content[start:end].decode()
        except UnicodeDecodeError as problem:
            raise self.error(f"there is no text at byte {start}") from problem


class _Graph(_Wire):
    """One pass over a model, message by message."""

    def __init__(self, content: bytes, where: str, data_file: str, data_bytes: int) -> None:
        super().__init__(content, where)
        self.data_file = data_file
        self.data_bytes = data_bytes
        self.free_bytes = data_bytes  # of the data file, taken by no tensor yet

    def check_model(self) -> None:
        nodes: Counter[Operator] | None = None
        sizes: dict[Operator, int] = {}  # function -> number of nodes, with those of the functions that it calls
        for name, value in self.fields("ModelProto", (0, len(self.content))):
            if name == "graph":
                nodes = self.graph(value)
            elif name == "functions":
                operator, body = self.function(value)
                if operator in sizes:
                    raise self.error(f"function {_shown(operator)} is there twice")
                sizes[operator] = self.written_out(body, sizes)
            elif name == "opset_import":
                self.check_opset(value)
        if nodes is None:
            raise self.error("there is no graph in it")
        self.written_out(nodes, sizes)

    def graph(self, span: Span) -> Counter[Operator]:
        """How many nodes of each operator a graph has."""
        nodes: Counter[Operator] = Counter()
        for name, value in self.fields("GraphProto", span):
            if name == "node":
                nodes[self.operator(value)] += 1
            elif name == "initializer":
                self.check_tensor(value)
            elif name in ("input", "output"):
                self.check_type("ValueInfoProto", value)
        return nodes

    def function(self, span: Span) -> tuple[Operator, Counter[Operator]]:
        """The operator that a function defines, and how many nodes of each operator its body has."""
        nodes: Counter[Operator] = Counter()
        found = {"domain": "", "name": ""}
        for name, value in self.fields("FunctionProto", span):
            if name == "node":
                nodes[self.operator(value)] += 1
            elif name == "opset_import":
                self.check_opset(value)
            elif name in found:
                found[name] = value
        operator = found["domain"], found["name"]
        if operator[0] not in FUNCTION_DOMAINS or operator[1] not in OPERATORS[operator[0]]:
            raise self.error(f"it defines function {_shown(operator)}")
        return operator, nodes

    def written_out(self, nodes: Counter[Operator], sizes: dict[Operator, int]) -> int:
        """Number of nodes with functions written out. A function calls those before it, so never itself in a circle."""
        for operator in nodes:
            if operator[0] in FUNCTION_DOMAINS and operator not in sizes:
                raise self.error(f"{_shown(operator)} is called, and not defined before")
        total = sum(count * sizes.get(operator, 1) for operator, count in nodes.items())
        if total > MOST_NODES:
            raise self.error(f"it has {total} nodes with functions written out, at most {MOST_NODES} are run")
        return total

    def check_opset(self, span: Span) -> None:
        found = {"domain": "", "version": 0} | dict(self.fields("OperatorSetIdProto", span))
        if (found["domain"], found["version"]) not in OPSETS:
            raise self.error(f'it imports version {found["version"]} of domain "{found["domain"]:.80}"')

    def operator(self, span: Span) -> Operator:
        """The operator of a node, one of ours."""
        found = {"domain": "", "op_type": "", "name": ""}
        for name, value in self.fields("NodeProto", span):
            if name == "attribute":
                self.check_attribute(value)
            elif name in found:
                found[name] = value
        operator = found["domain"], found["op_type"]
        if operator[1] not in OPERATORS.get(operator[0], ()):
            raise self.error(f'node "{found["name"]:.80}" has operator {_shown(operator)}')
        return operator

    def check_attribute(self, span: Span) -> None:
        kind, held = 0, set()
        for name, value in self.fields("AttributeProto", span):
            if name == "t":
                self.check_tensor(value)
            if name == "type":
                kind = value
            elif name in VALUE_TYPES:
                held.add(VALUE_TYPES[name])
        if kind not in VALUE_TYPES.values() or not held <= {kind}:
            raise self.error(f"an attribute of type {kind} has values of types {sorted(held)}")

    def check_type(self, message: str, span: Span) -> None:
        """The type of an input or output, from this message of it inwards."""
        for name, value in self.fields(message, span):
            if name in _TYPE_LEVELS:
                self.check_type(_TYPE_LEVELS[name], value)
            elif name == "dim_value" and value >> 63:
                raise self.error(f"an input or output has size {_signed(value)}")

    def check_tensor(self, span: Span) -> None:
        """A tensor's values must be as many as its sizes say, and in one place."""
        dims, places = [], []
        found: dict[str, Any] = {"name": "", "data_type": 0, "data_location": 0}
        for name, value in self.fields("TensorProto", span):
            if name == "dims":
                dims.append(value)
            elif name == "external_data":
                places.append(value)
            else:
                found[name] = value
            if len(dims) > MOST_DIMS or len(places) > len(PLACE_KEYS):
                raise self.error(f"a tensor has more than {MOST_DIMS} sizes or {len(PLACE_KEYS)} entries of its place")
        tensor, bits = f'tensor "{found["name"]:.80}"', ELEMENT_BITS.get(found["data_type"])
        if bits is None or any(size >> 63 for size in dims):
            raise self.error(f"{tensor} has type {found['data_type']} and sizes {[_signed(size) for size in dims]}")
        expected = -(-prod(dims) * bits // 8)
        held = [self.num_bytes(name, found[name], bits) for name in ("raw_data", "int32_data") if name in found]
        if found["data_location"] == EXTERNAL and not held:
            self.check_place(tensor, places, expected)
        elif found["data_location"] or places or held != [expected]:
            raise self.error(
                f"{tensor} has {held or 'no'} bytes in the graph, {len(places)} entries of a place "
                f"elsewhere, expected {expected} bytes for sizes {dims}"
            )

    def num_bytes(self, name: str, span: Span, bits: int) -> int:
        """The bytes of a tensor's values: "raw_data", or "int32_data" for values of one byte each."""
        if name == "raw_data":
            return span[1] - span[0]
        values = self.content[slice(*span)]
        if bits != 8 or values[-1:] > b"\x7f" or _ENDLESS_VARINT.search(values):
            raise self.error(f"a tensor has int32_data other than values of one byte at byte {span[0]}")
        return len(values.translate(None, _CONTINUED))

    def check_place(self, tensor: str, entries: list[Span], expected: int) -> None:
        """External data: within the data file, of which all tensors together take no more than it has."""
        pairs = [{"key": "", "value": ""} | dict(self.fields("StringStringEntryProto", entry)) for entry in entries]
        place = {pair["key"]: pair["value"] for pair in pairs}
        if set(place) != PLACE_KEYS or place["location"] != self.data_file:
            raise self.error(f"{tensor} lies at {place}, expected a place in {self.data_file}")
        if not all(_WHOLE_NUMBER.fullmatch(place[key]) for key in ("offset", "length")):
            raise self.error(f"{tensor} lies at {place}, expected whole numbers")
        offset, length = int(place["offset"]), int(place["length"])
        self.free_bytes -= length
        if length != expected or offset + length > self.data_bytes or self.free_bytes < 0:
            raise self.error(
                f"{tensor} takes {length} bytes of {self.data_file} from {offset} on, expected {expected} for its "
                f"sizes, of {self.data_bytes} for all tensors together"
            )


def _shown(operator: Operator) -> str:
    domain, kind = operator
    return f'"{domain:.80}{"." if domain else ""}{kind:.80}"'


def _signed(size: int) -> int:
    return size - (1 << 64) if size >> 63 else size

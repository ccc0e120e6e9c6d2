"""Contract tests of the CPU's operators: every variant that this machine runs agrees with the textbook and, to the last
bit, with the others, whatever the shapes; a row's result does not depend on its neighbours; ONNX Runtime runs the
operators and, without them, their functions."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tests.reference import cached_attention, cpu_product
from tests.tiny_bundle import export
from tests.tiny_checkpoint import write_tiny_checkpoint
from vlmdeploy.export.graphs.ort_dialect import OrtGraph
from vlmdeploy.kernels import cpu
from vlmdeploy.runtime.backends.ort import import_onnxruntime, load_session
from vlmdeploy.runtime.session import open_bundle

Array = NDArray[Any]


@pytest.fixture(scope="module")
def native() -> ctypes.CDLL:
    """The compiled operators. This machine has a compiler, so their absence is a failure."""
    path = cpu.library()
    assert path is not None, "pip install -e . did not compile vlmdeploy/kernels/cpu"
    found = ctypes.CDLL(str(path))
    found.vlmdeploy_variant.restype = ctypes.c_char_p
    return found


def variants(native: ctypes.CDLL) -> list[str]:
    """Names of the variants that run here, the fastest first."""
    names: list[str] = []
    while (name := native.vlmdeploy_variant(len(names))) is not None:
        names.append(name.decode())
    return names


# What follows the product, in the order of the library's numbers.
THEN: dict[str, Callable[[Array], Array]] = {
    cpu.LINEAR: lambda y: y, cpu.GATED: cpu_product.gated, cpu.GELU: cpu_product.gelu,
}  # fmt: skip


@dataclass
class Case:
    """Inputs of one product; see the textbook."""

    x: Array
    codes: Array
    scales: Array
    zeros: Array | None
    bias: Array | None
    bits: int

    @property
    def outputs(self) -> int:
        return int(self.scales.shape[0])

    @property
    def group(self) -> int:
        return int(self.x.shape[1] // self.scales.shape[1])

    def expected(self, operator: str) -> Array:
        y = cpu_product.product(self.x, self.codes, self.scales, self.zeros, self.bias, self.bits)
        return THEN[operator](y)

    def run(self, native: ctypes.CDLL, variant: str, operator: str, rows: slice = slice(None)) -> Array:
        x = np.ascontiguousarray(self.x[rows])
        y = np.full((len(x), self.outputs // 2 if operator == cpu.GATED else self.outputs), np.nan, np.float32)
        pointers = [
            None if array is None else array.ctypes.data_as(ctypes.c_void_p)
            for array in (x, self.codes, self.scales, self.zeros, self.bias, y)
        ]
        sizes = [ctypes.c_int64(size) for size in (len(x), self.outputs, x.shape[1])]
        options = (self.bits, self.group, int(self.scales.dtype == np.float16), list(THEN).index(operator))
        assert native.vlmdeploy_product(variant.encode(), *sizes, *options, *pointers) == 1
        return y


def draw(random: np.random.Generator, rows: int, outputs: int, bits: int, group: int, groups: int) -> Case:
    """A product of these sizes with random values, some of them extreme."""
    x = (random.standard_normal((rows, groups * group)) * random.choice([1e-3, 1, 30])).astype(np.float32)
    x[0, :group] *= random.integers(2)  # a group of zeros
    codes = random.integers(0, 256, (outputs, groups * group * bits // 8), dtype=np.uint8)
    codes[:: random.integers(1, 4)] |= np.uint8(random.choice([0, 255]))  # sums of the largest codes
    scales = (0.02 * random.standard_normal((outputs, groups))).astype(np.float16 if random.integers(2) else np.float32)
    zeros = random.integers(0, 256, (outputs, -(-groups * bits // 8)), dtype=np.uint8) if random.integers(2) else None
    bias = random.standard_normal(outputs).astype(np.float32) if random.integers(2) else None
    return Case(x, codes, scales, zeros, bias, bits)


@pytest.mark.parametrize("group", cpu.GROUPS)
@pytest.mark.parametrize("bits", cpu.BITS)
@pytest.mark.parametrize("operator", THEN)
def test_every_variant_is_the_textbook_and_all_are_equal(
    native: ctypes.CDLL, bits: int, group: int, operator: str
) -> None:
    random = np.random.default_rng([bits, group, len(operator)])
    names = variants(native)
    assert names[-1] == "plain"
    assert names[0] == cpu.variant()
    for _ in range(12):
        outputs = 2 * int(random.integers(1, 40)) - (operator != cpu.GATED)
        case = draw(random, int(random.choice([1, 2, 3, 5, 7, 13])), outputs, bits, group, int(random.integers(1, 20)))
        plain, expected = case.run(native, "plain", operator), case.expected(operator)
        np.testing.assert_allclose(plain, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))
        for name in names:
            np.testing.assert_array_equal(case.run(native, name, operator), plain, err_msg=name)


def test_a_row_does_not_depend_on_its_neighbours(native: ctypes.CDLL) -> None:
    random = np.random.default_rng(5)
    case = draw(random, 29, 50, 4, 64, 7)
    for name in variants(native):
        together = case.run(native, name, cpu.GATED)
        for start, stop in ((0, 1), (28, 29), (3, 5), (6, 18)):
            np.testing.assert_array_equal(case.run(native, name, cpu.GATED, slice(start, stop)), together[start:stop])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rows", [1, 8])
def test_what_is_not_finite_stays_visible(native: ctypes.CDLL, bad: float, rows: int) -> None:
    """Rounding to int8 would turn it into a plausible number."""
    case = draw(np.random.default_rng(6), rows, 10, 4, 32, 5)
    case.x[0, 70] = bad
    for name in variants(native):
        y = case.run(native, name, cpu.GATED)
        assert np.isnan(y[0]).all(), name
        assert np.isfinite(y[1:]).all(), name


STORED = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8}  # in the order of the library's numbers


@dataclass
class Conversation:
    """Random queries, keys and values of a prompt, and a cache that `run` fills."""

    qkv: Array  # [rows, heads + 2 * kv_heads, width]
    kv_heads: int
    cos: Array
    sin: Array
    stored: str

    @classmethod
    def draw(cls, seed: int, rows: int, heads: int, kv_heads: int, width: int, stored: str) -> "Conversation":
        random = np.random.default_rng(seed)
        qkv = random.standard_normal((rows, heads + 2 * kv_heads, width)).astype(np.float32)
        qkv[:, heads : heads + kv_heads] *= 3  # sharp weights
        angles = random.standard_normal((rows + 3, width // 2)).astype(np.float32)
        return cls(qkv, kv_heads, np.cos(angles), np.sin(angles), stored)

    @property
    def heads(self) -> int:
        return int(self.qkv.shape[1] - 2 * self.kv_heads)

    def expected(self) -> Array:
        rows, width = len(self.qkv), self.qkv.shape[2]
        turned = cached_attention.rotated(self.qkv, self.cos[:rows], self.sin[:rows])
        keys, values = turned[:, self.heads : -self.kv_heads], self.qkv[:, -self.kv_heads :]
        if self.stored == "fp16":
            keys, values = keys.astype(np.float16), values.astype(np.float16)
        if self.stored == "int8":
            keys, values = cached_attention.rounded(keys), cached_attention.rounded(values)
            codes, scales = cpu_product.rounded(turned[:, : self.heads].reshape(-1, width).astype(np.float32), 32)
            turned[:, : self.heads] = (codes * scales[..., None]).reshape(rows, self.heads, width)
        return cached_attention.attention(turned[:, : self.heads], keys, values, 0, width**-0.5)

    def run(self, native: ctypes.CDLL, variant: str, cuts: list[int]) -> Array:
        """The rows in calls that end at `cuts`, with a cache of unused slots that hold NaN."""
        rows, _, width = self.qkv.shape
        capacity, kind = len(self.cos), STORED[self.stored]
        shape = (2, self.kv_heads, capacity, width)
        cache = np.full(shape, 99, kind) if kind is np.int8 else np.full(shape, np.nan, kind)
        scales = np.full((2, self.kv_heads, capacity, width // 32), np.nan, np.float16)
        y = np.full((rows, self.heads, width), np.nan, np.float32)
        for start, stop in zip([0, *cuts[:-1]], cuts, strict=True):
            part = np.ascontiguousarray(self.qkv[start:stop])
            out = np.empty((stop - start, self.heads, width), np.float32)
            sizes = [ctypes.c_int64(n) for n in (stop - start, self.heads, self.kv_heads, width, capacity, start)]
            arrays = (part, self.cos, self.sin, cache[0], cache[1], scales[0], scales[1], out)
            pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in arrays]
            number = list(STORED).index(self.stored)
            arguments = (*sizes, ctypes.c_float(width**-0.5), number, *pointers)
            assert native.vlmdeploy_attention(variant.encode(), *arguments) == 1
            y[start:stop] = out
        return y


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("sizes", [(1, 2, 2, 16), (70, 4, 2, 48), (200, 6, 1, 80), (150, 2, 2, 128)])
def test_attention_is_the_textbook_in_every_variant_and_cut(
    native: ctypes.CDLL, stored: str, sizes: tuple[int, int, int, int]
) -> None:
    """sizes: rows, heads, heads of keys and values, width, which for int8 is a multiple of 32."""
    rows, heads, kv_heads, width = sizes
    case = Conversation.draw(rows, rows, heads, kv_heads, width if stored != "int8" else -(-width // 32) * 32, stored)
    expected, plain = case.expected(), case.run(native, "plain", [rows])
    np.testing.assert_allclose(plain, expected, rtol=0, atol=2e-5 if stored == "fp32" else 2e-3)
    cuts = sorted({1, *(cut for cut in (5, 64, 65, 131) if cut < rows), rows})
    for name in variants(native):
        np.testing.assert_array_equal(case.run(native, name, cuts), plain, err_msg=name)
        np.testing.assert_array_equal(case.run(native, name, list(range(1, rows + 1))), plain, err_msg=name)


def graph(case: Case, operator: str, **changed: int) -> bytes:
    """A model of one operator, and the function of it that every bundle holds."""
    values = {"codes": case.codes.reshape(case.outputs, case.scales.shape[1], -1), "scales": case.scales}
    values |= {name: v for name, v in (("zeros", case.zeros), ("bias", case.bias)) if v is not None}
    inputs = ["x", "codes", "scales", *("zeros", "bias")]
    sizes = {"K": case.x.shape[1], "N": case.outputs, "bits": case.bits, "block_size": case.group}
    node = helper.make_node(
        operator, [name if name in values or name == "x" else "" for name in inputs], ["y"], domain=cpu.DOMAIN,
        accuracy_level=4, **(sizes | changed),
    )  # fmt: skip
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    tensors = [numpy_helper.from_array(value, name) for name, value in values.items()]
    body = helper.make_graph([node], "one", ends[:1], ends[1:], tensors)
    return model_of(body)


def model_of(body: onnx.GraphProto) -> bytes:
    """A graph with the functions that every graph holds."""
    opsets = [helper.make_opsetid(domain, version) for domain, version in OrtGraph.opsets.items()]
    model = helper.make_model(body, opset_imports=opsets, ir_version=11, functions=list(OrtGraph.functions))
    return bytes(model.SerializeToString())


def session(content: bytes, own_operators: bool) -> Any:
    return load_session(import_onnxruntime(), Path("one.onnx"), content, "cpu", 2, "ort", own_operators=own_operators)


@pytest.mark.parametrize("operator", THEN)
@pytest.mark.parametrize("bits", cpu.BITS)
def test_onnxruntime_runs_the_operator_and_its_function(operator: str, bits: int) -> None:
    random = np.random.default_rng(bits)
    for rows in (1, 300):
        case = draw(random, rows, 70, bits, 32, 6)
        case.scales = case.scales.astype(np.float16)
        expected = case.expected(operator)
        for own in (True, False):
            found = session(graph(case, operator), own).run(None, {"x": case.x.reshape(rows, 1, -1)})[0]
            assert found.shape == (rows, 1, expected.shape[1])
            np.testing.assert_allclose(found[:, 0], expected, rtol=0, atol=2e-5 * max(1, np.abs(expected).max()))


def test_the_operator_is_really_ours() -> None:
    """float32 scales: the function's MatMulNBits takes them too, but rounds elsewhere."""
    case = draw(np.random.default_rng(9), 4, 64, 4, 128, 8)
    case.bias = None
    mine, theirs = (session(graph(case, cpu.LINEAR), own).run(None, {"x": case.x})[0] for own in (True, False))
    assert (mine != theirs).any()
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


CHANGES: dict[str, Callable[[Case], dict[str, int]]] = {
    "more outputs than codes": lambda case: {"N": case.outputs + 2},
    "other group": lambda case: {"block_size": 64},
    "no divisor": lambda case: {"block_size": 128},
    "wide": lambda case: {"K": 2 * case.x.shape[1]},
    "3 bits": lambda case: {"bits": 3},
    "more bits": lambda case: {"bits": 8},
    "negative": lambda case: {"N": -2},
    "overflow": lambda case: {"N": 1 << 62},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_sizes_that_do_not_fit_are_an_error(change: Callable[[Case], dict[str, int]]) -> None:
    case = draw(np.random.default_rng(1), 2, 12, 4, 32, 6)
    case.zeros = case.bias = None
    with pytest.raises(Exception, match="vlmdeploy: "):
        session(graph(case, cpu.LINEAR, **change(case)), True).run(None, {"x": case.x})


def test_onnxruntime_runs_attention_of_all_rows_and_its_function() -> None:
    images, rows, heads, width = 2, 150, 3, 32
    qkv = np.random.default_rng(2).standard_normal((images, rows, 3 * heads * width)).astype(np.float32)
    node = helper.make_node(cpu.ENCODER_ATTENTION, ["qkv"], ["y"], domain=cpu.DOMAIN, num_heads=heads)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("qkv", "y")]
    content = model_of(helper.make_graph([node], "one", ends[:1], ends[1:]))
    parts = qkv.reshape(images, rows, 3, heads, width).transpose(2, 0, 1, 3, 4)
    for own in (True, False):
        found = session(content, own).run(None, {"qkv": qkv})[0].reshape(images, rows, heads, width)
        for image, row in ((0, 0), (0, 149), (1, 70)):
            query, keys, values = parts[0][image, row : row + 1], parts[1][image], parts[2][image]
            expected = cached_attention.attention(query, keys, values, rows - 1, width**-0.5)
            np.testing.assert_allclose(found[image, row : row + 1], expected, rtol=0, atol=1e-5)


def cached_attention_model(kv_heads: int, heads: int, width: int) -> bytes:
    """One CachedAttention over a float32 cache."""
    inputs = ["qkv", "past_key", "past_value", "seqlens_k", "total_sequence_length", "cos", "sin"]
    sizes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": kv_heads, "head_size": width, "scale": width**-0.5}
    outputs = ["y", "present_key", "present_value"]
    node = helper.make_node(cpu.ATTENTION, inputs, outputs, domain=cpu.DOMAIN, **sizes)
    types = {"seqlens_k": TensorProto.INT32, "total_sequence_length": TensorProto.INT32}
    values = [
        helper.make_tensor_value_info(name, types.get(name, TensorProto.FLOAT), None) for name in inputs + outputs
    ]
    return model_of(helper.make_graph([node], "one", values[:7], values[7:]))


def inputs_of(case: Conversation, filled: int) -> dict[str, Array]:
    """A whole prompt in one call, into an empty cache, of which it fills `filled` slots."""
    rows, _, width = case.qkv.shape
    empty = np.zeros((1, case.kv_heads, len(case.cos), width), np.float32)
    return {
        "qkv": case.qkv.reshape(rows, -1), "past_key": empty, "past_value": empty, "cos": case.cos, "sin": case.sin,
        "seqlens_k": np.array([filled - 1], np.int32), "total_sequence_length": np.array(filled, np.int32),
    }  # fmt: skip


def test_onnxruntime_runs_attention_over_a_cache_and_its_function() -> None:
    case = Conversation.draw(4, 90, 4, 2, 32, "fp32")
    content, expected = cached_attention_model(2, 4, 32), case.expected()
    ours, theirs = (session(content, own).run(None, inputs_of(case, 90)) for own in (True, False))
    for found in (ours, theirs):
        np.testing.assert_allclose(found[0].reshape(expected.shape), expected, rtol=0, atol=2e-5)
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        np.testing.assert_allclose(mine[:, :, :90], other[:, :, :90], rtol=0, atol=1e-6)


@pytest.mark.parametrize("filled", [0, 89, 94, -(2**31) + 1])
def test_rows_outside_the_cache_are_an_error(filled: int) -> None:
    case = Conversation.draw(4, 90, 4, 2, 32, "fp32")
    with pytest.raises(Exception, match="vlmdeploy: seqlens_k is beyond the KV cache"):
        session(cached_attention_model(2, 4, 32), True).run(None, inputs_of(case, filled))


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model all of whose linears are ours."""
    sizes: dict[str, Any] = {"hidden": 64, "heads": 2, "mlp": 96, "vision_width": 64, "vision_mlp": 96}
    return write_tiny_checkpoint(tmp_path_factory.mktemp("model") / "ckpt", "cogvlm2", **sizes)


@pytest.mark.parametrize("kv", ["fp32", "fp16", "int8"])
def test_a_prompt_has_the_same_logits_however_it_is_cut(ckpt: Path, tmp_path: Path, kv: str) -> None:
    export(ckpt, tmp_path / "bundle", "ort-int4", group=32, kv=kv)
    ids = np.random.default_rng(1).integers(3, 40, 30)
    found = []
    for chunk_rows in (256, 7, 1):
        opened = open_bundle(tmp_path / "bundle", threads=2)
        opened.backend.chunk_rows = chunk_rows
        found.append(opened.logits(ids))
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])


def test_functions_are_those_of_the_operators() -> None:
    functions = {function.name: function for function in OrtGraph.functions}
    assert set(functions) == set(cpu.OPERATORS)

"""A process that plays TensorRT for plugins written in Python: NVIDIA's own `tensorrt.plugin`, over stub libraries,
with a registry and size expressions of ours in place of those that only TensorRT's own library has.

`python -m tests.aot_host KERNELS EXPRESSION SM` registers the routed plugins with the compiled kernels of a folder for
one GPU, and prints the value of an expression over this module as JSON.
"""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vlmdeploy.errors import BackendError
from vlmdeploy.export.engines.plugin_ahead_of_time import register_routed_plugins
from vlmdeploy.runtime.backends.plugin_library import NAMESPACE, OPERATIONS
from vlmdeploy.runtime.backends.trt_library import TensorrtLibrary

trt: Any = importlib.import_module("tensorrt_bindings")
sys.modules["tensorrt"] = trt  # as it is called where TensorRT is installed
PARTITION, LINEAR = OPERATIONS
LIBRARY = TensorrtLibrary("tensorrt", trt, "11.4.0")
LINEAR_TYPES = ("HALF", "INT32", "INT32", "INT32", "INT8", "HALF", "FLOAT")
LINEAR_SIZES = (("t", 256), ("t",), ("t",), (1,), (2, 96, 128), (2, 2, 96), (2, 96))
ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "SUM": lambda a, b: a + b,
    "PROD": lambda a, b: a * b,
    "CEIL_DIV": lambda a, b: -(-a // b),
}


class Registry:
    """Plugin creators by (name, version, namespace)."""

    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        self.creators[creator.name, creator.plugin_version, namespace] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators.get((name, version, namespace))


REGISTRY = Registry()
trt.get_plugin_registry = lambda: REGISTRY


class Size(trt.IDimensionExpr):  # type: ignore[misc]
    """A size: a number, or something that is computed from the number of tokens."""

    compute: Callable[[int], int]
    is_known: bool

    def is_constant(self) -> bool:
        return self.is_known

    def get_constant_value(self) -> int:
        return self.compute(0)


def size(compute: Callable[[int], int], is_known: bool) -> Size:
    made = Size.__new__(Size)  # there is no object of TensorRT's behind it, so nothing to initialize
    made.compute, made.is_known = compute, is_known
    return made


class Builder:
    """Makes sizes as TensorRT's IExprBuilder does."""

    def constant(self, value: int) -> Size:
        return size(lambda tokens: value, True)

    def operation(self, kind: Any, first: Size, second: Size) -> Size:
        run = ARITHMETIC[str(kind).rpartition(".")[2]]
        known = first.is_known and second.is_known
        return size(lambda tokens: run(first.compute(tokens), second.compute(tokens)), known)


def tensor(sizes: tuple[int | str, ...], kind: str) -> Any:
    """A description; the word "t" is the number of tokens."""
    plugin = importlib.import_module("tensorrt.plugin")
    exprs = plugin.ShapeExprs(len(sizes))
    for axis, length in enumerate(sizes):
        known = size(lambda tokens: tokens, False) if length == "t" else Builder().constant(int(length))
        exprs[axis] = plugin.ShapeExpr(known)
    return plugin.TensorDesc(exprs, getattr(trt.DataType, kind))


def with_builder(run: Callable[[], Any]) -> Any:
    """Run as TensorRT calls: with something that makes sizes; what it raises as text."""
    expressions = importlib.import_module("tensorrt.plugin._tensor").SymIntExpr
    expressions._exprBuilder = Builder()
    try:
        return run()
    except (BackendError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        expressions._exprBuilder = None


def made(name: str, **fields: int) -> Any:
    """A plugin, as the parser asks for it: an attribute of a node comes as one int32."""
    values = [
        trt.PluginField(key, np.array([value], np.int32), trt.PluginFieldType.INT32) for key, value in fields.items()
    ]
    creator = REGISTRY.get_creator(name, "1", NAMESPACE)
    request = trt.QuickPluginCreationRequest.STRICT_AOT
    return creator.create_plugin(name, NAMESPACE, trt.PluginFieldCollection(values), trt.TensorRTPhase.BUILD, request)


def linear_inputs(changes: dict[int, tuple[tuple[int | str, ...], str]], activation: str = "HALF") -> list[Any]:
    rows = dict(enumerate(zip(LINEAR_SIZES, (activation, *LINEAR_TYPES[1:]), strict=True))) | changes
    return [tensor(*row) for row in rows.values()]


def types(name: str, *inputs: str, **fields: int) -> Any:
    """Output types that the plugin infers from input types."""
    ranks = [len(sizes) for sizes in LINEAR_SIZES] if name == LINEAR else [1]
    plugin = made(name, **fields)
    found = with_builder(lambda: plugin.get_output_data_types([getattr(trt.DataType, kind) for kind in inputs], ranks))
    return found if isinstance(found, str) else [str(kind).rpartition(".")[2] for kind in found]


def shapes(name: str, inputs: list[Any], *attributes: int) -> Any:
    """Output shapes for 7 tokens."""
    found = with_builder(lambda: definition(name).register_func(*inputs, *attributes))
    if isinstance(found, str):
        return found
    outputs = found if isinstance(found, tuple) else (found,)
    return [[axis._expr.compute(7) for axis in output.shape_expr] for output in outputs]


def tuned(activation: str, group_size: int) -> Any:
    """Types of all inputs and outputs, and tactics, that the plugin offers for timing."""
    inputs = linear_inputs({}, activation)
    found = with_builder(lambda: definition(LINEAR).autotune_func(*inputs, group_size, (inputs[0],)))
    combinations = [item for choice in found for item in choice._get_combinations()]
    return [([str(kind).rpartition(".")[2] for kind in item.types], item.tactics) for item in combinations]


def launched(name: str, inputs: list[Any], *arguments: Any) -> Any:
    """Symbol, PTX, grid, threads and shared memory, and integer arguments, of a launch for 1 token and for 33."""
    found = with_builder(lambda: _launch_text(definition(name).aot_impl_func(*inputs, *arguments)))
    return found


def _launch_text(launch: tuple[Any, ...]) -> Any:
    symbol, ptx, parameters, arguments = launch
    words = [getattr(parameters, key) for key in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "shared_mem")]
    numbers = [[expr._expr.compute(tokens) for expr in (*words, *arguments)] for tokens in (1, 33)]
    return symbol, ptx, numbers


def definition(name: str) -> Any:
    return importlib.import_module("tensorrt.plugin._lib").QDP_REGISTRY[f"{NAMESPACE}::{name}"]


def registered(architecture: int) -> str:
    """What registering once more says."""
    return str(with_builder(lambda: register_routed_plugins(LIBRARY, architecture, KERNELS)))


def decorated(decorator: str, function: Callable[..., Any]) -> str:
    """What `tensorrt.plugin` says to another function for RoutedLinear."""
    plugin = importlib.import_module("tensorrt.plugin")
    return str(with_builder(lambda: getattr(plugin, decorator)(f"{NAMESPACE}::{LINEAR}")(function)))


def known_to_registry() -> Any:
    return [[*key, [field.name for field in creator.field_names]] for key, creator in REGISTRY.creators.items()]


if __name__ == "__main__":
    KERNELS = Path(sys.argv[1])
    register_routed_plugins(LIBRARY, int(sys.argv[3]), KERNELS)
    print(json.dumps(eval(sys.argv[2])))

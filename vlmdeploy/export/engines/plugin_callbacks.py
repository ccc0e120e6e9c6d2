"""Callbacks of `tensorrt.plugin` for the routed int4 operators: their outputs, the kernels to time, and the launch of a
kernel. They run inside TensorRT, which logs their exceptions and fails the build.

plugin is the module `tensorrt.plugin`, trt the module `tensorrt`; this module imports neither.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmdeploy.errors import BackendError
from vlmdeploy.kernels.compiled_kernels import CompiledKernel, kernel_image
from vlmdeploy.kernels.packing import GROUP_SIZES

ACTIVATIONS = ("fp16", "bf16")
MOST_SHARED_BYTES = 48 * 1024  # more needs a function attribute that TensorRT does not set
THREADS_OF_A_WARP = 32
NUM_EXPERTS = 2

# Inputs of RoutedLinear besides x -> type, sizes; named sizes follow from x, codes and group_size.
INPUTS: dict[str, tuple[str, tuple[int | str, ...]]] = {
    "experts": ("INT32", ("tokens",)),
    "order": ("INT32", ("tokens",)),
    "language_count": ("INT32", (1,)),
    "codes": ("INT8", (NUM_EXPERTS, "out", "half of in")),
    "scales": ("HALF", (NUM_EXPERTS, "groups", "out")),
    "bias": ("FLOAT", (NUM_EXPERTS, "out")),
}


@dataclass(frozen=True)
class RoutedKernels:
    """The kernels of a GPU, from a folder. Raises BackendError unless one of each kind is small enough."""

    architecture: int
    kernels: list[CompiledKernel]
    folder: Path

    def __post_init__(self) -> None:
        self.partition()
        for activation in ACTIVATIONS:
            for group_size in GROUP_SIZES:
                self.linears(activation, group_size)

    def partition(self) -> CompiledKernel:
        """The partition kernel."""
        return self._of("partition", "", 0)[0]

    def linears(self, activation: str, group_size: int) -> list[CompiledKernel]:
        """The linear kernels: tactic n is the n-th, counted from 1; 0 is TensorRT's default."""
        return self._of("gemv", activation, group_size) + self._of("gemm", activation, group_size)

    def _of(self, kind: str, activation: str, group_size: int) -> list[CompiledKernel]:
        wanted = (kind, activation, group_size)
        found = [item for item in self.kernels if (item.kind, item.activation, item.group_size) == wanted]
        small = [item for item in found if item.shared_bytes <= MOST_SHARED_BYTES]
        if not small:
            which = f"{kind}, {activation or 'any'} activations, group {group_size}"
            raise BackendError(
                f"SM {self.architecture} has no kernel ({which}) of at most {MOST_SHARED_BYTES} bytes of shared memory"
            )
        return sorted(small, key=lambda item: item.block_rows)

    def launch(self, plugin: Any, kernel: CompiledKernel, grid: tuple[Any, Any], sizes: tuple[Any, ...]) -> Any:
        """What TensorRT embeds. grid: blocks across and down; sizes: integer arguments between inputs and outputs."""
        parameters = plugin.KernelLaunchParams()
        parameters.grid_x, parameters.grid_y = grid
        parameters.block_x = THREADS_OF_A_WARP * kernel.num_warps
        parameters.shared_mem = kernel.shared_bytes
        arguments = plugin.SymIntExprs(len(sizes))
        for index, size in enumerate(sizes):
            arguments[index] = plugin.SymInt32(size)
        return kernel.symbol, kernel_image(kernel, "ptx", self.folder).decode(), parameters, arguments


def register_partition(name: str, plugin: Any, trt: Any, kernels: RoutedKernels) -> None:
    """Register under a name such as "vlmdeploy::RoutedPartition"."""

    def describe(experts: Any) -> Any:
        _check_type(trt, "experts", experts, "INT32")
        _check_sizes("experts", experts, (None,))
        return experts.like(), plugin.from_shape_expr((1,), trt.DataType.INT32)

    def launch(experts: Any, outputs: Any, tactic: int) -> Any:
        return kernels.launch(plugin, kernels.partition(), (1, 1), (experts.shape_expr[0],))

    outputs = tuple[plugin.TensorDesc, plugin.TensorDesc]
    plugin.register(name)(_annotated(describe, experts=plugin.TensorDesc, returns=outputs))
    plugin.aot_impl(name)(_annotated(launch, experts=plugin.TensorDesc, returns=_launch_type(plugin)))


def register_linear(name: str, plugin: Any, trt: Any, kernels: RoutedKernels) -> None:
    """Register under a name such as "vlmdeploy::RoutedLinear"."""
    tensor = plugin.TensorDesc
    types = {"x": tensor, **dict.fromkeys(INPUTS, tensor), "group_size": int}

    def describe(
        x: Any, experts: Any, order: Any, language_count: Any, codes: Any, scales: Any, bias: Any, group_size: int
    ) -> Any:
        _check_linear(trt, x, (experts, order, language_count, codes, scales, bias), group_size)
        return plugin.from_shape_expr((x.shape_expr[0], codes.shape_expr[1]), x.dtype)

    def tune(
        x: Any, experts: Any, order: Any, language_count: Any, codes: Any, scales: Any, bias: Any, group_size: int,
        outputs: Any,
    ) -> Any:  # fmt: skip
        activation = _activation(trt, x)
        io_types = f"{activation.upper()}, INT32, INT32, INT32, INT8, FP16, FP32, {activation.upper()}"
        tactics = range(1, len(kernels.linears(activation, group_size)) + 1)
        return [plugin.AutoTuneCombination(io_types, "LINEAR", list(tactics))]

    def launch(
        x: Any, experts: Any, order: Any, language_count: Any, codes: Any, scales: Any, bias: Any, group_size: int,
        outputs: Any, tactic: int,
    ) -> Any:  # fmt: skip
        choices = kernels.linears(_activation(trt, x), group_size)
        if not 1 <= tactic <= len(choices):
            raise BackendError(f"tactic is {tactic}, expected 1 to {len(choices)}")
        kernel = choices[tactic - 1]
        tokens, out, groups = x.shape_expr[0], codes.shape_expr[1], scales.shape_expr[1]
        # Each expert's rows begin a new block, so one block more.
        down = tokens if kernel.kind == "gemv" else plugin.cdiv(tokens, kernel.block_rows) + 1
        return kernels.launch(plugin, kernel, (plugin.cdiv(out, kernel.block_columns), down), (tokens, out, groups))

    plugin.register(name)(_annotated(describe, **types, returns=tensor))
    plugin.autotune(name)(_annotated(tune, **types, returns=list[plugin.AutoTuneCombination]))
    plugin.aot_impl(name)(_annotated(launch, **types, returns=_launch_type(plugin)))


def _launch_type(plugin: Any) -> Any:
    return tuple[str, str, plugin.KernelLaunchParams, plugin.SymIntExprs]


def _annotated(function: Callable[..., Any], returns: Any, **types: Any) -> Callable[..., Any]:
    """Set the annotations from which `tensorrt.plugin` reads a plugin's arguments; the classes exist only now."""
    function.__annotations__ = {**types, "return": returns}
    return function


def _check_linear(trt: Any, x: Any, others: tuple[Any, ...], group_size: int) -> None:
    """Check types and shapes of the inputs against group_size and each other."""
    if group_size not in GROUP_SIZES:
        raise BackendError(f"group_size is {group_size}, expected {', '.join(map(str, GROUP_SIZES))}")
    _activation(trt, x)
    _check_sizes("x", x, (None, None))
    in_width = _size(x, 1)
    if in_width is not None and (in_width < group_size or in_width % group_size):
        raise BackendError(f"in of x is {in_width}, expected a multiple of group_size {group_size}")
    codes = others[list(INPUTS).index("codes")]
    known = {
        "tokens": _size(x, 0), "out": _size(codes, 1), "groups": in_width and in_width // group_size,
        "half of in": in_width and in_width // 2,
    }  # fmt: skip
    for (name, (wanted, sizes)), tensor in zip(INPUTS.items(), others, strict=True):
        _check_type(trt, name, tensor, wanted)
        _check_sizes(name, tensor, tuple(known[size] if isinstance(size, str) else size for size in sizes))


def _activation(trt: Any, x: Any) -> str:
    names = {trt.DataType.HALF: "fp16", trt.DataType.BF16: "bf16"}
    if x.dtype not in names:
        raise BackendError(f"x is {_type_name(x)}, expected HALF or BF16")
    return names[x.dtype]


def _check_type(trt: Any, name: str, tensor: Any, wanted: str) -> None:
    if tensor.dtype != trt.DataType.__members__[wanted]:
        raise BackendError(f"{name} is {_type_name(tensor)}, expected {wanted}")


def _type_name(tensor: Any) -> str:
    return str(tensor.dtype).rpartition(".")[2]


def _check_sizes(name: str, tensor: Any, wanted: tuple[int | None, ...]) -> None:
    """wanted None: any size."""
    found = [_size(tensor, axis) for axis in range(len(tensor.shape_expr))]
    fits = len(found) == len(wanted)
    if not fits or any(None not in pair and pair[0] != pair[1] for pair in zip(found, wanted, strict=True)):
        raise BackendError(f"{name} is {_shape_text(found)}, expected {_shape_text(wanted)}")


def _shape_text(sizes: Any) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in sizes)}]"


def _size(tensor: Any, axis: int) -> int | None:
    """The size of a dimension, if known while the engine is built."""
    sizes = tensor.shape_expr
    if axis >= len(sizes) or sizes[axis].is_fake or not sizes[axis].is_constant:
        return None
    return int(sizes[axis].constant_value())

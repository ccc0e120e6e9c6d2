"""The routed kernels in PyTorch: `partition` once per pass, then `routed_linear` for every linear of every layer.

Triton compiles them for the current GPU on first use; with TRITON_INTERPRET=1, for tests, it interprets them on CPU
tensors. No gradients. Nothing here waits for the GPU.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmdeploy.errors import BackendError
from vlmdeploy.kernels.block_shapes import BlockShapes, shapes_of
from vlmdeploy.kernels.packing import EXPERTS, PackedExperts

ACTIVATIONS = (torch.float16, torch.bfloat16)
INTERPRETED_AS = 87  # the interpreter uses these block shapes; any would work
ALIGNMENT = 16  # bytes; the kernels read several values at once


@dataclass(frozen=True)
class Route:
    """Which expert each row uses, int32 on the device: experts [tokens]; order [tokens], the rows of expert 0, then the
    others; language_count [1], the number of rows of expert 0."""

    experts: Tensor
    order: Tensor
    language_count: Tensor


@dataclass(frozen=True)
class RoutedWeights:
    """Packed weights on a device: codes uint8 [2, out, in / 2], scales float16 [2, groups, out], bias float32 [2, out].

    Each starts at a multiple of 16 bytes, as separate tensors do. Raises BackendError for other types."""

    codes: Tensor
    scales: Tensor
    bias: Tensor
    group_size: int

    def __post_init__(self) -> None:
        found = tuple(tensor.dtype for tensor in (self.codes, self.scales, self.bias))
        expected = (torch.uint8, torch.float16, torch.float32)
        if found != expected:
            raise BackendError(f"codes, scales and bias are {found}, expected {expected}: was the model cast?")

    @classmethod
    def on(cls, device: torch.device | str, packed: PackedExperts) -> "RoutedWeights":
        """Copy packed weights to a device."""
        arrays = (packed.codes, packed.scales, packed.bias)
        codes, scales, bias = (torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays)
        return cls(codes, scales, bias, packed.group_size)

    @property
    def in_width(self) -> int:
        """Inputs of the linear."""
        return self.codes.shape[2] * 2

    @property
    def out_width(self) -> int:
        """Outputs of the linear."""
        return self.codes.shape[1]


def partition(experts: Tensor | NDArray[np.integer], device: torch.device | str) -> Route:
    """The route of a pass.

    experts: per row an id on the host (0 language, 1 vision), or a bool mask of the vision rows on any device. Raises
    BackendError for other ids, and if the kernels cannot run.
    """
    device = torch.device(device)
    kernels = usable_kernels(device)
    ids = _checked_ids(experts).flatten().to(device, torch.int32).contiguous()
    order, count = torch.empty_like(ids), torch.zeros(1, dtype=torch.int32, device=device)
    if len(ids):
        with current(ids.device):
            kernels.routed_partition[(1,)](ids, len(ids), order, count, BLOCK=kernels.PARTITION_BLOCK)
    return Route(ids, order, count)


def _checked_ids(experts: Tensor | NDArray[np.integer]) -> Tensor:
    """Ids or mask as a tensor. Raises BackendError for an unknown id."""
    ids = experts if isinstance(experts, Tensor) else torch.from_numpy(np.asarray(experts))
    if ids.dtype == torch.bool:
        return ids
    if ids.is_floating_point() or ids.is_complex():
        raise BackendError(f"expert ids are {ids.dtype}, expected integers or a bool mask of the vision rows")
    if ids.device.type != "cpu":  # reading their values would wait for the GPU
        raise BackendError(
            f"expert ids are on {ids.device}; expected them on the host, or a bool mask of the vision rows"
        )
    lowest, highest = (int(ids.min()), int(ids.max())) if ids.numel() else (0, 0)
    if lowest < 0 or highest >= len(EXPERTS):
        raise BackendError(f"expert ids are {lowest}..{highest}, expected 0 (language) or 1 (vision)")
    return ids


def routed_linear(x: Tensor, route: Route, weights: RoutedWeights) -> Tensor:
    """Each row of x times the weights of its expert, plus the bias: [..., in] -> [..., out] in the type of x.

    x: float16 or bfloat16, with the rows of the route, on the device of the weights. Sums are float32, rounded once.
    Raises BackendError.
    """
    if x.ndim == 0 or x.shape[-1] != weights.in_width:
        raise BackendError(f"x is {list(x.shape)}, expected [..., {weights.in_width}] for these weights")
    rows = x.reshape(-1, weights.in_width).contiguous()
    _check_inputs(rows, route, weights)
    y = torch.empty((len(rows), weights.out_width), dtype=x.dtype, device=x.device)
    if len(rows):
        with current(rows.device):
            launch(rows, route, weights, y, shapes_for(x.device))
    return y.view(*x.shape[:-1], weights.out_width)


def _check_inputs(rows: Tensor, route: Route, weights: RoutedWeights) -> None:
    if rows.dtype not in ACTIVATIONS:
        raise BackendError(f"x is {rows.dtype}, expected torch.float16 or torch.bfloat16")
    if len(rows) != len(route.experts):
        raise BackendError(f"x has {len(rows)} rows, the route {len(route.experts)}")
    devices = [str(tensor.device) for tensor in (rows, route.experts, weights.codes)]
    if len(set(devices)) > 1:
        raise BackendError(
            f"x is on {devices[0]}, the route on {devices[1]}, the weights on {devices[2]}; expected one"
        )
    if rows.requires_grad and torch.is_grad_enabled():
        raise BackendError("the routed kernels have no gradient: call them under torch.no_grad()")
    if rows.data_ptr() % ALIGNMENT:
        raise BackendError(f"x does not start at a multiple of {ALIGNMENT} bytes: clone it")


def launch(rows: Tensor, route: Route, weights: RoutedWeights, y: Tensor, shapes: BlockShapes) -> None:
    """Write y for one or more rows, with the kernel that `shapes` selects, on the current device.

    Does not check its arguments; `routed_linear` does.
    """
    kernels = usable_kernels(rows.device)
    tokens, (_, groups, out_width) = len(rows), weights.scales.shape
    kind, shape = shapes.of(tokens)
    columns = -(-out_width // shape.block_columns)
    inputs = (rows, route.experts, route.order, route.language_count, weights.codes, weights.scales, weights.bias)
    arguments = (*inputs, tokens, out_width, groups, y)
    constants = {"GROUP_SIZE": weights.group_size, "BLOCK_COLUMNS": shape.block_columns, **shape.options()}
    if kind == "gemv":
        kernels.routed_gemv[(columns, tokens)](*arguments, STAGES=shape.num_stages, **constants)
    else:
        tiles = -(-tokens // shape.block_rows) + 1
        kernels.routed_gemm[(columns, tiles)](*arguments, BLOCK_ROWS=shape.block_rows, **constants)


def usable_kernels(device: torch.device) -> ModuleType:
    """The module of Triton kernels. Raises BackendError without Triton, or if the device cannot run them."""
    try:
        from vlmdeploy.kernels import routed
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise BackendError("the routed kernels need Triton: pip install 'vlmdeploy[kernels]'") from error
    if device.type != "cuda" and not routed.INTERPRETED.value:
        raise BackendError(f"the routed kernels need a CUDA device, not {device} (or TRITON_INTERPRET=1, to test them)")
    return routed


def current(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one: Triton launches there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def shapes_for(device: torch.device) -> BlockShapes:
    """The block shapes of a device. Raises BackendError for a GPU that is not in the table."""
    if device.type != "cuda":
        return shapes_of(INTERPRETED_AS)
    major, minor = torch.cuda.get_device_capability(device)
    return shapes_of(10 * major + minor)

"""Decoder layers that keep their experts as int4 codes and launch one routed kernel per linear for the rows of both.

No float copy of the decoder linears exists. Everything else is as in `DecoderLayer`; the kernels are in
`vlmdeploy.kernels`.
"""

import numpy as np
import torch
from torch import Tensor, nn

from vlmdeploy.errors import ConfigError, QuantizationError
from vlmdeploy.kernels.launch import (
    ACTIVATIONS,
    Route,
    RoutedWeights,
    partition,
    routed_linear,
    shapes_for,
    usable_kernels,
)
from vlmdeploy.kernels.packing import BITS, EXPERTS, PackedExperts, check_layout, pack_codes, pack_scales
from vlmdeploy.model.checkpoint import Checkpoint
from vlmdeploy.model.decoder import DecoderLayer, Step
from vlmdeploy.model.vlm import VisionLanguageModel
from vlmdeploy.quant.conversions import widen
from vlmdeploy.spec.decoder import DecoderSpec
from vlmdeploy.spec.matrices import DECODER_NAMES


class RoutedLinear(nn.Module):
    """One linear of both experts as codes, scales and bias."""

    codes: Tensor
    scales: Tensor
    bias: Tensor

    def __init__(self, weights: RoutedWeights) -> None:
        super().__init__()
        self.group_size = weights.group_size
        for name in ("codes", "scales", "bias"):
            self.register_buffer(name, getattr(weights, name))

    def forward(self, x: Tensor, route: Route) -> Tensor:
        """[..., in] -> [..., out], each row by its expert."""
        return routed_linear(x, route, RoutedWeights(self.codes, self.scales, self.bias, self.group_size))


class PassRoutes:
    """The route of the current pass, made by its first layer and shared by the others."""

    def __init__(self) -> None:
        self._step: Step | None = None
        self._route: Route | None = None

    def of(self, step: Step, x: Tensor) -> Route:
        """The route of a pass with rows x [batch, seq, width]."""
        if self._route is None or self._step is not step:
            mask = step.vision_mask
            vision = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
            self._step, self._route = step, partition(vision, x.device)
        return self._route


class RoutedLayer(DecoderLayer):
    """A decoder layer without float experts; `load_codes` fills `linears`."""

    def __init__(self, spec: DecoderSpec, routes: PassRoutes) -> None:
        super().__init__(spec)
        for name in self.expert_names:
            delattr(self, name)
        self.linears = nn.ModuleDict()
        self.routes = routes

    def routed(self, name: str, x: Tensor, step: Step) -> Tensor:
        """Multiply all rows in one launch, each by its expert."""
        return self.linears[name](x, self.routes.of(step, x))


def check_routable(checkpoint: Checkpoint, dtype: torch.dtype, device: str) -> None:
    """Raise an error, before loading anything, if kernels cannot run the checkpoint's decoder linears."""
    folder = checkpoint.folder
    if dtype not in ACTIVATIONS:
        raise ConfigError(f"dtype {dtype}: the routed kernels take float16 or bfloat16")
    if not checkpoint.is_quantized:
        raise QuantizationError(f"{folder}: no linear is stored as codes, so there is nothing for kernels to run")
    if tuple(expert.name for expert in checkpoint.spec.decoder.experts) != EXPERTS:
        raise QuantizationError(f"{folder}: the routed kernels need the experts {' and '.join(EXPERTS)}")
    found = [problem for linear in _linears(checkpoint) if (problem := _unfit(checkpoint, *linear))]
    if found:
        raise QuantizationError(f"{folder}: {found[0]} ({len(found)} such linears)")
    usable_kernels(torch.device(device))
    shapes_for(torch.device(device))


def _linears(checkpoint: Checkpoint) -> list[tuple[int, str]]:
    return [(layer, name) for layer in range(checkpoint.spec.decoder.num_layers) for name in DECODER_NAMES]


def _target(layer: int, expert: str, name: str, part: str = "weight") -> str:
    return f"decoder.layers.{layer}.{expert}.{name}.{part}"


def _unfit(checkpoint: Checkpoint, layer: int, name: str) -> str:
    """Why the kernels cannot run a linear; "" if they can."""
    sizes = set()
    for expert in EXPERTS:
        target = _target(layer, expert, name)
        grid = checkpoint.stored_grid(target)
        if grid is None:
            return f"{target} is not stored as codes of one grid"
        try:
            bits = max(grid.bits, BITS)  # narrower codes are widened without changing a value
            check_layout(target, checkpoint.shape(target)[1], grid.group_size, bits, symmetric=True)
        except QuantizationError as error:
            return str(error)
        sizes.add(grid.group_size)
    if len(sizes) > 1:
        return f"decoder.layers.{layer}: the experts' {name} have groups of {' and '.join(map(str, sorted(sizes)))}"
    return ""


def replace_layers(model: VisionLanguageModel) -> None:
    """Replace a meta model's layers by ones without float experts, and disable gradients."""
    routes, decoder = PassRoutes(), model.decoder
    dtype = model.embedding.weight.dtype
    decoder.layers = nn.ModuleList(RoutedLayer(decoder.spec, routes).to(dtype) for _ in decoder.layers)
    model.requires_grad_(False)


def load_codes(model: VisionLanguageModel, checkpoint: Checkpoint, device: str) -> None:
    """Fill the layers that `replace_layers` made, one linear in memory at a time."""
    for layer, name in _linears(checkpoint):
        packed = packed_experts(checkpoint, layer, name)
        linears: nn.ModuleDict = model.decoder.layers[layer].linears  # type: ignore[assignment]
        linears[name] = RoutedLinear(RoutedWeights.on(device, packed))


def packed_experts(checkpoint: Checkpoint, layer: int, name: str) -> PackedExperts:
    """Pack one decoder linear of both experts for the kernels. Raises QuantizationError for asymmetric codes."""
    codes, scales, biases, group_size = [], [], [], 0
    for expert in EXPERTS:
        target, bias = _target(layer, expert, name), _target(layer, expert, name, "bias")
        rows, width = checkpoint.shape(target)
        held = checkpoint.quantized_rows(target, 0, rows)
        stored = widen(held, max(held.grid.bits, BITS))
        group_size = stored.grid.group_size
        check_layout(f"{checkpoint.folder}: {target}", width, group_size, stored.grid.bits, stored.grid.symmetric)
        codes.append(pack_codes(stored.codes, group_size))
        scales.append(pack_scales(stored.scales))
        has_bias = bias in checkpoint
        biases.append(checkpoint.parameter(bias).numpy() if has_bias else np.zeros(rows, np.float32))
    return PackedExperts(np.stack(codes), np.stack(scales), np.stack(biases), group_size)

"""Load a checkpoint as a PyTorch model, and save a model as a checkpoint."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vlmdeploy.errors import ConfigError
from vlmdeploy.families import family_named
from vlmdeploy.model.checkpoint import Checkpoint
from vlmdeploy.model.decoder import default_inv_freq
from vlmdeploy.model.kernel_layer import check_routable, load_codes, replace_layers
from vlmdeploy.model.shards import SINGLE_NAME
from vlmdeploy.model.tensor_file import save_tensors
from vlmdeploy.model.vlm import VisionLanguageModel
from vlmdeploy.spec.model import ModelSpec
from vlmdeploy.spec.weight_rules import WeightRule

DTYPE_NAMES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_model(
    folder: str | Path,
    dtype: str | torch.dtype = "float32",
    device: str = "cpu",
    quantized: Literal["dequantize", "kernel"] = "dequantize",
    follow_links: bool = False,
) -> VisionLanguageModel:
    """Load the PyTorch reference of a checkpoint, in eval mode. `dtype` is float32, float16 or bfloat16.

    quantized: how to load the decoder's linears of a quantized checkpoint. "dequantize" makes them floats, "kernel"
    keeps int4 codes on a CUDA device and runs the routed kernels, without gradients. follow_links: see
    `Checkpoint`.

    Raises ConfigError or WeightsError, naming the file and the key or tensor; for kernels also QuantizationError,
    naming an unsupported linear, and BackendError if they cannot run.
    """
    if isinstance(dtype, str):
        if dtype not in DTYPE_NAMES:
            raise ConfigError(f"dtype {dtype!r}: expected one of {', '.join(DTYPE_NAMES)}")
        dtype = DTYPE_NAMES[dtype]
    if quantized not in ("dequantize", "kernel"):
        raise ConfigError(f'quantized {quantized!r}: expected "dequantize" or "kernel"')
    checkpoint = Checkpoint(folder, follow_links)
    if quantized == "kernel":
        check_routable(checkpoint, dtype, device)
    with torch.device("meta"):
        model = VisionLanguageModel(checkpoint.spec).to(dtype)
        if quantized == "kernel":
            replace_layers(model)
    materialize(model, checkpoint.spec, device)
    for target in model.state_dict():
        if target in checkpoint:
            fill_parameter(model, target, checkpoint.parameter(target))
    if quantized == "kernel":
        load_codes(model, checkpoint, device)
    return model.eval()


def materialize(model: VisionLanguageModel, spec: ModelSpec, device: str) -> VisionLanguageModel:
    """Allocate a meta model: uninitialized weights, and the default rotary frequencies in float32."""
    model = model.to_empty(device=device)
    model.decoder.inv_freq = default_inv_freq(spec.decoder).to(device)
    return model


def fill_parameter(model: torch.nn.Module, target: str, values: Tensor) -> None:
    """Copy values into a parameter or buffer."""
    owner, _, name = target.rpartition(".")
    parameter: Tensor = getattr(model.get_submodule(owner), name)
    with torch.no_grad():
        parameter.copy_(values)


def save_checkpoint(model: VisionLanguageModel, config: dict[str, Any], folder: Path, dtype: torch.dtype) -> None:
    """Write config.json and model.safetensors, with the family's published tensor names, into an existing folder.

    Rotary frequencies stay float32: rounding them to `dtype` would change the answers.
    """
    family = family_named(model.spec.family)
    tensors: dict[str, Tensor] = {}
    state = model.state_dict()
    for rule in family.weights(model.spec):
        values = state[rule.target] if rule.op == "same" else state[rule.target].to(dtype)
        for source, first in zip(rule.sources, _offsets(rule), strict=True):
            part = values[first : first + source.shape[0]] if rule.op == "stack" else values
            tensors[source.name] = part.reshape(source.shape).contiguous().clone()
    save_tensors(tensors, folder / SINGLE_NAME)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _offsets(rule: WeightRule) -> list[int]:
    """The first row of each source in a stacked parameter; 0 for other operations."""
    if rule.op != "stack":
        return [0] * len(rule.sources)
    return [sum(source.shape[0] for source in rule.sources[:index]) for index in range(len(rule.sources))]

"""What the PyTorch reference computes on the way, under the names of the golden vectors (tests/golden/README.md)."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vlmdeploy.model.batch import derive_layout
from vlmdeploy.model.decoder import LayerCache, Step
from vlmdeploy.model.vlm import VisionLanguageModel

Array = NDArray[Any]
Trace = dict[str, Array]
Hook = Callable[..., None]


def trace_model(model: VisionLanguageModel, ids: Array, pixels: Array | None, num_new: int) -> Trace:
    """One prompt, ids [1, seq], through the public calls, everything else read by hooks; results have a batch axis."""
    input_ids, images = torch.from_numpy(ids), None if pixels is None else torch.from_numpy(pixels)
    layout = derive_layout(model.spec, input_ids, images, None, None, None)
    return {
        "position_ids": layout.position_ids.numpy(),
        "vision_expert_mask": layout.vision_mask.numpy(),
        **_prompt_pass(model, input_ids, images),
        **_greedy(model, input_ids, images, num_new),
    }


def _prompt_pass(model: VisionLanguageModel, ids: Tensor, images: Tensor | None) -> Trace:
    """Hidden states, KV cache and logits of all positions."""
    trace: Trace = {}
    before, after = _points(model)
    hooks = [module.register_forward_pre_hook(_save(trace, name)) for name, module in before.items()]
    hooks += [module.register_forward_hook(_save(trace, name)) for name, module in after.items()]
    hooks += [layer.register_forward_hook(_save_cache(trace, i)) for i, layer in enumerate(model.decoder.layers)]
    with torch.no_grad():
        logits: Tensor = model(ids, images)
    for hook in hooks:
        hook.remove()
    return trace | {"logits": logits.numpy()}


def _points(model: VisionLanguageModel) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Where each key is read: modules whose input it is, and modules whose output it is."""
    steps = dict(model.connector.named_children())
    after: dict[str, nn.Module] = {
        "vit.features": model.vision,
        "connector.out": steps["mlp"],
        "image_features": model.connector,
        "llm.final_norm": model.decoder,
        **{f"vit.layer.{index}": layer for index, layer in enumerate(model.vision.layers)},
        **{f"llm.layer.{index}": layer for index, layer in enumerate(model.decoder.layers)},
    }
    if "conv" in steps:
        after["conv.out"] = steps["conv"]
    return {"vit.patch_embed": model.vision.layers[0], "inputs_embeds": model.decoder.layers[0]}, after


def _save(trace: Trace, name: str) -> Hook:
    def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor | None = None) -> None:
        trace[name] = (arguments[0] if output is None else output).float().numpy()

    return hook


def _save_cache(trace: Trace, index: int) -> Hook:
    def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        layer: LayerCache = arguments[2]
        assert layer.key is not None and layer.value is not None, "a layer fills its cache"
        trace[f"k_cache.{index}"], trace[f"v_cache.{index}"] = layer.key.numpy(), layer.value.numpy()

    return hook


def _greedy(model: VisionLanguageModel, ids: Tensor, images: Tensor | None, num_new: int) -> Trace:
    """Greedy ids, the logits that chose them, and the position that each token fed back was rotated for."""
    logits: list[Tensor] = []
    steps: list[Step] = []
    hooks = [
        model.lm_head.register_forward_hook(lambda module, arguments, output: logits.append(output)),
        model.decoder.layers[0].register_forward_pre_hook(lambda module, arguments: steps.append(arguments[1])),
    ]
    new_ids = model.generate(ids, images, max_new_tokens=num_new)
    for hook in hooks:
        hook.remove()
    positions = [_position(step, model.decoder.inv_freq) for step in steps[1:]]
    return {
        "generated_ids": new_ids.numpy(),
        "step_logits": torch.stack(logits, 1).float().numpy(),
        "decode_position_ids": np.stack(positions, 1) if positions else np.zeros((len(ids), 0), np.int64),
    }


def _position(step: Step, inv_freq: Tensor) -> Array:
    """The position ids [batch] behind the angles of a decode step, read from the slowest frequency."""
    angle = torch.atan2(step.sin[:, 0, -1], step.cos[:, 0, -1])
    return torch.round(angle / inv_freq[-1]).long().numpy()

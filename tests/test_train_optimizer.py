"""Reference tests: the optimizer against numpy versions of Muon and AdamW, and its state."""

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tests.comparison import assert_close
from vlmdeploy.train.config import OptimizerConfig
from vlmdeploy.train.optimizer import ADAM_EPS, NEWTON_SCHULZ, FlatOptimizer, orthogonal

Array = NDArray[np.float64]
LR = 0.01
CONFIG = OptimizerConfig(weight_decay=0.1, beta1=0.8, beta2=0.9, momentum=0.7, clip=1e9)
FP32 = 1e-6  # a few float32 operations on values below 3
BF16_PRODUCTS = 0.05  # directions with entries below 1, from products in bfloat16 with 8 bits


def build_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"wide": nn.Linear(6, 12), "tall": nn.Linear(12, 6, bias=False)})


def build_optimizer(module: nn.Module, config: OptimizerConfig = CONFIG) -> FlatOptimizer:
    roles = {"wide.weight": (0.5, True, 2), "wide.bias": (0.5, False, 0), "tall.weight": (1.0, True, 1)}
    return FlatOptimizer(module, roles, config)


def train(module: nn.Module, optimizer: FlatOptimizer, steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(5, 6, generator=generator)
        module.get_submodule("tall")(module.get_submodule("wide")(x).tanh()).square().sum().backward()
        optimizer.step(LR)


def newton_schulz(matrix: Array) -> Array:
    """Quintic iterations on the smaller side, in float64."""
    if matrix.shape[0] < matrix.shape[1]:
        return newton_schulz(matrix.T).T
    a, b, c = NEWTON_SCHULZ
    x = matrix / (np.linalg.norm(matrix) * 1.01)
    for _ in range(5):
        gram = x.T @ x
        x = a * x + x @ (b * gram + c * gram @ gram)
    return x


def muon_change(values: Array, grads: Array, lr_scale: float, blocks: int) -> Array:
    """What the first step subtracts: Nesterov momentum, each block made orthogonal and scaled to an Adam-like size."""
    momentum = (1 - CONFIG.momentum) * grads
    mixed = (1 - CONFIG.momentum) * grads + CONFIG.momentum * momentum
    directions = [newton_schulz(block) * 0.2 * max(block.shape) ** 0.5 for block in np.split(mixed, blocks)]
    return LR * lr_scale * (np.concatenate(directions) + CONFIG.weight_decay * values)


def test_first_step_equals_the_textbook() -> None:
    module = build_module()
    optimizer = build_optimizer(module)
    optimizer.grads.normal_(generator=torch.Generator().manual_seed(1))
    before, grads = (
        {member.name: member.view(flat).double().numpy().copy() for member in optimizer.members}
        for flat in (optimizer.values, optimizer.grads)
    )
    optimizer.step(LR)
    after = {name: value.detach().double().numpy() for name, value in module.named_parameters()}
    for name, lr_scale, blocks in (("wide.weight", 0.5, 2), ("tall.weight", 1.0, 1)):
        expected = muon_change(before[name], grads[name], lr_scale, blocks)
        assert_close(name, before[name] - after[name], expected, LR * BF16_PRODUCTS)
    adam = LR * 0.5 * grads["wide.bias"] / (np.abs(grads["wide.bias"]) + ADAM_EPS)
    assert_close("wide.bias", before["wide.bias"] - after["wide.bias"], adam, FP32)


def test_orthogonal_brings_singular_values_near_one() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(3, 16, 48)).float())
    assert float(values.min()) > 0.5
    assert float(values.max()) < 1.5


def test_clip_bounds_the_gradient() -> None:
    module = build_module()
    optimizer = build_optimizer(module, replace(CONFIG, clip=1.0, beta1=0.0))
    optimizer.grads.fill_(100.0)
    optimizer.step(LR)
    assert_close(
        "first moment",
        optimizer.first[: optimizer.adam_total].norm(),
        float(12**0.5 / optimizer.grads.numel() ** 0.5),
        FP32,
    )
    assert not optimizer.grads.any()


def test_state_continues_exactly() -> None:
    begun, resumed = build_module(), build_module()
    first, second = build_optimizer(begun), build_optimizer(resumed)
    train(begun, first, 3)
    second.load_state(first.state())
    train(begun, first, 3)
    train(resumed, second, 3)
    assert torch.equal(first.values, second.values)
    assert begun.get_parameter("wide.weight").data_ptr() == first.members[1].view(first.values).data_ptr()

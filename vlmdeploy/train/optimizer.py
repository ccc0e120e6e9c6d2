"""The optimizer: all parameters in one flat buffer, matrices updated by Muon, the rest by AdamW.

With one buffer, exchange between workers, clipping and moving average are one operation each, and the state is three
tensors. Muon: K. Jordan et al. 2024 (momentum, orthogonalized by Newton-Schulz iterations), its step
scaled to AdamW's as in Moonlight (arXiv 2502.16982), so both share a learning rate.
"""

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmdeploy.train.config import OptimizerConfig

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
RMS_OF_ADAM = 0.2
ADAM_EPS = 1e-8


@dataclass(frozen=True)
class Member:
    """A parameter's place in the flat buffer, and its update.

    lr_scale multiplies the learning rate. blocks > 0: the number of stacked matrices, for Muon; 0: AdamW.
    """

    name: str
    start: int
    shape: tuple[int, ...]
    lr_scale: float
    decays: bool
    blocks: int

    @property
    def stop(self) -> int:
        """End of its range."""
        return self.start + torch.Size(self.shape).numel()

    @property
    def block_shape(self) -> tuple[int, int]:
        """Shape of each stacked matrix."""
        return (self.shape[0] // self.blocks, self.shape[1]) if self.blocks else (0, 0)

    def view(self, flat: Tensor) -> Tensor:
        """Its values in a flat buffer."""
        return flat[self.start : self.stop].view(self.shape)


class FlatOptimizer:
    """Owns the parameters of `module` and their gradients as flat buffers; `step` updates them in place.

    roles: (lr_scale, decays, blocks) by parameter name, see Member.
    """

    def __init__(self, module: nn.Module, roles: dict[str, tuple[float, bool, int]], config: OptimizerConfig) -> None:
        self.config = config
        parameters = dict(module.named_parameters())
        self.members: list[Member] = []
        loose = [Member(name, 0, tuple(value.shape), *roles[name]) for name, value in parameters.items()]
        for member in sorted(loose, key=lambda member: member.block_shape):
            start = self.members[-1].stop if self.members else 0
            self.members.append(replace(member, start=start))
        device, total = next(module.parameters()).device, self.members[-1].stop
        self.values = torch.empty(total, device=device)
        self.grads = torch.zeros(total, device=device)
        self.first = torch.zeros(total, device=device)  # Adam's mean gradient, Muon's momentum
        self.adam_total = next((member.start for member in self.members if member.blocks), total)
        self.second = torch.zeros(self.adam_total, device=device)
        self.num_steps = 0
        for member in self.members:
            parameter = parameters[member.name]
            member.view(self.values).copy_(parameter.data)
            parameter.data = member.view(self.values)
            parameter.grad = member.view(self.grads)
        self._slabs = _slabs(self.members, device)
        self._lr_scale = torch.ones(self.adam_total, device=device)
        self._decay = torch.zeros(self.adam_total, device=device)
        for member in self.members:
            if not member.blocks:
                self._lr_scale[member.start : member.stop] = member.lr_scale
                self._decay[member.start : member.stop] = config.weight_decay * float(member.decays)

    def state(self) -> dict[str, Any]:
        """The state to resume from, sharing the optimizer's tensors."""
        return {"values": self.values, "first": self.first, "second": self.second, "num_steps": self.num_steps}

    def load_state(self, state: dict[str, Any]) -> None:
        """Copy parameters and moments from the state of an optimizer over the same parameters."""
        for name in ("values", "first", "second"):
            getattr(self, name).copy_(state[name])
        self.num_steps = state["num_steps"]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update the parameters and zero the gradients."""
        norm = torch.linalg.vector_norm(self.grads)
        self.grads.mul_((self.config.clip / (norm + 1e-6)).clamp(max=1.0))
        self.num_steps += 1
        self._adam(lr)
        self._muon(lr)
        self.grads.zero_()

    def _adam(self, lr: float) -> None:
        config, part = self.config, slice(0, self.adam_total)
        grads, values, first = self.grads[part], self.values[part], self.first[part]
        first.lerp_(grads, 1 - config.beta1)
        self.second.lerp_(grads.square(), 1 - config.beta2)
        bias1, bias2 = 1 - config.beta1**self.num_steps, 1 - config.beta2**self.num_steps
        update = first / ((self.second / bias2).sqrt_().add_(ADAM_EPS)).mul_(bias1)
        update.addcmul_(self._decay, values).mul_(self._lr_scale)
        values.sub_(update, alpha=lr)

    def _muon(self, lr: float) -> None:
        part = slice(self.adam_total, None)
        grads, first = self.grads[part], self.first[part]
        first.lerp_(grads, 1 - self.config.momentum)
        grads.lerp_(first, self.config.momentum)  # Nesterov
        for slab in self._slabs:
            values = slab.view(self.values)
            directions = orthogonal(slab.view(self.grads)).float()
            values.mul_(1 - lr * self.config.weight_decay * slab.lr_scale)
            values.addcmul_(directions, slab.lr_scale, value=-lr * RMS_OF_ADAM * max(slab.shape) ** 0.5)


@dataclass(frozen=True)
class Slab:
    """Consecutive matrices of one shape [rows, columns] in the flat buffer; lr_scale [n, 1, 1]."""

    start: int
    stop: int
    shape: tuple[int, int]
    lr_scale: Tensor

    def view(self, flat: Tensor) -> Tensor:
        """Its matrices [n, rows, columns] in a flat buffer."""
        return flat[self.start : self.stop].view(-1, *self.shape)


def _slabs(members: list[Member], device: torch.device) -> list[Slab]:
    slabs = []
    matrices = [member for member in members if member.blocks]
    for shape, group in itertools.groupby(matrices, lambda member: member.block_shape):
        same = list(group)
        scales = [member.lr_scale for member in same for _ in range(member.blocks)]
        slabs.append(Slab(same[0].start, same[-1].stop, shape, torch.tensor(scales, device=device)[:, None, None]))
    return slabs


def orthogonal(matrices: Tensor) -> Tensor:
    """Roughly the nearest matrices with orthonormal rows or columns; [n, rows, columns], in bfloat16."""
    if matrices.shape[1] < matrices.shape[2]:
        return orthogonal(matrices.transpose(1, 2)).transpose(1, 2)
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) * 1.01 + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x.transpose(1, 2) @ x
        x = a * x + x @ (b * gram + c * (gram @ gram))
    return x

"""Calibration in several processes, started by torchrun. Each runs a share of the samples, sums are all-reduced, and
the first process decides and writes. A single process needs no communication."""

import atexit
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vlmdeploy.errors import VlmdeployError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Processes:
    """The rank of this process and the number of processes."""

    rank: int = 0
    count: int = 1

    @classmethod
    def join(cls) -> "Processes":
        """Join the group that torchrun's environment describes, if any."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("gloo")
            atexit.register(dist.destroy_process_group)  # its threads would abort a process that ends before them
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether this process decides and writes."""
        return self.rank == 0

    def sum_in_place(self, values: Tensor) -> None:
        """Replace values by their sum over all processes."""
        if self.count > 1:
            dist.all_reduce(values)

    def sum_counts(self, *counts: int) -> tuple[int, ...]:
        """Sum integers over all processes."""
        if self.count == 1:
            return counts
        values = torch.tensor(counts, dtype=torch.int64)
        dist.all_reduce(values)
        return tuple(values.tolist())

    def first_does(self, work: Callable[[], Value]) -> Value:
        """Run `work` in the first process and return its result in all. A VlmdeployError is raised in all of them."""
        if self.count == 1:
            return work()
        holder: list[Value | VlmdeployError | None] = [None]
        if self.is_first:
            try:
                holder[0] = work()
            except VlmdeployError as error:
                holder[0] = error
        dist.broadcast_object_list(holder, src=0)
        if isinstance(holder[0], VlmdeployError):
            holder[0].is_reported_elsewhere = not self.is_first
            raise holder[0]
        return holder[0]  # type: ignore[return-value]  # the first process's value

    def gather(self, value: Value) -> list[Value]:
        """Collect the values of all processes, in every process."""
        if self.count == 1:
            return [value]
        values: list[Value] = [value] * self.count
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Wait for all processes."""
        if self.count > 1:
            dist.barrier()

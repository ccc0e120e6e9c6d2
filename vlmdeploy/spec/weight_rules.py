"""Where each of our parameters comes from: the tensors of a checkpoint that fill it, and how."""

from dataclasses import dataclass
from typing import Literal

RuleOp = Literal["stack", "reshape", "same"]


@dataclass(frozen=True)
class Source:
    """A tensor of the checkpoint: its name there and the shape it must have."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class WeightRule:
    """One of our parameters and the checkpoint tensors that fill it.

    stack: the sources one after the other along the first axis (a single source: as it is).
    reshape: one source, same values in the same order, other axes.
    same: every source that is present holds equal values and the first is taken; with `optional` none need be there.
    """

    target: str
    shape: tuple[int, ...]  # of our parameter, after the operation
    sources: tuple[Source, ...]
    op: RuleOp = "stack"
    optional: bool = False

    @property
    def part(self) -> str:
        """The part of the model that holds the parameter: the first word of its name."""
        return self.target.partition(".")[0]

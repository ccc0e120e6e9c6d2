"""Rules that map a checkpoint's tensors to our parameters."""

from dataclasses import dataclass
from typing import Literal

RuleOp = Literal["stack", "reshape", "same"]


@dataclass(frozen=True)
class Source:
    """A tensor of the checkpoint: its name and required shape. also: other names that libraries give it."""

    name: str
    shape: tuple[int, ...]
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class WeightRule:
    """A parameter and the checkpoint tensors that fill it.

    stack: concatenate the sources along the first axis.
    reshape: reshape the only source.
    same: take the first source that is present; all must hold equal values.
    optional: all sources may be absent.
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


def stacked(target: str, shape: tuple[int, ...], *names: str) -> WeightRule:
    """A parameter of tensors of this shape, one below the other."""
    return WeightRule(target, (len(names) * shape[0], *shape[1:]), tuple(Source(name, shape) for name in names))

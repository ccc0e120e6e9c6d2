"""The connector as data: the steps from patch features to rows of the decoder.

Each step says about itself how many rows it gives, which matrices it holds and how many small values. A new kind of
step is a subclass of ConnectorStep in a file of its own; the files of the same name in `model` and `export.graphs`
compute it and write it as a graph.
"""

from dataclasses import dataclass
from importlib import import_module
from math import isqrt
from types import ModuleType

from vlmdeploy.overriding import override
from vlmdeploy.spec.vision import ActivationName, VisionSpec


@dataclass(frozen=True)
class StepMatrix:
    """A matrix [out, in] of a step. name: inside the step, "" where it holds one only. fed_by: the module of the step
    that makes its inputs, "" for what enters the step."""

    name: str
    out_width: int
    in_width: int
    fed_by: str = ""


class ConnectorStep:
    """What every step offers; by itself it changes rows one by one and holds nothing."""

    name: str

    def rows(self, before: int) -> int:
        """How many rows of an image leave the step when so many enter."""
        return before

    def matrices(self) -> tuple[StepMatrix, ...]:
        """The matrices that may be quantized, in the order of the forward pass."""
        return ()

    def small_values(self) -> int:
        """How many values it holds beside its matrices: biases, norms, learned rows."""
        return 0

    def counterpart(self, package: str) -> ModuleType:
        """The module of another package that knows this step: it has the same name as the step's own module."""
        return import_module(type(self).__module__.replace(".spec.", f".{package}."))


@dataclass(frozen=True)
class Downsample(ConnectorStep):
    """Convolution with kernel and stride 2 over the patch grid, with bias: [patches, in] -> [patches / 4, out].

    An odd last row and column are lost.
    """

    in_width: int
    out_width: int
    name: str = "conv"

    @override
    def rows(self, before: int) -> int:
        return (isqrt(before) // 2) ** 2

    @override
    def matrices(self) -> tuple[StepMatrix, ...]:
        return (StepMatrix("", self.out_width, 4 * self.in_width, "arrange"),)  # times blocks of four neighbours

    @override
    def small_values(self) -> int:
        return self.out_width


@dataclass(frozen=True)
class Projection(ConnectorStep):
    """Linear without bias: [rows, in] -> [rows, out]."""

    in_width: int
    out_width: int
    name: str = "linear"

    @override
    def matrices(self) -> tuple[StepMatrix, ...]:
        return (StepMatrix("", self.out_width, self.in_width),)


@dataclass(frozen=True)
class Norm(ConnectorStep):
    """Layer norm over the last axis, with weight and bias."""

    width: int
    eps: float
    name: str = "norm"

    @override
    def small_values(self) -> int:
        return 2 * self.width


@dataclass(frozen=True)
class Activation(ConnectorStep):
    """Elementwise function."""

    function: ActivationName = "gelu"
    name: str = "activation"


@dataclass(frozen=True)
class GatedMlp(ConnectorStep):
    """down(silu(gate(x)) * up(x)), without biases; gate and up are one matrix, gate rows first."""

    in_width: int
    mlp_width: int
    out_width: int
    name: str = "mlp"

    @override
    def matrices(self) -> tuple[StepMatrix, ...]:
        return (
            StepMatrix("gate_up", 2 * self.mlp_width, self.in_width),
            StepMatrix("down", self.out_width, self.mlp_width, "gate"),
        )


@dataclass(frozen=True)
class BoundaryRows(ConnectorStep):
    """A learned row before and one after the rows of an image."""

    width: int
    name: str = "boundary"

    @override
    def rows(self, before: int) -> int:
        return before + 2

    @override
    def small_values(self) -> int:
        return 2 * self.width


@dataclass(frozen=True)
class ConnectorSpec:
    """The steps from patch features to rows of the decoder, in order. Names are unique inside one connector."""

    steps: tuple[ConnectorStep, ...]

    def rows(self, vision: VisionSpec) -> int:
        """Decoder rows of one image, boundary rows included."""
        rows = vision.num_patches
        for step in self.steps:
            rows = step.rows(rows)
        return rows

    def multiplied_rows(self, vision: VisionSpec) -> int:
        """Rows of one image that leave the last step with matrices: as many as pass through those matrices."""
        rows = multiplied = vision.num_patches
        for step in self.steps:
            rows = step.rows(rows)
            if step.matrices():
                multiplied = rows
        return multiplied

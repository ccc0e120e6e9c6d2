"""The connector as data: the steps from patch features to decoder rows.

A new kind of step is a subclass of ConnectorStep in a file of its own; the files of the same name in `model` and
`export.graphs` compute it and write it as a graph.
"""

from dataclasses import dataclass
from importlib import import_module
from math import isqrt
from types import ModuleType

from vlmdeploy.overriding import override
from vlmdeploy.spec.vision import ActivationName, VisionSpec


@dataclass(frozen=True)
class StepMatrix:
    """A matrix [out, in] of a step. name: within the step, "" for its only matrix. fed_by: the module of the step that
    computes its inputs, "" for the input of the step."""

    name: str
    out_width: int
    in_width: int
    fed_by: str = ""


class ConnectorStep:
    """The base of all steps: row-wise and without parameters."""

    name: str

    def rows(self, before: int) -> int:
        """Output rows of one image, given its input rows."""
        return before

    def matrices(self) -> tuple[StepMatrix, ...]:
        """The matrices that may be quantized, in the order of the forward pass."""
        return ()

    def small_values(self) -> int:
        """Number of parameters besides the matrices: biases, norms, learned rows."""
        return 0

    def counterpart(self, package: str) -> ModuleType:
        """The module of another package that handles this step: the namesake of the step's own module."""
        return import_module(type(self).__module__.replace(".spec.", f".{package}."))


@dataclass(frozen=True)
class Downsample(ConnectorStep):
    """Convolution with kernel and stride 2 over the patch grid, with bias: [patches, in] -> [patches / 4, out].

    Drops an odd last row and column.
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
    """Linear: [rows, in] -> [rows, out]."""

    in_width: int
    out_width: int
    name: str = "linear"
    has_bias: bool = False

    @override
    def matrices(self) -> tuple[StepMatrix, ...]:
        return (StepMatrix("", self.out_width, self.in_width),)

    @override
    def small_values(self) -> int:
        return self.out_width * self.has_bias


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
    """A learned row before and after the rows of an image."""

    width: int
    name: str = "boundary"

    @override
    def rows(self, before: int) -> int:
        return before + 2

    @override
    def small_values(self) -> int:
        return 2 * self.width


@dataclass(frozen=True)
class Scale(ConnectorStep):
    """Times a constant."""

    factor: float
    name: str = "scale"


@dataclass(frozen=True)
class ConnectorSpec:
    """The steps from patch features to decoder rows, in order. Their names are unique."""

    steps: tuple[ConnectorStep, ...]

    def rows(self, vision: VisionSpec) -> int:
        """Decoder rows of one image, boundary rows included."""
        rows = vision.num_patches
        for step in self.steps:
            rows = step.rows(rows)
        return rows

    def multiplied_rows(self, vision: VisionSpec) -> int:
        """Output rows of one image at the last step with matrices: as many rows as those matrices multiply."""
        rows = multiplied = vision.num_patches
        for step in self.steps:
            rows = step.rows(rows)
            if step.matrices():
                multiplied = rows
        return multiplied

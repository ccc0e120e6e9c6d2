"""The connector as data: the steps from patch features to rows of the decoder."""

from dataclasses import dataclass

from vlmdeploy.spec.vision import ActivationName, VisionSpec


@dataclass(frozen=True)
class Downsample:
    """Convolution with kernel and stride 2 over the patch grid, with bias: [patches, in] -> [patches / 4, out]."""

    in_width: int
    out_width: int
    name: str = "conv"


@dataclass(frozen=True)
class Projection:
    """Linear without bias: [rows, in] -> [rows, out]."""

    in_width: int
    out_width: int
    name: str = "linear"


@dataclass(frozen=True)
class Norm:
    """Layer norm over the last axis, with weight and bias."""

    width: int
    eps: float
    name: str = "norm"


@dataclass(frozen=True)
class Activation:
    """Elementwise function."""

    function: ActivationName = "gelu"
    name: str = "activation"


@dataclass(frozen=True)
class GatedMlp:
    """down(silu(gate(x)) * up(x)), without biases; gate and up are one matrix, gate rows first."""

    in_width: int
    mlp_width: int
    out_width: int
    name: str = "mlp"


@dataclass(frozen=True)
class BoundaryRows:
    """A learned row before and one after the rows of an image."""

    width: int
    name: str = "boundary"


ConnectorStep = Downsample | Projection | Norm | Activation | GatedMlp | BoundaryRows


@dataclass(frozen=True)
class ConnectorSpec:
    """The steps from patch features to rows of the decoder, in order. Names are unique inside one connector."""

    steps: tuple[ConnectorStep, ...]

    def rows(self, vision: VisionSpec) -> int:
        """Decoder rows of one image, boundary rows included."""
        grid, extra = vision.grid, 0
        for step in self.steps:
            if isinstance(step, Downsample):
                grid //= 2
            elif isinstance(step, BoundaryRows):
                extra += 2
        return grid**2 + extra

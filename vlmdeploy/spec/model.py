"""What a model family says about a checkpoint, as plain data: the geometry of its parts, where each tensor comes from,
how pictures are prepared and prompts are written. The PyTorch model, the graph builder and the runtime read these
dataclasses and never ask which family it is."""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from vlmdeploy.bundle import ChatTemplate, GenerationDefaults, ImageRecipe, TokenRules

Config = dict[str, Any]  # the parsed config.json

ActivationName = Literal["gelu"]  # "gelu" is the exact one (erf)


@dataclass(frozen=True)
class VisionSpec:
    """A vision transformer with a class token, a learned position table, biases everywhere, norms on branch outputs."""

    image_px: int
    patch_px: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    norm_eps: float
    activation: ActivationName = "gelu"

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_px // self.patch_px

    @property
    def num_patches(self) -> int:
        """Patches of one image, the class token not counted."""
        return self.grid**2

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.num_heads


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


@dataclass(frozen=True)
class ExpertSpec:
    """One weight set of every decoder layer. `token_type` says which positions may use it."""

    name: Literal["language", "vision"]
    qkv_bias: bool = False


@dataclass(frozen=True)
class RopeSpec:
    """Rotary positions over the whole head, pairs (t, t + head_dim / 2), angle position * base^(-2t / head_dim).

    When the checkpoint stores the frequencies, the stored values are used and `base` only fills in for older files.
    """

    base: float


@dataclass(frozen=True)
class DecoderSpec:
    """A pre-norm causal decoder with RMS norms, rotary positions, grouped KV heads and a gated MLP."""

    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    vocab_size: int
    norm_eps: float
    rope: RopeSpec
    experts: tuple[ExpertSpec, ...]  # the language expert first
    context_tokens: int

    @property
    def qkv_width(self) -> int:
        """Rows of the packed projection: queries, keys, values."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


class Geometry(Protocol):
    """The widths of a model's three parts: all that sizes and matrices depend on. A ModelSpec is one."""

    @property
    def vision(self) -> VisionSpec:
        """The vision encoder."""

    @property
    def connector(self) -> ConnectorSpec:
        """From its features to rows of the decoder."""

    @property
    def decoder(self) -> DecoderSpec:
        """The decoder."""


@dataclass(frozen=True)
class ModelSpec:
    """Everything a family knows about one checkpoint, apart from the weights."""

    family: str
    vision: VisionSpec
    connector: ConnectorSpec
    decoder: DecoderSpec
    image: ImageRecipe
    tokens: TokenRules
    templates: tuple[ChatTemplate, ...]
    default_template: str
    generation: GenerationDefaults


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


class Family(Protocol):
    """What every module in `families/` offers (the modules themselves satisfy this protocol)."""

    NAME: str
    RELEASED: Config  # config.json of the checkpoint that the family is best known for, as far as sizes depend on it

    def detect(self, config: Config, tensor_names: frozenset[str] | None) -> bool:
        """Whether this family reads the checkpoint; without its tensors (None), whether it may."""

    def spec(self, config: Config, generation_config: Config) -> ModelSpec:
        """The checkpoint's geometry and rules; raises ConfigError and names the key."""

    def weights(self, spec: ModelSpec) -> tuple[WeightRule, ...]:
        """Where each parameter comes from: every tensor of the checkpoint appears in exactly one rule."""

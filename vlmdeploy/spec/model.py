"""What a model family says about a checkpoint, as plain data: the geometry of its parts, where each tensor comes from,
how pictures are prepared and prompts are written. The PyTorch model, the graph builder and the runtime read these
dataclasses and never ask which family it is."""

from dataclasses import dataclass, replace
from typing import Protocol

from vlmdeploy.bundle import ChatTemplate, GenerationDefaults, ImageRecipe, TokenRules
from vlmdeploy.errors import ExportError
from vlmdeploy.records import Config
from vlmdeploy.spec.connector import ConnectorSpec
from vlmdeploy.spec.decoder import DecoderSpec
from vlmdeploy.spec.vision import VisionSpec
from vlmdeploy.spec.weight_rules import WeightRule


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


def least_context(rows_per_image: int) -> int:
    """The shortest context of a bundle, in tokens: the first one, an image, a word, and one of the answer."""
    return rows_per_image + 3


def with_settings(spec: ModelSpec, context_tokens: int | None, template: str | None) -> ModelSpec:
    """The spec with the context and the default template that the user chose; raises ExportError."""
    context = spec.decoder.context_tokens if context_tokens is None else context_tokens
    least = least_context(spec.tokens.rows_per_image)
    if not least <= context <= spec.decoder.context_tokens:
        raise ExportError(
            f"--context is {context}, expected {least} (an image and a word) to {spec.decoder.context_tokens} "
            "(the checkpoint's own context)"
        )
    names = [item.name for item in spec.templates]
    if template is not None and template not in names:
        raise ExportError(f'--template is "{template}", expected one of {", ".join(names)}')
    decoder = replace(spec.decoder, context_tokens=context)
    return replace(spec, decoder=decoder, default_template=template or spec.default_template)

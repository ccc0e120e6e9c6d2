"""A checkpoint as plain data: geometry, tensor sources, image recipe and prompt templates. The PyTorch model, the graph
builder and the runtime read these dataclasses and never ask for the family."""

from dataclasses import dataclass, replace
from typing import Protocol

from vlmdeploy.errors import ExportError
from vlmdeploy.manifest import ChatTemplate, GenerationDefaults, ImageRecipe, Resize, TokenRules
from vlmdeploy.records import Config
from vlmdeploy.spec.connector import ConnectorSpec
from vlmdeploy.spec.decoder import DecoderSpec
from vlmdeploy.spec.vision import VisionSpec
from vlmdeploy.spec.weight_rules import WeightRule


class Geometry(Protocol):
    """The geometry of a model's three parts, on which sizes and matrices depend. A ModelSpec is one."""

    @property
    def vision(self) -> VisionSpec:
        """The vision encoder."""

    @property
    def connector(self) -> ConnectorSpec:
        """The connector."""

    @property
    def decoder(self) -> DecoderSpec:
        """The decoder."""


@dataclass(frozen=True)
class ModelSpec:
    """Everything about a checkpoint except its weights. other_resizes: other ways to make a picture square that such
    models are used with."""

    family: str
    vision: VisionSpec
    connector: ConnectorSpec
    decoder: DecoderSpec
    image: ImageRecipe
    tokens: TokenRules
    templates: tuple[ChatTemplate, ...]
    default_template: str
    generation: GenerationDefaults
    other_resizes: tuple[Resize, ...] = ()


class Family(Protocol):
    """The interface of every module in `families/`."""

    NAME: str
    RELEASED: Config  # the size-related keys of the family's best-known config.json
    IGNORED: tuple[str, ...]  # patterns of tensor names that the model does not compute with, as of fnmatch

    def detect(self, config: Config, tensor_names: frozenset[str] | None) -> bool:
        """Whether this family reads the checkpoint; without tensor names (None), whether it may."""

    def nearest(self, config: Config) -> str | None:
        """Why a checkpoint that no family reads, but that is nearly one of this family, is not: half a sentence."""

    def spec(self, config: Config, generation_config: Config) -> ModelSpec:
        """The checkpoint's geometry and rules. Raises ConfigError, naming the key."""

    def weights(self, spec: ModelSpec) -> tuple[WeightRule, ...]:
        """The sources of each parameter. Every tensor of the checkpoint appears in one rule, or is IGNORED."""


def least_context(rows_per_image: int) -> int:
    """The shortest context of a bundle, in tokens: BOS, an image, one of text and one of the answer."""
    return rows_per_image + 3


def with_settings(
    spec: ModelSpec, context_tokens: int | None, template: str | None, resize: Resize | None = None
) -> ModelSpec:
    """Set the context, the default template and the resize of pictures that the user chose. Raises ExportError."""
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
    resizes = (spec.image.resize, *spec.other_resizes)
    if resize is not None and resize not in resizes:
        raise ExportError(f'--image-recipe is "{resize}", expected {" or ".join(resizes)}, as {spec.family} is used')
    decoder, image = replace(spec.decoder, context_tokens=context), replace(spec.image, resize=resize or resizes[0])
    return replace(spec, decoder=decoder, image=image, default_template=template or spec.default_template)

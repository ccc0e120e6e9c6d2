"""A model as a sequence of stages, each run alone on the output of the previous one; here a checkpoint, in PyTorch and
float32 (codes are dequantized). Bundles: staged_bundle.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from vlmdeploy.export.gate.sample import InputRules
from vlmdeploy.export.gate.torch_stages import TorchStages
from vlmdeploy.export.graphs.head_layout import HeadLayout
from vlmdeploy.export.weight_reader import WeightReader
from vlmdeploy.layout import Ints
from vlmdeploy.manifest import ChatTemplate
from vlmdeploy.model.checkpoint import Checkpoint
from vlmdeploy.model.tokenizer import find_tokenizer, import_tokenizer
from vlmdeploy.overriding import override
from vlmdeploy.quant.precision import PrecisionPlan
from vlmdeploy.runtime.backends.lanes import Floats
from vlmdeploy.runtime.chat import Tokenizer
from vlmdeploy.runtime.generate import Prompt
from vlmdeploy.spec.model import ModelSpec

# The coarsest arithmetic of a model, in weights or products; "int4" stands for 4 bits or fewer.
Arithmetic = Literal["float32", "fp16", "int8", "int4"]


@dataclass(frozen=True)
class StageGeometry:
    """What two models must share to take the same input and be compared stage by stage."""

    family: str
    image_px: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    rows_per_image: int
    vision_layers: int
    vision_width: int
    connector_steps: tuple[str, ...]
    decoder_layers: int
    hidden: int
    kv_heads: int
    padded_head_dim: int  # width of a head in a graph
    experts: tuple[str, ...]
    vocab_size: int
    bos_id: int
    placeholder_id: int

    @classmethod
    def of_spec(cls, spec: ModelSpec) -> "StageGeometry":
        """The geometry of a checkpoint."""
        return cls(
            family=spec.family,
            image_px=spec.image.size_px,
            image_mean=spec.image.mean,
            image_std=spec.image.std,
            rows_per_image=spec.tokens.rows_per_image,
            vision_layers=spec.vision.num_layers,
            vision_width=spec.vision.width,
            connector_steps=tuple(step.name for step in spec.connector.steps),
            decoder_layers=spec.decoder.num_layers,
            hidden=spec.decoder.hidden,
            kv_heads=spec.decoder.num_kv_heads,
            padded_head_dim=HeadLayout(spec.decoder).padded,
            experts=tuple(expert.name for expert in spec.decoder.experts),
            vocab_size=spec.decoder.vocab_size,
            bos_id=spec.tokens.bos_id,
            placeholder_id=spec.tokens.placeholder_id,
        )

    def first_difference(self, other: "StageGeometry") -> tuple[str, Any, Any] | None:
        """The first field that differs, with both values; None if they are equal."""
        pairs = ((item.name, getattr(self, item.name), getattr(other, item.name)) for item in fields(self))
        return next((pair for pair in pairs if pair[1] != pair[2]), None)

    def vision_stages(self) -> list[str]:
        """Stages from pixels to decoder rows, in order."""
        layers = [f"vision.layer.{index}" for index in range(self.vision_layers)]
        return ["vision.embed", *layers, *(f"connector.{name}" for name in self.connector_steps)]


class StagedModel(Protocol):
    """A checkpoint or a bundle whose stages run one at a time."""

    name: str
    geometry: StageGeometry
    rules: InputRules
    template: ChatTemplate  # the default one
    arithmetic: Arithmetic

    def tokenizer(self) -> Tokenizer | None:
        """Its tokenizer, if it has one. Raises ConfigError or BundleError if it cannot be read."""

    def text_rows(self, ids: Ints) -> Floats:
        """Rows of the embedding table, [ids, hidden]."""

    def run(self, stage: str, inputs: Sequence[Floats], prompt: Prompt) -> list[Floats]:
        """Load one stage and run it on several inputs, each an output of the previous stage.

        "vision.embed" takes pixels; encoder and connector [1, rows, width], decoder layers [seq, hidden], final norm
        and logits any rows. Rows that a bundle does not compute are NaN: the vision expert's in the last layer.
        """


class StagedCheckpoint(StagedModel):
    """A checkpoint, float or quantized."""

    def __init__(self, folder: Path, follow_links: bool = False) -> None:
        """Raises ConfigError and WeightsError."""
        checkpoint = Checkpoint(folder, follow_links)
        spec = checkpoint.spec
        self.name = str(folder)
        self.geometry = StageGeometry.of_spec(spec)
        self.rules = InputRules.of_spec(spec)
        self.template = next(item for item in spec.templates if item.name == spec.default_template)
        self.arithmetic = _arithmetic(checkpoint)
        as_stored = PrecisionPlan({}, {}, {}, ())  # converts nothing
        self._stages = TorchStages(WeightReader(checkpoint, as_stored), spec)
        self._checkpoint = checkpoint

    @override
    def tokenizer(self) -> Tokenizer | None:
        source = find_tokenizer(self._checkpoint.folder, self._checkpoint.follow_links)
        return None if source is None else Tokenizer(import_tokenizer(source))

    @override
    def text_rows(self, ids: Ints) -> Floats:
        return self._stages.text_rows(ids)

    @torch.no_grad()
    @override
    def run(self, stage: str, inputs: Sequence[Floats], prompt: Prompt) -> list[Floats]:
        outputs = self._outputs(stage, [torch.from_numpy(values) for values in inputs], prompt)
        return [output.numpy() for output in outputs]

    def _outputs(self, stage: str, inputs: list[Tensor], prompt: Prompt) -> list[Tensor]:
        stages, (part, _, name) = self._stages, stage.partition(".")
        if stage == "vision.embed":
            return [stages.patches(pixels.numpy()) for pixels in inputs]
        if part == "connector":
            steps = stages.spec.connector.steps
            step = next(step for step in steps if step.name == name)
            module = stages.connector_step(step)
            first_row = 1 if step is steps[0] else 0  # the connector takes no class token
            return [module(x[:, first_row:]) for x in inputs]
        if stage == "logits":
            values = torch.from_numpy(stages.logits(torch.cat(inputs)))  # reads the head once
            return list(torch.split(values, [len(x) for x in inputs]))
        if stage == "decoder.norm":
            norm = stages.norm()
            return [norm(x) for x in inputs]
        index = int(name.removeprefix("layer."))
        if part == "vision":
            layer = stages.vision_layer(index)
            return [layer(x) for x in inputs]
        layout = stages.step(prompt.ids, prompt.pixels)
        return [output for output, _ in stages.decoder_layer(index, inputs, layout)]


def _arithmetic(checkpoint: Checkpoint) -> Arithmetic:
    if not checkpoint.is_quantized:
        return "float32"
    grids = [checkpoint.stored_grid(target) for target in checkpoint.rules if target in checkpoint]
    bits = [grid.bits for grid in grids if grid is not None]
    return "int8" if bits and min(bits) > 4 else "int4"

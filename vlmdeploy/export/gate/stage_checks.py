"""The gate's comparisons, stage by stage: each PyTorch stage takes the bundle's own previous output."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vlmdeploy.export.gate.taps import TappedRun
from vlmdeploy.export.gate.torch_stages import TorchStages
from vlmdeploy.export.graphs.head_layout import HeadLayout
from vlmdeploy.manifest import Manifest
from vlmdeploy.model.decoder import LayerCache, Step
from vlmdeploy.progress import Progress
from vlmdeploy.runtime import parity
from vlmdeploy.runtime.parity import Gate, Tolerance
from vlmdeploy.spec.model import ModelSpec


@dataclass(frozen=True)
class StageChecks:
    """Compares the runs of one bundle ("structure", perhaps "shipped") with PyTorch; raises ParityError."""

    gate: Gate
    stages: TorchStages
    runs: dict[str, TappedRun]
    progress: Progress

    @property
    def spec(self) -> ModelSpec:
        """The model's geometry."""
        return self.stages.spec

    @property
    def _first(self) -> TappedRun:
        return next(iter(self.runs.values()))

    def _bound(self, check: str) -> Tolerance:
        return parity.bound_of(check, self.gate.is_half)

    def preprocess(self, manifest: Manifest) -> None:
        """Our preprocessing against PyTorch's antialiased bicubic resize, an independent implementation."""
        sample, side = self._first.sample, manifest.image.size_px
        assert sample.prompt.pixels is not None, "the sample has a picture"
        channels, sides = torch.from_numpy(sample.picture.copy()).permute(2, 0, 1)[None], (side, side)
        mean, std = torch.tensor(manifest.image.mean), torch.tensor(manifest.image.std)
        if manifest.image.resize == "pad":
            channels = _square(channels, (255 * mean).byte())
        elif manifest.image.resize == "crop":
            shorter = min(channels.shape[2:])
            sides = (side * channels.shape[2] // shorter, side * channels.shape[3] // shorter)
        resized = F.interpolate(channels, sides, mode="bicubic", antialias=True)
        top, left = ((size - side) // 2 for size in sides)
        square = resized[..., top : top + side, left : left + side].permute(0, 2, 3, 1).float()
        expected = ((square / 255 - mean) / std).permute(0, 3, 1, 2).numpy()
        self.gate.compare("preprocess", "structure", sample.prompt.pixels, expected, parity.PREPROCESS)

    def vision(self) -> None:
        """Compare patches, groups of encoder layers, then each step of the connector."""
        pixels = self._first.sample.prompt.pixels
        assert pixels is not None, "the sample has a picture"
        patches = self.stages.patches(pixels)
        current = self._compare("vision.embed", dict.fromkeys(self.runs, patches))
        for index in range(self.spec.vision.num_layers):
            self.progress("verify vision", index, self.spec.vision.num_layers)
            layer = self.stages.vision_layer(index)
            current = {check: layer(x) for check, x in current.items()}
            if f"vision.layer.{index}" in self._first.stages:
                current = self._compare(f"vision.layer.{index}", current)
        current = {check: x[:, 1:] for check, x in current.items()}
        for step in self.spec.connector.steps:
            module = self.stages.connector_step(step)
            current = self._compare(f"connector.{step.name}", {check: module(x) for check, x in current.items()})

    def _compare(self, stage: str, expected: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compare one stage of every run; returns the bundle's values, the input of the next stage."""
        for check, run in self.runs.items():
            self.gate.compare(stage, check, run.stages[stage], expected[check].numpy(), self._bound(check))
        return {check: torch.from_numpy(run.stages[stage]) for check, run in self.runs.items()}

    def decoder(self) -> None:
        """Compare each layer over the whole sequence, including decoded tokens: hidden states, keys and values."""
        self._embedding()
        step = self.stages.step(self._first.ids, self._first.sample.prompt.pixels)
        for index in range(self.spec.decoder.num_layers):
            self.progress("verify decoder", index, self.spec.decoder.num_layers)
            self._decoder_layer(index, step)

    def _embedding(self) -> None:
        """Compare the text's embedding rows; the image's rows are the connector's output."""
        run = self._first
        is_text = np.ones(len(run.ids), np.bool_)
        is_text[: len(run.sample.prompt.ids)] = run.sample.prompt.types == 0
        expected = self.stages.text_rows(run.ids[is_text])
        self.gate.compare("embedding", "structure", run.stages["decoder.input"][is_text], expected, parity.EMBEDDING)

    def _decoder_layer(self, index: int, step: Step) -> None:
        """Compare one layer of every run, but not the vision expert's rows of the last, which a bundle lacks."""
        stage, stage_before = f"decoder.layer.{index}", f"decoder.layer.{index - 1}" if index else "decoder.input"
        inputs = [torch.from_numpy(run.stages[stage_before]) for run in self.runs.values()]
        outputs = dict(zip(self.runs, self.stages.decoder_layer(index, inputs, step), strict=True))
        for check, (_, cache) in outputs.items():
            self._keys_and_values(check, index, cache)
        for check, run in self.runs.items():
            expected = outputs[check][0].numpy()
            is_last = index == self.spec.decoder.num_layers - 1
            rows = ~run.vision_mask if is_last else np.ones(len(expected), np.bool_)
            self.gate.compare(stage, check, run.stages[stage][rows], expected[rows], self._bound(check))

    def _keys_and_values(self, check: str, index: int, cache: LayerCache) -> None:
        """Compare keys and values [kv_heads, seq, head_dim], the bundle's without padding."""
        run, layout = self.runs[check], HeadLayout(self.spec.decoder)
        pairs = (
            ("key", run.keys[index], cache.key, layout.rotary_slots()),
            ("value", run.values[index], cache.value, layout.value_slots()),
        )
        for kind, found, expected, slots in pairs:
            assert expected is not None, "the layer has filled its cache"
            stage, own = f"decoder.{kind}.{index}", layout.true_values(found, slots)
            self.gate.compare(stage, check, own, expected[0].numpy(), self._bound(check))

    def logits(self) -> float:
        """Compare final norm and head; returns the share of rows with the same best token in the last run.

        Rows whose best token leads clearly must agree.
        """
        norm = self.stages.norm()
        agreement = 1.0
        for check, run in self.runs.items():
            rows = ~run.vision_mask
            last = torch.from_numpy(run.stages[f"decoder.layer.{self.spec.decoder.num_layers - 1}"][rows])
            normed = norm(last)
            self.gate.compare(
                "decoder.norm", check, run.stages["decoder.norm"][rows], normed.numpy(), self._bound(check)
            )
            expected = self.stages.logits(normed)
            self.gate.compare("logits", check, run.logits, expected, self._bound(check))
            agreement = self.gate.compare_best("logits", check, run.logits, expected)
        return agreement


def _square(channels: Tensor, colour: Tensor) -> Tensor:
    """A picture uint8 [1, 3, height, width] in the middle of a square of this colour."""
    height, width = channels.shape[2:]
    longer = max(height, width)
    square = colour.view(1, 3, 1, 1).repeat(1, 1, longer, longer)
    top, left = (longer - height) // 2, (longer - width) // 2
    square[..., top : top + height, left : left + width] = channels
    return square

"""The comparisons of the gate, stage by stage: each PyTorch stage is fed with the bundle's own previous output.

Only half a decoder layer, one encoder layer or one step of the connector is in memory at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmdeploy.bundle import Manifest
from vlmdeploy.export.head_layout import HeadLayout
from vlmdeploy.export.options import Progress
from vlmdeploy.export.taps import TappedRun
from vlmdeploy.export.weights import WeightReader
from vlmdeploy.families.spec import ConnectorStep, ModelSpec
from vlmdeploy.model.batch import derive_layout
from vlmdeploy.model.connector import build_step
from vlmdeploy.model.decoder import Decoder, DecoderLayer, LayerCache, RmsNorm, Step, causal_mask
from vlmdeploy.model.vision import VisionEncoder, VisionLayer
from vlmdeploy.runtime import parity
from vlmdeploy.runtime.backend import Floats
from vlmdeploy.runtime.parity import Gate, Tolerance


@dataclass(frozen=True)
class StageChecks:
    """Compares the runs of one bundle ("structure", perhaps "shipped") with PyTorch; a failure raises ParityError."""

    gate: Gate
    reader: WeightReader
    spec: ModelSpec
    runs: dict[str, TappedRun]
    progress: Progress

    @property
    def _first(self) -> TappedRun:
        return next(iter(self.runs.values()))

    def _bound(self, check: str) -> Tolerance:
        return parity.bound_of(check, self.gate.is_half)

    def preprocess(self, manifest: Manifest) -> None:
        """Our preprocessing against PyTorch's antialiased bicubic resize, an independent implementation."""
        sample, side = self._first.sample, manifest.image.size_px
        assert sample.prompt.pixels is not None, "the sample has a picture"
        channels = torch.from_numpy(sample.picture.copy()).permute(2, 0, 1)[None]
        resized = F.interpolate(channels, (side, side), mode="bicubic", antialias=True).permute(0, 2, 3, 1).float()
        mean, std = torch.tensor(manifest.image.mean), torch.tensor(manifest.image.std)
        expected = ((resized / 255 - mean) / std).permute(0, 3, 1, 2).numpy()
        self.gate.compare("preprocess", "structure", sample.prompt.pixels, expected, parity.PREPROCESS)

    def vision(self) -> None:
        """Patches, encoder layers by groups, then the connector step by step."""
        current = self._embed()
        for index in range(self.spec.vision.num_layers):
            self.progress("verify vision", index, self.spec.vision.num_layers)
            layer = self._load(lambda: VisionLayer(self.spec.vision), f"vision.layers.{index}")
            current = {check: layer(x) for check, x in current.items()}
            if f"vision.layer.{index}" in self._first.stages:
                current = self._compare(f"vision.layer.{index}", current)
        current = {check: x[:, 1:] for check, x in current.items()}
        for step in self.spec.connector.steps:
            module = self._load(_step_builder(step), f"connector.{step.name}")
            current = self._compare(f"connector.{step.name}", {check: module(x) for check, x in current.items()})

    def _embed(self) -> dict[str, Tensor]:
        encoder = self._load(lambda: VisionEncoder(replace(self.spec.vision, num_layers=0)), "vision")
        assert isinstance(encoder, VisionEncoder), "what the builder makes"
        pixels = torch.from_numpy(self._first.sample.prompt.pixels)
        return self._compare("vision.embed", {check: encoder.embed(pixels) for check in self.runs})

    def _load(self, build: Callable[[], nn.Module], prefix: str, only: tuple[str, ...] = ()) -> nn.Module:
        """A module with the bundle's effective weights, taken over without a copy.

        `only` names the submodules that get weights; the others stay without storage.
        """
        with torch.device("meta"):
            module = build()
        names = [name for name in module.state_dict() if not only or name.split(".")[-2] in only]
        state = {name: self.reader.effective(f"{prefix}.{name}") for name in names}
        module.load_state_dict(state, assign=True, strict=not only)
        return module

    def _compare(self, stage: str, expected: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compare one stage of every run; the bundle's own values, to feed the next stage with."""
        for check, run in self.runs.items():
            self.gate.compare(stage, check, run.stages[stage], expected[check].numpy(), self._bound(check))
        return {check: torch.from_numpy(run.stages[stage]) for check, run in self.runs.items()}

    def decoder(self) -> None:
        """Each layer over the whole sequence, decoded tokens included: hidden states, keys and values."""
        self._embedding()
        step = self._step()
        for index in range(self.spec.decoder.num_layers):
            self.progress("verify decoder", index, self.spec.decoder.num_layers)
            self._decoder_layer(index, step)

    def _embedding(self) -> None:
        """The rows of the table that the text looked up; the image's rows were the connector's last step."""
        run = self._first
        is_text = np.ones(len(run.ids), np.bool_)
        is_text[: len(run.sample.prompt.ids)] = run.sample.prompt.types == 0
        ids = [int(token) for token in run.ids[is_text]]
        expected = np.concatenate([self.reader.effective_rows("embedding.weight", token, token + 1) for token in ids])
        self.gate.compare("embedding", "structure", run.stages["decoder.input"][is_text], expected, parity.EMBEDDING)

    def _step(self) -> Step:
        """Positions and routing as PyTorch derives them from the ids, not as the bundle's run has them."""
        decoder, run = Decoder(replace(self.spec.decoder, num_layers=0)), self._first
        decoder.inv_freq = self.reader.checkpoint.inv_freq()
        ids, pixels = torch.from_numpy(run.ids)[None], torch.from_numpy(run.sample.prompt.pixels)
        layout = derive_layout(self.spec, ids, pixels, None, None, None)
        return decoder.step(layout.position_ids, layout.vision_mask, causal_mask(layout.attention_mask))

    def _decoder_layer(self, index: int, step: Step) -> None:
        """One layer, its attention and its MLP loaded one after the other.

        The last layer's rows of the vision expert are left out: the bundle does not compute them.
        """
        stage, stage_before = f"decoder.layer.{index}", f"decoder.layer.{index - 1}" if index else "decoder.input"
        middle = {}
        layer = self._load_layer(index, ("attention_norm", "qkv", "dense"))
        for check, run in self.runs.items():
            cache = LayerCache()
            middle[check] = layer.attention_half(torch.from_numpy(run.stages[stage_before])[None], step, cache)
            self._keys_and_values(check, index, cache)
        del layer  # before the other half is loaded
        layer = self._load_layer(index, ("mlp_norm", "gate_up", "down"))
        for check, run in self.runs.items():
            expected = layer.mlp_half(middle[check], step)[0].numpy()
            is_last = index == self.spec.decoder.num_layers - 1
            rows = ~run.vision_mask if is_last else np.ones(len(expected), np.bool_)
            self.gate.compare(stage, check, run.stages[stage][rows], expected[rows], self._bound(check))

    def _load_layer(self, index: int, modules: tuple[str, ...]) -> DecoderLayer:
        layer = self._load(lambda: DecoderLayer(self.spec.decoder), f"decoder.layers.{index}", modules)
        assert isinstance(layer, DecoderLayer), "what the builder makes"
        return layer

    def _keys_and_values(self, check: str, index: int, cache: LayerCache) -> None:
        """Keys and values [kv_heads, seq, head_dim], the bundle's cut to the true head width."""
        run, layout = self.runs[check], HeadLayout(self.spec.decoder)
        pairs = (
            ("key", run.keys[index], cache.key, layout.rotary_slots()),
            ("value", run.values[index], cache.value, layout.value_slots()),
        )
        for kind, found, expected, slots in pairs:
            assert expected is not None, "the layer has filled its cache"
            stage, cut = f"decoder.{kind}.{index}", found[..., slots >= 0]
            self.gate.compare(stage, check, cut, expected[0].numpy(), self._bound(check))

    def logits(self) -> float:
        """The final norm and the head; the share of rows whose best token is the same in the last run.

        Every row whose best token leads clearly must agree.
        """
        norm = self._load(lambda: RmsNorm(self.spec.decoder.hidden, self.spec.decoder.norm_eps), "decoder.norm")
        agreement = 1.0
        for check, run in self.runs.items():
            rows = ~run.vision_mask
            last = torch.from_numpy(run.stages[f"decoder.layer.{self.spec.decoder.num_layers - 1}"][rows])
            normed = norm(last)
            self.gate.compare(
                "decoder.norm", check, run.stages["decoder.norm"][rows], normed.numpy(), self._bound(check)
            )
            expected = self._head(normed)
            self.gate.compare("logits", check, run.logits, expected, self._bound(check))
            agreement = self.gate.compare_best("logits", check, run.logits, expected)
        return agreement

    def _head(self, normed: Tensor) -> Floats:
        """Logits [rows, vocab] of normed rows, the head a block of its rows at a time."""
        blocks = self.reader.blocks("lm_head.weight")
        parts = (torch.from_numpy(self.reader.effective_rows("lm_head.weight", *span)) for span in blocks)
        return np.asarray(torch.cat([normed @ part.T for part in parts], 1).numpy())


def _step_builder(step: ConnectorStep) -> Callable[[], nn.Module]:
    return lambda: build_step(step)

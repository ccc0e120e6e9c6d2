"""The stages of the PyTorch reference; each reads its weights when it runs.

Only half a decoder layer, one encoder layer or one connector step is in memory at a time. A WeightReader provides the
weights: those of a bundle, or the checkpoint's own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from vlmdeploy.export.weight_reader import WeightReader
from vlmdeploy.layout import Ints
from vlmdeploy.model.batch import derive_layout
from vlmdeploy.model.connector import build_step
from vlmdeploy.model.decoder import Decoder, DecoderLayer, LayerCache, RmsNorm, Step, causal_mask
from vlmdeploy.model.vision import VisionEncoder, VisionLayer
from vlmdeploy.runtime.backends.lanes import Floats
from vlmdeploy.spec.connector import ConnectorStep
from vlmdeploy.spec.model import ModelSpec


@dataclass(frozen=True)
class TorchStages:
    """Loads and runs single stages; call it inside `torch.no_grad()`."""

    reader: WeightReader
    spec: ModelSpec

    def patches(self, pixels: Floats) -> Tensor:
        """Input of the encoder's first layer: [images, 3, S, S] -> [images, 1 + patches, width]."""
        encoder = self._load(lambda: VisionEncoder(replace(self.spec.vision, num_layers=0)), "vision")
        assert isinstance(encoder, VisionEncoder), "what the builder makes"
        return encoder.embed(torch.from_numpy(pixels))

    def vision_layer(self, index: int) -> nn.Module:
        """One layer of the encoder."""
        return self._load(lambda: VisionLayer(self.spec.vision), f"vision.layers.{index}")

    def connector_step(self, step: ConnectorStep) -> nn.Module:
        """One step of the connector; the first takes encoder rows without the class token."""
        return self._load(lambda: build_step(step), f"connector.{step.name}")

    def text_rows(self, ids: Ints) -> Floats:
        """Rows of the embedding table, [ids, hidden]."""
        rows = [self.reader.effective_rows("embedding.weight", token, token + 1) for token in ids.tolist()]
        return np.concatenate(rows)

    def step(self, ids: Ints, pixels: Floats | None) -> Step:
        """Positions and routing that PyTorch derives from the ids [seq]."""
        decoder = Decoder(replace(self.spec.decoder, num_layers=0))
        decoder.inv_freq = self.reader.checkpoint.inv_freq()
        images = None if pixels is None else torch.from_numpy(pixels)
        layout = derive_layout(self.spec, torch.from_numpy(ids)[None], images, None, None, None)
        return decoder.step(layout.position_ids, layout.vision_mask, causal_mask(layout.attention_mask))

    def decoder_layer(self, index: int, inputs: Sequence[Tensor], step: Step) -> list[tuple[Tensor, LayerCache]]:
        """Run each input [seq, hidden] through one layer; returns hidden states with keys and values.

        Loads attention and MLP one after the other.
        """
        caches = [LayerCache() for _ in inputs]
        layer = self._half_layer(index, ("attention_norm", "qkv", "dense"))
        middle = [layer.attention_half(x[None], step, cache) for x, cache in zip(inputs, caches, strict=True)]
        del layer  # before the other half is loaded
        layer = self._half_layer(index, ("mlp_norm", "gate_up", "down"))
        return [(layer.mlp_half(x, step)[0], cache) for x, cache in zip(middle, caches, strict=True)]

    def norm(self) -> nn.Module:
        """The decoder's final norm."""
        return self._load(lambda: RmsNorm(self.spec.decoder.hidden, self.spec.decoder.norm_eps), "decoder.norm")

    def logits(self, normed: Tensor) -> Floats:
        """Logits [rows, vocab] of normed rows, reading the head in blocks."""
        blocks = self.reader.blocks("lm_head.weight")
        parts = (torch.from_numpy(self.reader.effective_rows("lm_head.weight", *span)) for span in blocks)
        return np.asarray(torch.cat([normed @ part.T for part in parts], 1).numpy())

    def _half_layer(self, index: int, modules: tuple[str, ...]) -> DecoderLayer:
        layer = self._load(lambda: DecoderLayer(self.spec.decoder), f"decoder.layers.{index}", modules)
        assert isinstance(layer, DecoderLayer), "what the builder makes"
        return layer

    def _load(self, build: Callable[[], nn.Module], prefix: str, only: tuple[str, ...] = ()) -> nn.Module:
        """A module with the reader's weights, not copied.

        only: the submodules that get weights; the others have no storage.
        """
        with torch.device("meta"):
            module = build()
        endings = tuple(f"{part}.{kind}" for part in only for kind in ("weight", "bias"))
        names = [name for name in module.state_dict() if not only or name.endswith(endings)]
        state = {name: self.reader.effective(f"{prefix}.{name}") for name in names}
        module.load_state_dict(state, assign=True, strict=not only)
        return module

"""Run the model's units (encoder layers, connector, decoder layers, head) over all calibration tokens.

A unit's linears are quantized in order: each sees inputs from the quantized linears before it, is quantized, and
multiplies its tokens by the quantized weights.

Asymmetric calibration runs a second stream through the float weights. The wiring of a layer is the reference's own
forward pass over `Rows`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmdeploy.calib.activations import Ints, Pool
from vlmdeploy.calib.calibration_set import CalibrationSample, Pictures, Tokens, read_pixels
from vlmdeploy.calib.flow import Flow, PerSample, Product, Quantizer, Rows, over_rows
from vlmdeploy.calib.statistics import Inputs
from vlmdeploy.model.checkpoint import Checkpoint
from vlmdeploy.model.connector import build_step
from vlmdeploy.model.decoder import Decoder, LayerCache, LayerParts, RmsNorm, Step, causal_mask, rotate
from vlmdeploy.model.products import PRODUCTS, WithoutFirst
from vlmdeploy.model.vision import VisionEncoder, VisionLayer
from vlmdeploy.spec.decoder import DecoderSpec
from vlmdeploy.spec.matrices import decoder_matrices
from vlmdeploy.spec.model import ModelSpec

Samples = tuple[CalibrationSample, ...]


class CalibratedLayer(LayerParts):
    """A decoder layer over Rows: each expert's matrix is quantized from its own tokens."""

    def __init__(self, spec: DecoderSpec, index: int, quantizer: Quantizer) -> None:
        super().__init__(spec)
        self.quantizer = quantizer
        self.matrices = tuple(decoder_matrices(spec, index))

    def routed(self, name: str, x: Rows, step: PerSample) -> Rows:
        """Defer the product. Matrices whose output nothing reads are handled once keys and values exist."""
        if name == "dense":
            for matrix in self.matrices:
                if not matrix.is_read:
                    self.quantizer.unused(matrix.target)
        read = [matrix.expert for matrix in self.matrices if matrix.name == name and matrix.is_read]
        return x.times(Product.of_experts({expert: self.get_submodule(f"{expert}.{name}") for expert in read}))


@dataclass(frozen=True)
class UnitRunner:
    """Runs units; `streams` is 1, or 2 under asymmetric calibration."""

    checkpoint: Checkpoint
    quantizer: Quantizer
    pool: Pool
    streams: int = 1

    @property
    def spec(self) -> ModelSpec:
        """The model's geometry."""
        return self.checkpoint.spec

    def flow(self, tokens: Tokens, width: int) -> Flow:
        """Rows of zeros for each stream."""
        return Flow.zeros(self.pool, tokens, width, self.streams)

    def load(self, build: Callable[[], nn.Module], name: str, has_products: bool = True) -> nn.Module:
        """Build a module with the checkpoint's float weights; without its products' weights unless `has_products`."""
        with torch.device("meta"):
            module = build()
        parts = [(part, child) for part, child in module.named_modules() if isinstance(child, PRODUCTS)]
        left_out = set() if has_products else {f"{part}.weight".removeprefix(".") for part, _ in parts}
        names = module.state_dict().keys() - left_out
        module.load_state_dict(
            {part: self.checkpoint.parameter(f"{name}.{part}") for part in names}, strict=False, assign=True
        )
        return module

    def over_rows(self, build: Callable[[], nn.Module], name: str) -> nn.Module:
        """Build a module that takes Rows; its products get their weights from the quantizer."""
        return over_rows(self.load(build, name, has_products=False), name, self.quantizer)

    def embed_pictures(self, pictures: Pictures) -> Flow:
        """The input of the encoder's first layer: class token and patches of every picture."""
        encoder = self.load(lambda: VisionEncoder(replace(self.spec.vision, num_layers=0)), "vision")
        assert isinstance(encoder, VisionEncoder), "build() makes one"
        flow = self.flow(pictures.tokens(self.spec.vision.num_patches + 1), self.spec.vision.width)
        for index, path in enumerate(pictures.paths):
            embedded = encoder.embed(torch.from_numpy(read_pixels(path, self.spec))[None])[0]
            flow.write(flow.tokens.rows(index), (embedded,) * self.streams)
        return flow

    def vision_layer(self, index: int, flow: Flow) -> Flow:
        """Run one encoder layer, in place."""
        layer = self.over_rows(lambda: VisionLayer(self.spec.vision), f"vision.layers.{index}")
        return self._stored(layer(Rows(self.pool, flow)))

    def connector(self, flow: Flow) -> Flow:
        """Turn encoder output into decoder rows, boundary rows included. Closes the input."""
        rows = Rows(self.pool, flow).mixed(WithoutFirst())
        flow.close()
        for step in self.spec.connector.steps:
            module = self.over_rows(lambda step=step: build_step(step), f"connector.{step.name}")  # type: ignore[misc]
            rows = module(rows)
        return self._stored(rows)

    def embed_prompts(self, samples: Samples, tokens: Tokens, images: Flow, pictures: Pictures) -> Flow:
        """The input of decoder layer 0: embeddings, and each picture's rows where the type is 1."""
        flow = self.flow(tokens, self.spec.decoder.hidden)
        number_of = {path: index for index, path in enumerate(pictures.paths)}
        table: dict[int, Tensor] = {}  # rows of the embedding in use
        for index, sample in enumerate(samples):
            rows, is_text = tokens.rows(index), sample.types == 0
            for token in sample.ids[is_text].tolist():
                if token not in table:
                    table[token] = self.checkpoint.rows("embedding.weight", token, token + 1)
            text = torch.cat([table[token] for token in sample.ids[is_text].tolist()])
            flow.write(rows[is_text], (text,) * self.streams)
            if sample.image is not None:
                flow.write(rows[~is_text], images.read(images.tokens.rows(number_of[sample.image])))
        return flow

    def decoder_layer(self, index: int, flow: Flow, samples: Samples) -> Flow:
        """Run one decoder layer, in place."""
        layer = self.over_rows(
            lambda: CalibratedLayer(self.spec.decoder, index, self.quantizer), f"decoder.layers.{index}"
        )
        step_of = self.steps(samples)
        return self._stored(layer(Rows(self.pool, flow), PerSample(step_of), PerSample(lambda sample: LayerCache())))

    def steps(self, samples: Sequence[CalibrationSample]) -> Callable[[int], Step]:
        """Make rotary tables and causal mask of each sample."""
        decoder = Decoder(replace(self.spec.decoder, num_layers=0))
        decoder.inv_freq = self.checkpoint.inv_freq()

        def step_of(sample: int) -> Step:
            positions = torch.from_numpy(samples[sample].positions)[None]
            return decoder.step(positions, None, causal_mask(torch.ones_like(positions)))

        return step_of

    def attention_to_firsts(
        self,
        samples: Sequence[CalibrationSample],
        rows: Sequence[Ints],
        expert: str | None,
        weights: Tensor,
        bias: Tensor | None,
        inputs: Inputs,
    ) -> Tensor:
        """Squared attention of an expert's tokens to first tokens, and to all its others, summed, float64 [2].

        rows: of each sample. weights, bias: the expert's queries, keys and values; inputs: of that product.
        """
        spec, step_of, seen = self.spec.decoder, self.steps(samples), torch.zeros(2, dtype=torch.float64)
        for index, sample in enumerate(samples):
            own = np.flatnonzero(sample.vision_mask == (expert == "vision"))
            if not len(own) or own[0] != 0:  # the first token is another expert's
                continue
            step, places = step_of(index), torch.from_numpy(own)
            heads = F.linear(inputs(rows[index][own])[-1], weights, bias).unflatten(-1, (-1, spec.head_dim))
            query, key, _ = heads.transpose(0, 1).split((spec.num_heads, spec.num_kv_heads, spec.num_kv_heads))
            query, key = (rotate(x[None], step.cos[:, places], step.sin[:, places], spec.rope)[0] for x in (query, key))
            scores = query @ key.repeat_interleave(spec.num_heads // spec.num_kv_heads, 0).transpose(1, 2)
            scores.div_(spec.head_dim**0.5).masked_fill_(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
            squared = scores.softmax(-1)[:, 1:].square().sum((0, 1))  # without the first query, which has no choice
            seen += torch.stack((squared[0], squared[1:].sum())).double()
        return seen

    def head(self, flow: Flow) -> None:
        """Quantize the head on the normed rows of the language expert, the only rows whose logits are read."""
        norm = self.load(lambda: RmsNorm(self.spec.decoder.hidden, self.spec.decoder.norm_eps), "decoder.norm")
        self.quantizer.linear(
            "lm_head.weight", flow.tokens, "language", lambda rows: tuple(norm(x) for x in flow.read(rows))
        )

    def _stored(self, rows: Rows) -> Flow:
        return rows.stored().flow

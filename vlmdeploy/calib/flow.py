"""The model's units (encoder layers, connector, decoder layers, head), each run over all calibration tokens while its
linears are quantized stage by stage: a linear's Hessian is made of inputs that went through everything quantized before
it, then it is quantized, and then its tokens pass through the quantized weights. So every linear runs once per token.

Under asymmetric calibration a second stream passes through the float weights beside the first.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmdeploy.calib.activations import Activations, Ints, Pool
from vlmdeploy.calib.calibration_set import CalibrationSample, Pictures, Tokens, read_pixels
from vlmdeploy.calib.statistics import Inputs, chunks
from vlmdeploy.model.checkpoint import Checkpoint
from vlmdeploy.model.connector import build_step
from vlmdeploy.model.decoder import Decoder, DecoderLayer, Expert, LayerCache, RmsNorm, Step, causal_mask
from vlmdeploy.model.vision import ACTIVATIONS, VisionEncoder, VisionLayer
from vlmdeploy.spec.connector import BoundaryRows, Downsample, GatedMlp, Projection
from vlmdeploy.spec.model import ModelSpec

Samples = tuple[CalibrationSample, ...]
Weights = tuple[Tensor, ...]  # of one linear, [out, in]: quantized and, under asymmetric calibration, float


class Quantizer(Protocol):
    """What a unit asks for each of its linears."""

    def linear(self, target: str, tokens: Tokens, expert: str | None, inputs: Inputs) -> Weights:
        """Quantize (or leave) a linear and return the weights for each stream."""

    def unused(self, target: str) -> None:
        """Quantize a linear whose output nothing reads."""


@dataclass
class Flow:
    """What goes from one unit to the next: the rows of every token, for each stream."""

    tokens: Tokens
    states: tuple[Activations, ...]

    def read(self, rows: Ints) -> tuple[Tensor, ...]:
        """Some rows of each stream."""
        return tuple(state.read(rows) for state in self.states)

    def close(self) -> None:
        """Give memory or disk back."""
        for state in self.states:
            state.close()


@dataclass(frozen=True)
class Runner:
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
        return Flow(tokens, tuple(self.pool.make(tokens.count, width) for _ in range(self.streams)))

    def load(self, build: Callable[[], nn.Module], prefix: str, without: tuple[str, ...] = ()) -> nn.Module:
        """A module with the checkpoint's float weights; matrices of submodules named in `without` are left out."""
        with torch.device("meta"):
            module = build()
        left_out = tuple(f"{name}.weight" for name in without)
        names = [name for name in module.state_dict() if not name.endswith(left_out)]
        state = {name: self.checkpoint.parameter(f"{prefix}.{name}") for name in names}
        module.load_state_dict(state, assign=True, strict=False)
        return module

    # ---- vision encoder ----

    def embed_pictures(self, pictures: Pictures) -> Flow:
        """What enters the encoder's first layer: a class token and the patches of every picture."""
        encoder = self.load(lambda: VisionEncoder(replace(self.spec.vision, num_layers=0)), "vision")
        assert isinstance(encoder, VisionEncoder), "what the builder makes"
        flow = self.flow(pictures.tokens(self.spec.vision.num_patches + 1), self.spec.vision.width)
        for index, path in enumerate(pictures.paths):
            embedded = encoder.embed(torch.from_numpy(read_pixels(path, self.spec))[None])[0]
            for state in flow.states:
                state.write(flow.tokens.rows(index), embedded)
        return flow

    def vision_layer(self, index: int, flow: Flow) -> Flow:
        """One encoder layer; the flow is changed."""
        name = f"vision.layers.{index}"
        layer = self.load(lambda: VisionLayer(self.spec.vision), name, ("qkv", "dense", "fc1", "fc2"))
        assert isinstance(layer, VisionLayer), "what the builder makes"
        qkv = self.quantizer.linear(f"{name}.qkv.weight", flow.tokens, None, flow.read)
        mixed = self.flow(flow.tokens, self.spec.vision.width)
        for sample in range(len(flow.tokens.names)):
            rows = flow.tokens.rows(sample)
            for x, weight, out in zip(flow.read(rows), qkv, mixed.states, strict=True):
                out.write(rows, self._vision_attention(F.linear(x, weight, layer.qkv.bias)))
        self._branch(flow, mixed, f"{name}.dense", layer.dense.bias, layer.attention_norm)
        mixed.close()
        fc1 = self.quantizer.linear(f"{name}.fc1.weight", flow.tokens, None, flow.read)
        inner = self.flow(flow.tokens, self.spec.vision.mlp_width)
        activation = ACTIVATIONS[self.spec.vision.activation]
        for piece in chunks(np.arange(flow.tokens.count)):
            for x, weight, out in zip(flow.read(piece), fc1, inner.states, strict=True):
                out.write(piece, activation(F.linear(x, weight, layer.fc1.bias)))
        self._branch(flow, inner, f"{name}.fc2", layer.fc2.bias, layer.mlp_norm)
        inner.close()
        return flow

    def _vision_attention(self, qkv: Tensor) -> Tensor:
        """Unmasked attention of one picture, before `dense`: [seq, 3 * width] -> [seq, width]."""
        heads = (3, self.spec.vision.num_heads, self.spec.vision.head_dim)
        q, k, v = qkv.unflatten(-1, heads).permute(1, 2, 0, 3)  # each [heads, seq, head_dim]
        return F.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1).flatten(1)

    def _branch(self, flow: Flow, inner: Flow, name: str, bias: Tensor, norm: nn.Module) -> None:
        """Quantize the linear that ends a branch and add its normed output to the flow."""
        weights = self.quantizer.linear(f"{name}.weight", flow.tokens, None, inner.read)
        for piece in chunks(np.arange(flow.tokens.count)):
            for x, weight, out in zip(inner.read(piece), weights, flow.states, strict=True):
                out.add(piece, norm(F.linear(x, weight, bias)))

    # ---- connector ----

    def connector(self, flow: Flow, pictures: Pictures) -> Flow:
        """Encoder output to decoder rows, boundary rows included: a new flow; the old one is closed."""
        current = self._without_class(flow, pictures)
        for step in self.spec.connector.steps:
            name = f"connector.{step.name}"
            match step:
                case Downsample():
                    current = self._downsample(current, pictures, name, step)
                case Projection():
                    current = self._plain_linear(current, f"{name}.weight", step.out_width)
                case GatedMlp():
                    product = self._gated(current, name, step.mlp_width)
                    current = self._plain_linear(product, f"{name}.down.weight", step.out_width)
                case BoundaryRows():
                    current = self._boundary(current, pictures, name, step)
                case _:
                    module = self.load(lambda step=step: build_step(step), name)  # type: ignore[misc]
                    self._elementwise(current, module)
        return current

    def _without_class(self, flow: Flow, pictures: Pictures) -> Flow:
        patches = self.flow(pictures.tokens(self.spec.vision.num_patches), self.spec.vision.width)
        for index in range(len(pictures.paths)):
            for x, out in zip(flow.read(flow.tokens.rows(index)[1:]), patches.states, strict=True):
                out.write(patches.tokens.rows(index), x)
        flow.close()
        return patches

    def _downsample(self, flow: Flow, pictures: Pictures, name: str, step: Downsample) -> Flow:
        """The 2 x 2 convolution as a linear over blocks of four neighbours, channel slowest."""
        side = self.spec.vision.grid
        half = side // 2
        blocks = self.flow(pictures.tokens(half * half), 4 * step.in_width)
        for index in range(len(pictures.paths)):
            for x, out in zip(flow.read(flow.tokens.rows(index)), blocks.states, strict=True):
                grid = x.unflatten(0, (side, side))[: 2 * half, : 2 * half]
                parts = grid.unflatten(0, (half, 2)).unflatten(2, (half, 2))  # [half, 2, half, 2, in]
                out.write(blocks.tokens.rows(index), parts.permute(0, 2, 4, 1, 3).flatten(2).flatten(0, 1))
        flow.close()
        bias = self.checkpoint.parameter(f"{name}.bias")
        return self._plain_linear(blocks, f"{name}.weight", step.out_width, bias)

    def _plain_linear(self, flow: Flow, target: str, width: int, bias: Tensor | None = None) -> Flow:
        """One linear over all tokens: a new flow; the old one is closed."""
        weights = self.quantizer.linear(target, flow.tokens, None, flow.read)
        result = self.flow(flow.tokens, width)
        for piece in chunks(np.arange(flow.tokens.count)):
            for x, weight, out in zip(flow.read(piece), weights, result.states, strict=True):
                out.write(piece, F.linear(x, weight, bias))
        flow.close()
        return result

    def _gated(self, flow: Flow, name: str, width: int) -> Flow:
        """silu(gate(x)) * up(x): a new flow; the old one is closed."""
        weights = self.quantizer.linear(f"{name}.gate_up.weight", flow.tokens, None, flow.read)
        result = self.flow(flow.tokens, width)
        for piece in chunks(np.arange(flow.tokens.count)):
            for x, weight, out in zip(flow.read(piece), weights, result.states, strict=True):
                out.write(piece, gated_product(x, weight))
        flow.close()
        return result

    def _elementwise(self, flow: Flow, module: nn.Module) -> None:
        for piece in chunks(np.arange(flow.tokens.count)):
            for state in flow.states:
                state.write(piece, module(state.read(piece)))

    def _boundary(self, flow: Flow, pictures: Pictures, name: str, step: BoundaryRows) -> Flow:
        module = self.load(lambda: build_step(step), name)
        rows_each = flow.tokens.count // max(1, len(pictures.paths)) + 2
        result = self.flow(pictures.tokens(rows_each), step.width)
        for index in range(len(pictures.paths)):
            for x, out in zip(flow.read(flow.tokens.rows(index)), result.states, strict=True):
                out.write(result.tokens.rows(index), module(x[None])[0])
        flow.close()
        return result

    # ---- decoder ----

    def embed_prompts(self, samples: Samples, tokens: Tokens, images: Flow, pictures: Pictures) -> Flow:
        """What enters decoder layer 0: embeddings, and each picture's rows where the type is 1."""
        flow = self.flow(tokens, self.spec.decoder.hidden)
        number_of = {path: index for index, path in enumerate(pictures.paths)}
        table: dict[int, Tensor] = {}  # the rows of the embedding that occur
        for index, sample in enumerate(samples):
            rows, is_text = tokens.rows(index), sample.types == 0
            for token in sample.ids[is_text].tolist():
                if token not in table:
                    table[token] = self.checkpoint.rows("embedding.weight", token, token + 1)
            text = torch.cat([table[token] for token in sample.ids[is_text].tolist()])
            for state in flow.states:
                state.write(rows[is_text], text)
            if sample.image is not None:
                image_rows = images.tokens.rows(number_of[sample.image])
                for values, state in zip(images.read(image_rows), flow.states, strict=True):
                    state.write(rows[~is_text], values)
        return flow

    def decoder_layer(self, index: int, flow: Flow, samples: Samples) -> Flow:
        """One decoder layer; the flow is changed."""
        name, is_last = f"decoder.layers.{index}", index == self.spec.decoder.num_layers - 1
        without = ("qkv", "dense", "gate_up", "down")
        layer = self.load(lambda: DecoderLayer(self.spec.decoder), name, without)
        assert isinstance(layer, DecoderLayer), "what the builder makes"
        mixed = self._attention(name, layer, flow, samples)
        # Nothing reads what the last layer's vision expert makes of its rows, so those weights are not calibrated.
        experts = [expert.name for expert in self.spec.decoder.experts if not (is_last and expert.name == "vision")]
        for expert in set(layer.expert_names) - set(experts):
            for linear in without[1:]:
                self.quantizer.unused(f"{name}.{expert}.{linear}.weight")
        for expert in experts:
            self._add_output(flow, mixed, f"{name}.{expert}.dense.weight", expert)
        mixed.close()
        product = self.flow(flow.tokens, self.spec.decoder.mlp_width)
        normed: Inputs = lambda rows: tuple(layer.mlp_norm(x) for x in flow.read(rows))  # noqa: E731
        for expert in experts:
            weights = self.quantizer.linear(f"{name}.{expert}.gate_up.weight", flow.tokens, expert, normed)
            for piece in expert_chunks(flow.tokens, expert):
                for x, weight, out in zip(normed(piece), weights, product.states, strict=True):
                    out.write(piece, gated_product(x, weight))
        for expert in experts:
            self._add_output(flow, product, f"{name}.{expert}.down.weight", expert)
        product.close()
        return flow

    def _attention(self, name: str, layer: DecoderLayer, flow: Flow, samples: Samples) -> Flow:
        """QKV of every expert, then attention sample by sample: the rows before `dense`."""
        normed: Inputs = lambda rows: tuple(layer.attention_norm(x) for x in flow.read(rows))  # noqa: E731
        weights = {
            expert: self.quantizer.linear(f"{name}.{expert}.qkv.weight", flow.tokens, expert, normed)
            for expert in layer.expert_names
        }
        mixed = self.flow(flow.tokens, self.spec.decoder.num_heads * self.spec.decoder.head_dim)
        for sample, step in enumerate(self.steps(samples)):
            rows = flow.tokens.rows(sample)
            is_vision = torch.from_numpy(flow.tokens.vision_mask[rows])
            for stream, x in enumerate(normed(rows)):
                qkv = x.new_empty(len(x), self.spec.decoder.qkv_width)
                for expert in layer.expert_names:
                    module: Expert = layer.get_submodule(expert)  # type: ignore[assignment]
                    places = is_vision if expert == "vision" else ~is_vision
                    qkv[places] = F.linear(x[places], weights[expert][stream], module.qkv.bias)
                mixed.states[stream].write(rows, layer.attention(qkv[None], step, LayerCache())[0])
        return mixed

    def _add_output(self, flow: Flow, inner: Flow, target: str, expert: str) -> None:
        """Quantize the linear that ends a branch and add its output to the expert's rows."""
        weights = self.quantizer.linear(target, flow.tokens, expert, inner.read)
        for piece in expert_chunks(flow.tokens, expert):
            for x, weight, out in zip(inner.read(piece), weights, flow.states, strict=True):
                out.add(piece, F.linear(x, weight))

    def steps(self, samples: Samples) -> Iterator[Step]:
        """Rotary tables and causal mask of every sample, one after the other."""
        decoder = Decoder(replace(self.spec.decoder, num_layers=0))
        decoder.inv_freq = self.checkpoint.inv_freq()
        for sample in samples:
            positions = torch.from_numpy(sample.positions)[None]
            yield decoder.step(positions, None, causal_mask(torch.ones_like(positions)))

    def head(self, flow: Flow) -> None:
        """The head, calibrated on the normed rows of the language expert: no other row is ever asked for logits."""
        norm = self.load(lambda: RmsNorm(self.spec.decoder.hidden, self.spec.decoder.norm_eps), "decoder.norm")
        self.quantizer.linear(
            "lm_head.weight", flow.tokens, "language", lambda rows: tuple(norm(x) for x in flow.read(rows))
        )


def expert_chunks(tokens: Tokens, expert: str) -> Iterable[Ints]:
    """All rows of an expert, held-out ones too, in pieces."""
    return chunks(np.flatnonzero(tokens.vision_mask == (expert == "vision")))


def gated_product(x: Tensor, gate_up: Tensor) -> Tensor:
    """silu(gate(x)) * up(x), gate and up in one matrix: [rows, in] -> [rows, mlp]."""
    gate, up = F.linear(x, gate_up).chunk(2, -1)
    return F.silu(gate) * up

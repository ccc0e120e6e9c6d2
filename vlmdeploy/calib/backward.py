"""Backpropagate sampled answers through the float model, one unit in memory at a time."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmdeploy.calib.activations import Ints
from vlmdeploy.calib.calibration_set import CalibrationSample, Pictures
from vlmdeploy.calib.flow import Flow
from vlmdeploy.calib.units import UnitRunner
from vlmdeploy.model.connector import Connector
from vlmdeploy.model.decoder import DecoderLayer, LayerCache, RmsNorm, Step
from vlmdeploy.model.products import PRODUCTS
from vlmdeploy.model.vision import VisionLayer

Note = Callable[[str, Tensor, Ints | None], None]
"""Takes a linear's name, gradients at its output, [rows, out], and in the decoder the numbers of these rows."""


@dataclass(frozen=True)
class BackwardPass:
    """Calls `note` with the gradients of the log-probability of one sampled answer per sample.

    All steps take and return gradients at a unit's output, as rows of the forward pass.
    """

    runner: UnitRunner
    samples: tuple[CalibrationSample, ...]
    note: Note
    seed: int

    def head(self, last: Flow) -> tuple[int, Flow]:
        """The number of answer tokens, and the gradient at the last decoder layer. last: its output rows."""
        runner, count = self.runner, 0
        gradient = runner.flow(last.tokens, last.width)
        norm = runner.load(lambda: RmsNorm(runner.spec.decoder.hidden, runner.spec.decoder.norm_eps), "decoder.norm")
        norm.requires_grad_(False)
        weight = runner.checkpoint.parameter("lm_head.weight")
        random = torch.Generator().manual_seed(self.seed)
        for index, sample in enumerate(self.samples):
            rows = last.tokens.rows(index)[sample.answer_start - 1 :]
            with torch.enable_grad():
                x = last.states[0].read(rows).requires_grad_()
                logits = F.linear(norm(x), weight)
                logits.retain_grad()
                drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=random)[:, 0]
                F.cross_entropy(logits, drawn, reduction="sum").backward()
            assert x.grad is not None and logits.grad is not None, "set by the backward pass"
            gradient.states[0].write(rows, x.grad)
            self.note("lm_head.weight", logits.grad, rows)
            count += len(rows)
        return count, gradient

    def decoder_layer(self, index: int, inputs: Flow, gradient: Flow) -> None:
        """Replace the gradient at the layer's output with that at its input. inputs: its input rows."""
        name, spec = f"decoder.layers.{index}", self.runner.spec.decoder
        layer = self.runner.load(lambda: DecoderLayer(spec), name).requires_grad_(False)
        assert isinstance(layer, DecoderLayer), "what the builder makes"
        step_of, tokens = self.runner.steps(self.samples), inputs.tokens
        for sample in range(len(self.samples)):
            rows, step = tokens.rows(sample), step_of(sample)
            is_vision = tokens.vision_mask[rows]
            mask = torch.from_numpy(is_vision)[None] if is_vision.any() else None
            routed = Step(step.cos, step.sin, mask, step.attention_mask)
            with self._watched(layer, name, {"vision": rows[is_vision], "language": rows[~is_vision]}):
                self._through(_one_prompt(layer, routed), inputs, gradient, rows)

    def vision(self, layer_inputs: list[Flow], features: Flow, pictures: Pictures, gradient: Flow) -> None:
        """Connector and encoder. gradient: at the input of decoder layer 0; sums those of all prompts about a picture.

        layer_inputs: the input rows of each encoder layer; features: those of the connector.
        """
        runner, spec = self.runner, self.runner.spec
        back = runner.flow(features.tokens, spec.vision.width)
        connector = runner.load(lambda: Connector(spec.connector), "connector").requires_grad_(False)
        number_of = {path: index for index, path in enumerate(pictures.paths)}
        sums: dict[int, Tensor] = {}
        for index, sample in enumerate(self.samples):
            if sample.image is not None:
                rows = gradient.tokens.rows(index)[sample.types == 1]
                place = number_of[sample.image]
                sums[place] = sums.get(place, torch.zeros(())) + gradient.states[0].read(rows)
        with self._watched(connector, "connector"):
            for place, total in sums.items():
                rows = features.tokens.rows(place)
                with torch.enable_grad():
                    x = features.states[0].read(rows).requires_grad_()
                    connector(x[None, 1:]).backward(total[None])
                assert x.grad is not None, "set by the backward pass"
                back.states[0].write(rows, x.grad)
        for index in reversed(range(len(layer_inputs))):
            name = f"vision.layers.{index}"
            layer = runner.load(lambda: VisionLayer(spec.vision), name).requires_grad_(False)
            with self._watched(layer, name):
                for place in range(len(pictures.paths)):
                    rows = features.tokens.rows(place)
                    self._through(_one_picture(layer), layer_inputs[index], back, rows)
        back.close()

    @contextmanager
    def _watched(self, module: nn.Module, prefix: str, rows: Mapping[str, Ints] | None = None) -> Iterator[None]:
        """Note the gradient at every linear of `module` during backward passes in this block. rows: of each expert."""

        def noted(part: str) -> Callable[[nn.Module, object, tuple[Tensor, ...]], None]:
            own = None if rows is None else rows[part.partition(".")[0]]
            return lambda module, inputs, gradients: self.note(
                f"{prefix}.{part}.weight", gradients[0].flatten(0, -2), own
            )

        parts = [(part, child) for part, child in module.named_modules() if isinstance(child, PRODUCTS)]
        handles = [child.register_full_backward_hook(noted(part)) for part, child in parts]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _through(self, function: Callable[[Tensor], Tensor], inputs: Flow, gradient: Flow, rows: Ints) -> None:
        """Replace the gradient at a unit's output with the gradient at its input, for some rows."""
        with torch.enable_grad():
            x = inputs.states[0].read(rows).requires_grad_()
            function(x).backward(gradient.states[0].read(rows))
        assert x.grad is not None, "set by the backward pass"
        gradient.states[0].write(rows, x.grad)


def _one_prompt(layer: DecoderLayer, step: Step) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x[None], step, LayerCache())[0]


def _one_picture(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x[None])[0]

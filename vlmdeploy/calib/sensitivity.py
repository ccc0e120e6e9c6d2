"""The cost of quantizing one linear on a given grid: a second-order estimate of the KL divergence from the float model.

Two measurements, both streamed layer by layer. A forward pass gives every linear's Hessian H, hence the error of each
output on each grid. A backward pass of log p(token), with tokens sampled from the model, gives the mean squared
gradient g_n^2 at each output (the diagonal of the Fisher information). The cost per answer token is
1/2 * tokens * sum_n g_n^2 (E H E^T)_nn, assuming independent errors of the outputs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmdeploy.calib.activations import Ints
from vlmdeploy.calib.calibration_set import CalibrationSample, Pictures, Tokens, pictures_of
from vlmdeploy.calib.flow import Flow, Quantizer, Weights
from vlmdeploy.calib.perplexity import hidden_states
from vlmdeploy.calib.solver import judged_rows
from vlmdeploy.calib.statistics import Inputs, Statistics
from vlmdeploy.calib.units import UnitRunner
from vlmdeploy.model.checkpoint import Checkpoint
from vlmdeploy.model.connector import Connector
from vlmdeploy.model.decoder import DecoderLayer, LayerCache, RmsNorm, Step
from vlmdeploy.model.products import PRODUCTS
from vlmdeploy.model.vision import VisionLayer
from vlmdeploy.overriding import override
from vlmdeploy.progress import Progress
from vlmdeploy.quant.gptq import GptqOptions, best_loops, factorize, quantize_gptq
from vlmdeploy.quant.grid import Grid, dequantize

DAMPING = 0.01


@dataclass
class ErrorMeter(Quantizer):
    """A quantizer that keeps linears in float and records the error of each judged row on every candidate grid."""

    checkpoint: Checkpoint
    statistics: Statistics
    grids: Callable[[str], list[Grid]]
    errors: dict[str, dict[Grid, Tensor]] = field(default_factory=dict)

    @override
    def linear(self, target: str, tokens: Tokens, expert: str | None, inputs: Inputs) -> Weights:
        weights = self.checkpoint.parameter(target).flatten(1)
        grids = self.grids(target)
        if grids:
            problem = self.statistics.problem(target, weights, grids[0], tokens, expert, inputs)
            if problem.tokens:
                self.errors[target] = _row_errors(weights, problem.hessian, grids)
        return (weights,)

    @override
    def unused(self, target: str) -> None:
        pass  # no output, no cost


def _row_errors(weights: Tensor, hessian: Tensor, grids: list[Grid]) -> dict[Grid, Tensor]:
    """(E H E^T)_nn of the judged rows, for each grid."""
    judged, factor, loops = weights[judged_rows(len(weights))], factorize(hessian, DAMPING), best_loops()
    errors = {}
    for grid in grids:
        codes = quantize_gptq(judged, factor, grid, GptqOptions(sweeps=0), hessian, loops)
        error = torch.from_numpy(dequantize(codes)) - judged
        errors[grid] = ((error @ hessian) * error).sum(1)
    return errors


@dataclass
class GradientMeter:
    """Accumulates squared gradients at the outputs of linears, by parameter name."""

    squares: dict[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def watching(self, module: nn.Module, prefix: str) -> Iterator[None]:
        """Record the gradient at every linear of `module` during backward passes in this block."""
        handles = [
            child.register_full_backward_hook(self._noted(f"{prefix}.{name}.weight"))
            for name, child in module.named_modules()
            if isinstance(child, PRODUCTS)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _noted(self, target: str) -> Callable[[nn.Module, object, tuple[Tensor, ...]], None]:
        def note(module: nn.Module, inputs: object, gradients: tuple[Tensor, ...]) -> None:
            self.add(target, gradients[0].flatten(0, -2))

        return note

    def add(self, target: str, gradient: Tensor) -> None:
        """Add the gradients of some tokens, [rows, out]."""
        total = self.squares.setdefault(target, torch.zeros(gradient.shape[1]))
        total += gradient.detach().square().sum(0)


@dataclass(frozen=True)
class BackwardPass:
    """Backpropagates sampled answers through all units, one unit in memory at a time."""

    runner: UnitRunner
    samples: tuple[CalibrationSample, ...]
    pictures: Pictures
    meter: GradientMeter
    seed: int

    def run(self, vision_inputs: list[Flow], features: Flow, decoder_inputs: list[Flow], last: Flow) -> int:
        """Fill the meter and return the number of answer tokens. Takes the layers' input rows of the forward pass."""
        count, gradient = self._head(last)
        for index in reversed(range(len(decoder_inputs))):
            self._decoder_layer(index, decoder_inputs[index], gradient)
        self._vision(vision_inputs, features, gradient)
        return count

    def _head(self, last: Flow) -> tuple[int, Flow]:
        runner, count = self.runner, 0
        gradient = runner.flow(last.tokens, last.states[0].width)
        norm = runner.load(lambda: RmsNorm(runner.spec.decoder.hidden, runner.spec.decoder.norm_eps), "decoder.norm")
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
            self.meter.add("lm_head.weight", logits.grad)
            count += len(rows)
        return count, gradient

    def _decoder_layer(self, index: int, inputs: Flow, gradient: Flow) -> None:
        name, spec = f"decoder.layers.{index}", self.runner.spec.decoder
        layer = self.runner.load(lambda: DecoderLayer(spec), name)
        assert isinstance(layer, DecoderLayer), "what the builder makes"
        with self.meter.watching(layer, name):
            step_of = self.runner.steps(self.samples)
            for sample in range(len(self.samples)):
                rows, step = inputs.tokens.rows(sample), step_of(sample)
                mask = torch.from_numpy(inputs.tokens.vision_mask[rows])[None]
                routed = Step(step.cos, step.sin, mask if bool(mask.any()) else None, step.attention_mask)
                self._through(_one_prompt(layer, routed), inputs, gradient, rows)

    def _through(self, function: Callable[[Tensor], Tensor], inputs: Flow, gradient: Flow, rows: Ints) -> None:
        """Replace the gradient at a unit's output with the gradient at its input, for some rows."""
        with torch.enable_grad():
            x = inputs.states[0].read(rows).requires_grad_()
            function(x).backward(gradient.states[0].read(rows))
        assert x.grad is not None, "set by the backward pass"
        gradient.states[0].write(rows, x.grad)

    def _vision(self, layer_inputs: list[Flow], features: Flow, gradient: Flow) -> None:
        """Connector and encoder. Sums the gradients of all prompts about a picture."""
        runner, spec = self.runner, self.runner.spec
        back = runner.flow(features.tokens, spec.vision.width)
        connector = runner.load(lambda: Connector(spec.connector), "connector")
        number_of = {path: index for index, path in enumerate(self.pictures.paths)}
        sums: dict[int, Tensor] = {}
        for index, sample in enumerate(self.samples):
            if sample.image is not None:
                rows = gradient.tokens.rows(index)[sample.types == 1]
                place = number_of[sample.image]
                sums[place] = sums.get(place, torch.zeros(())) + gradient.states[0].read(rows)
        with self.meter.watching(connector, "connector"):
            for place, total in sums.items():
                rows = features.tokens.rows(place)
                with torch.enable_grad():
                    x = features.states[0].read(rows).requires_grad_()
                    connector(x[None, 1:]).backward(total[None])
                assert x.grad is not None, "set by the backward pass"
                back.states[0].write(rows, x.grad)
        for index in reversed(range(len(layer_inputs))):
            name = f"vision.layers.{index}"
            layer = runner.load(lambda: VisionLayer(spec.vision), name)
            with self.meter.watching(layer, name):
                for place in range(len(self.pictures.paths)):
                    rows = features.tokens.rows(place)
                    self._through(_one_picture(layer), layer_inputs[index], back, rows)
        back.close()


def _one_prompt(layer: DecoderLayer, step: Step) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x[None], step, LayerCache())[0]


def _one_picture(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x[None])[0]


@torch.no_grad()
def measure_costs(
    runner: UnitRunner, meter: ErrorMeter, samples: tuple[CalibrationSample, ...], seed: int, progress: Progress
) -> dict[str, dict[Grid, float]]:
    """Estimate the KL divergence per answer token of every linear and grid. runner: has `meter` as its quantizer."""
    num_vision = runner.spec.vision.num_layers
    total = 2 * (num_vision + runner.spec.decoder.num_layers)
    kept: list[Flow] = []
    last = hidden_states(
        runner,
        samples,
        lambda _, done, all_layers: progress("sensitivity, forward", done, total),
        lambda flow: kept.append(_copy(runner, flow)),
    )
    runner.head(last)
    progress("sensitivity, backward", total // 2, total)
    gradients = GradientMeter()
    vision_inputs, features, decoder_inputs = kept[:num_vision], kept[num_vision], kept[num_vision + 1 :]
    backward = BackwardPass(runner, samples, pictures_of(samples), gradients, seed)
    answers = backward.run(vision_inputs, features, decoder_inputs, last)
    for flow in (*kept, last):
        flow.close()
    return _costs(meter, gradients, answers)


def _copy(runner: UnitRunner, flow: Flow) -> Flow:
    copied = runner.flow(flow.tokens, flow.width)
    for rows in flow.chunks():
        copied.write(rows, flow.read(rows))
    return copied


def _costs(meter: ErrorMeter, gradients: GradientMeter, answers: int) -> dict[str, dict[Grid, float]]:
    """1/2 * sum over tokens and outputs of squared gradient times squared error, per answer token.

    Extrapolated from the judged rows to all rows.
    """
    costs: dict[str, dict[Grid, float]] = {}
    for target, errors in meter.errors.items():
        squares = gradients.squares.get(target)
        if squares is None:
            continue
        judged = squares[judged_rows(len(squares))]
        scale = len(squares) / len(judged) / (2 * max(1, answers))
        costs[target] = {grid: scale * float((judged * error).sum()) for grid, error in errors.items()}
    return costs

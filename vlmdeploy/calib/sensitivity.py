"""The cost of quantizing one linear on a given grid: a second-order estimate of the KL divergence from the float model.

Two measurements, both streamed layer by layer. A forward pass gives every linear's Hessian H, hence the error of each
output on each grid. A backward pass of log p(token), with tokens sampled from the model, gives the mean squared
gradient g_n^2 at each output (the diagonal of the Fisher information). The cost per answer token is
1/2 * tokens * sum_n g_n^2 (E H E^T)_nn, assuming independent errors of the outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlmdeploy.calib.activations import Ints
from vlmdeploy.calib.backward import BackwardPass
from vlmdeploy.calib.calibration_set import CalibrationSample, Tokens, pictures_of
from vlmdeploy.calib.flow import Flow, Quantizer, Weights
from vlmdeploy.calib.perplexity import hidden_states
from vlmdeploy.calib.solver import judged_rows
from vlmdeploy.calib.statistics import Inputs, Statistics
from vlmdeploy.calib.units import UnitRunner
from vlmdeploy.model.checkpoint import Checkpoint
from vlmdeploy.overriding import override
from vlmdeploy.progress import Progress
from vlmdeploy.quant.gptq import GptqOptions, best_loops, factorize, quantize_gptq
from vlmdeploy.quant.grid import Grid, dequantize

DAMPING = 0.01


@dataclass
class ErrorMeter(Quantizer):
    """A quantizer that keeps linears in float and records the error of each judged row on every candidate grid.

    signed: see `quant.gptq.GptqOptions`.
    """

    checkpoint: Checkpoint
    statistics: Statistics
    grids: Callable[[str], list[Grid]]
    signed: bool = True
    errors: dict[str, dict[Grid, Tensor]] = field(default_factory=dict)

    @override
    def linear(self, target: str, tokens: Tokens, expert: str | None, inputs: Inputs) -> Weights:
        weights = self.checkpoint.parameter(target).flatten(1)
        grids = self.grids(target)
        if grids:
            problem = self.statistics.problem(target, weights, grids[0], tokens, expert, inputs)
            if problem.tokens:
                self.errors[target] = _row_errors(weights, problem.hessian, grids, self.signed)
        return (weights,)

    @override
    def unused(self, target: str) -> None:
        pass  # no output, no cost


def _row_errors(weights: Tensor, hessian: Tensor, grids: list[Grid], signed: bool) -> dict[Grid, Tensor]:
    """(E H E^T)_nn of the judged rows, for each grid."""
    judged, factor, loops = weights[judged_rows(len(weights))], factorize(hessian, DAMPING), best_loops()
    errors = {}
    for grid in grids:
        codes = quantize_gptq(judged, factor, grid, GptqOptions(sweeps=0, signed=signed), hessian, loops)
        error = torch.from_numpy(dequantize(codes)) - judged
        errors[grid] = ((error @ hessian) * error).sum(1)
    return errors


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
    squares: dict[str, Tensor] = {}  # of the gradients at each linear's outputs, summed over the tokens

    def note(target: str, gradient: Tensor, rows: Ints | None) -> None:
        squares[target] = squares.get(target, torch.zeros(())) + gradient.square().sum(0)

    vision_inputs, features, decoder_inputs = kept[:num_vision], kept[num_vision], kept[num_vision + 1 :]
    backward = BackwardPass(runner, samples, note, seed)
    answers, back = backward.head(last)
    for index in reversed(range(len(decoder_inputs))):
        backward.decoder_layer(index, decoder_inputs[index], back)
    backward.vision(vision_inputs, features, pictures_of(samples), back)
    for flow in (*kept, last, back):
        flow.close()
    return _costs(meter, squares, answers)


def _copy(runner: UnitRunner, flow: Flow) -> Flow:
    copied = runner.flow(flow.tokens, flow.width)
    for rows in flow.chunks():
        copied.write(rows, flow.read(rows))
    return copied


def _costs(meter: ErrorMeter, gradients: dict[str, Tensor], answers: int) -> dict[str, dict[Grid, float]]:
    """1/2 * sum over tokens and outputs of squared gradient times squared error, per answer token.

    Extrapolated from the judged rows to all rows.
    """
    costs: dict[str, dict[Grid, float]] = {}
    for target, errors in meter.errors.items():
        squares = gradients.get(target)
        if squares is None:
            continue
        judged = squares[judged_rows(len(squares))]
        scale = len(squares) / len(judged) / (2 * max(1, answers))
        costs[target] = {grid: scale * float((judged * error).sum()) for grid, error in errors.items()}
    return costs

"""The float model's perplexity of each sample's answer, computed with one layer in memory at a time."""

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from vlmdeploy.calib.activations import Pool
from vlmdeploy.calib.calibration_set import CalibrationSample, Pictures, Tokens, pictures_of, prompt_tokens
from vlmdeploy.calib.flow import Flow, Quantizer, Weights
from vlmdeploy.calib.statistics import Inputs
from vlmdeploy.calib.units import UnitRunner
from vlmdeploy.model.checkpoint import Checkpoint
from vlmdeploy.model.decoder import RmsNorm
from vlmdeploy.overriding import override
from vlmdeploy.progress import Progress


class FloatWeights(Quantizer):
    """A quantizer that keeps every linear in float."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    @override
    def linear(self, target: str, tokens: Tokens, expert: str | None, inputs: Inputs) -> Weights:
        return (self._checkpoint.parameter(target).flatten(1),)

    @override
    def unused(self, target: str) -> None:
        pass


@torch.no_grad()
def answer_perplexities(
    checkpoint: Checkpoint, samples: tuple[CalibrationSample, ...], pool: Pool, progress: Progress
) -> list[float]:
    """The perplexity of every sample's answer; Inf without an answer."""
    runner = UnitRunner(checkpoint, FloatWeights(checkpoint), pool)
    flow = hidden_states(runner, samples, progress)
    norm = runner.load(lambda: RmsNorm(runner.spec.decoder.hidden, runner.spec.decoder.norm_eps), "decoder.norm")
    head = checkpoint.parameter("lm_head.weight")
    scores = []
    for index, sample in enumerate(samples):
        rows = flow.tokens.rows(index)[sample.answer_start - 1 : -1]
        if not len(rows):
            scores.append(float("inf"))
            continue
        logits = F.linear(norm(flow.states[0].read(rows)), head)
        answer = torch.from_numpy(sample.ids[sample.answer_start :])
        scores.append(float(np.exp(float(F.cross_entropy(logits, answer)))))
    flow.close()
    return scores


def hidden_states(
    runner: UnitRunner,
    samples: tuple[CalibrationSample, ...],
    progress: Progress,
    watch: Callable[[Flow], None] = lambda flow: None,
) -> Flow:
    """The output rows of the last decoder layer. watch: called with the input of each layer and of the connector."""
    num_vision, num_layers = runner.spec.vision.num_layers, runner.spec.decoder.num_layers
    total = num_vision + num_layers
    flow = prompt_rows(
        runner,
        samples,
        pictures_of(samples),
        prompt_tokens(samples),
        lambda index: progress("perplexity", index, total),
        watch,
    )
    for index in range(num_layers):
        progress("perplexity", num_vision + index, total)
        watch(flow)
        flow = runner.decoder_layer(index, flow, samples)
    return flow


def prompt_rows(
    runner: UnitRunner,
    samples: tuple[CalibrationSample, ...],
    pictures: Pictures,
    tokens: Tokens,
    begin: Callable[[int], None] = lambda index: None,
    watch: Callable[[Flow], None] = lambda flow: None,
) -> Flow:
    """The input rows of decoder layer 0. begin: called with the number of each encoder layer before it runs."""
    flow = runner.embed_pictures(pictures)
    for index in range(runner.spec.vision.num_layers):
        begin(index)
        watch(flow)
        flow = runner.vision_layer(index, flow)
    watch(flow)
    images = runner.connector(flow)
    flow = runner.embed_prompts(samples, tokens, images, pictures)
    images.close()
    return flow

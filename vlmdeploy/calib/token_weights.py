"""What each token counts in the Hessians of the decoder's linears under `--quality best`: the size of its gradient.

One forward and one backward pass of the float model before any linear is quantized: docs/design/0013-token-weights.md.
Each decoder layer is a unit of the run in either direction, so that a killed run goes on at the layer it was in. The
rows of every layer are on disk until the backward pass has used them.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlmdeploy.byte_sizes import shown_size
from vlmdeploy.calib.activations import FLOAT_BYTES, Ints, Pool
from vlmdeploy.calib.backward import BackwardPass
from vlmdeploy.calib.calibration_set import CalibrationSample, Pictures, Tokens, prompt_tokens
from vlmdeploy.calib.flow import Flow
from vlmdeploy.calib.perplexity import FloatWeights, prompt_rows
from vlmdeploy.calib.processes import Processes
from vlmdeploy.calib.units import UnitRunner
from vlmdeploy.errors import CalibrationError
from vlmdeploy.model.checkpoint import Checkpoint
from vlmdeploy.runtime.memory import available_bytes
from vlmdeploy.spec.matrices import decoder_matrices

SEED = 0  # of the sampled answers
SAME_FOR_ALL = 0.2  # of a mean weight: what a token counts whose gradient is nothing
FORWARD, BACKWARD = "float", "gradient"
PROMPTS, HEAD = f"{FORWARD}.prompts", f"{BACKWARD}.head"


@dataclass(frozen=True)
class TokenWeights:
    """Measures the weights. load: the output rows of a finished unit."""

    checkpoint: Checkpoint
    samples: tuple[CalibrationSample, ...]
    pictures: Pictures
    tokens: Tokens
    pool: Pool
    processes: Processes
    load: Callable[[str], Flow]

    @property
    def units(self) -> list[str]:
        """Forward, then backward."""
        return [*self._rows, HEAD, *(f"{BACKWARD}.{layer}" for layer in reversed(self._layers))]

    @property
    def _layers(self) -> list[str]:
        return [f"decoder.layers.{index}" for index in range(self.checkpoint.spec.decoder.num_layers)]

    @property
    def _rows(self) -> list[str]:
        """The forward units: each one's output rows are the input of the next layer."""
        return [PROMPTS, *(f"{FORWARD}.{layer}" for layer in self._layers)]

    def kept(self, unit: str) -> list[str]:
        """The units whose output rows are still needed once this one is finished."""
        if unit in self._rows:
            return self._rows[: self._rows.index(unit)]
        return self._rows[: self._index(unit)] if unit in self.units else []

    def _index(self, unit: str) -> int:
        """How many decoder layers are left for the backward pass after this one."""
        return len(self._layers) if unit == HEAD else self._layers.index(unit.removeprefix(f"{BACKWARD}."))

    def outlook(self, folder: Path) -> str:
        """What measuring takes. Raises CalibrationError if the disk of `folder` or the memory is too small."""
        spec = self.checkpoint.spec.decoder
        (tokens,) = self.processes.sum_counts(self.tokens.count)
        disk = (len(self._rows) + 4) * tokens * spec.hidden * FLOAT_BYTES  # each layer's rows, and what is in use
        memory = self.processes.count * (self.pool.limit_bytes + self._backward_bytes())
        self.processes.first_does(lambda: self._check(folder, disk, memory))
        minutes = f"{self._seconds() / 60:,.0f}"
        return f"token weights: about {minutes} min and {shown_size(disk)} of disk before the first linear"

    def _check(self, folder: Path, disk: int, memory: int) -> None:
        free = shutil.disk_usage(folder).free
        if disk > free:
            raise CalibrationError(
                f"{folder}: --quality best stores the rows of every decoder layer there, {shown_size(disk)}, but "
                f"{shown_size(free)} are free; use --quality high, or fewer --tokens"
            )
        free = available_bytes()
        if memory > free:
            raise CalibrationError(
                f"--quality best: the backward pass takes about {shown_size(memory)} of memory, but "
                f"{shown_size(free)} are available; use --quality high, or a smaller --max-memory"
            )

    def _backward_bytes(self) -> int:
        """An estimate: one layer or the head, and what autograd keeps of the longest sample."""
        spec, rows = self.checkpoint.spec.decoder, int(np.diff(self.tokens.offsets).max(initial=0))
        weights = sum(linear.out_width * linear.in_width for linear in decoder_matrices(spec, 0))
        layer = weights + 3 * spec.num_heads * rows**2 + 4 * rows * (4 * spec.hidden + 3 * spec.mlp_width)
        head = self.checkpoint.size("lm_head.weight") * (1 + 4 * rows / spec.hidden)
        return FLOAT_BYTES * int(max(layer, head))

    def _seconds(self) -> float:
        """An estimate for the decoder, from one layer without samples and with one of the median length."""
        layers, lengths = self.checkpoint.spec.decoder.num_layers, [len(sample.ids) for sample in self.samples]
        loading = self._seconds_of(())
        if not lengths:
            return layers * loading
        place = int(np.argsort(lengths)[len(lengths) // 2])
        working = max(0.0, self._seconds_of((self.samples[place],)) - loading)
        return layers * (loading + working * self.tokens.count / lengths[place])

    def _seconds_of(self, samples: tuple[CalibrationSample, ...]) -> float:
        """What decoder layer 0 takes in both directions, on rows of ones: the best of three, as the first prepares."""
        return min(self._seconds_once(samples) for _ in range(3))

    def _seconds_once(self, samples: tuple[CalibrationSample, ...]) -> float:
        runner, tokens = self._runner(), prompt_tokens(samples)
        width, start = runner.spec.decoder.hidden, time.monotonic()
        inputs, gradient = runner.flow(tokens, width), runner.flow(tokens, width)
        for flow in (inputs, gradient):
            flow.write(np.arange(tokens.count), (torch.ones(tokens.count, width),))
        BackwardPass(runner, samples, lambda *noted: None, SEED).decoder_layer(0, inputs, gradient)
        runner.decoder_layer(0, inputs, samples).close()
        gradient.close()
        return time.monotonic() - start

    def _runner(self) -> UnitRunner:
        return UnitRunner(self.checkpoint, FloatWeights(self.checkpoint), self.pool)

    def run(self, unit: str, flow: Flow | None) -> tuple[Flow, dict[str, Tensor]]:
        """Run a unit on the rows of the one before. Returns its own rows, and token weights by linear, [tokens]."""
        runner = self._runner()
        if unit == PROMPTS:
            return prompt_rows(runner, self.samples, self.pictures, self.tokens), {}
        assert flow is not None, "only the first unit has no input"
        if unit in self._rows:
            return runner.decoder_layer(self._rows.index(unit) - 1, flow, self.samples), {}
        if unit == HEAD:
            _, gradient = BackwardPass(runner, self.samples, lambda *noted: None, SEED).head(flow)
            flow.close()
            return gradient, {}
        index = self._index(unit)
        sizes = {
            matrix.target: torch.zeros(self.tokens.count) for matrix in decoder_matrices(runner.spec.decoder, index)
        }

        def note(target: str, gradient: Tensor, rows: Ints | None) -> None:
            assert rows is not None, "a decoder layer's rows have numbers"
            sizes[target][torch.from_numpy(rows)] = gradient.norm(dim=1)

        inputs = self.load(self._rows[index])
        BackwardPass(runner, self.samples, note, SEED).decoder_layer(index, inputs, flow)
        inputs.close()
        return flow, {target: self._weights(own) for target, own in sizes.items()}

    def _weights(self, sizes: Tensor) -> Tensor:
        """A part that is the same for every token, and the rest by its gradient; the mean of all processes' tokens that
        have one is 1."""
        sums = torch.stack((sizes.double().sum(), (sizes > 0).double().sum()))
        self.processes.sum_in_place(sums)
        total, count = sums.tolist()
        return SAME_FOR_ALL + (1 - SAME_FOR_ALL) * (sizes * (count / total) if total else torch.ones_like(sizes))

"""The TensorRT backend of a routed decoder: one engine, rows of both experts and of several prompts in every call.

What differs from segments: the inputs have a batch axis.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmdeploy.layout import Bools, Ints
from vlmdeploy.runtime.backends.door import ROUTED_GRAPH, Floats, KvCache
from vlmdeploy.runtime.backends.trt import TrtBackend, at_least_one
from vlmdeploy.runtime.backends.trt_engine import PROMPT
from vlmdeploy.runtime.batch import Call, Lanes, call_inputs, single_call


class RoutedTrtBackend(TrtBackend):
    """Executes a routed bundle's engines. Only the newest lanes are valid, all use the same memory."""

    mixes_experts = True
    _captured_batch = 0  # prompts of a call that the captured graph serves

    @property
    def most_prompts(self) -> int:
        """See BatchBackend."""
        return self.batch

    def new_lanes(self, positions: Sequence[Ints]) -> Lanes:
        """See BatchBackend. The lanes made before are no longer valid."""
        assert len(positions) <= self.batch, "as many prompts as the engines were built for"
        lanes = Lanes.of(positions)
        self._newest = lanes
        return lanes

    def new_cache(self, positions: Ints) -> Lanes:
        """See Backend: lanes of one prompt."""
        return self.new_lanes([positions])

    def run_call(self, call: Call, lanes: Lanes) -> Floats:
        """See BatchBackend."""
        self._check_newest(lanes)
        inputs = call_inputs(call, lanes)
        inputs["logit_rows"] = at_least_one(inputs["logit_rows"])
        if call.hidden.shape[1] == 1 and len(call.logit_rows) == len(call.counts):
            self._run_tokens(inputs, len(call.counts))
        else:
            self._upload(inputs)
            self._run(ROUTED_GRAPH, PROMPT, self._shapes(inputs))
        lanes.lengths += call.counts
        return self._download_logits(len(call.logit_rows))

    def _run_tokens(self, inputs: dict[str, NDArray[Any]], batch: int) -> None:
        """One row of each prompt; a graph captured for another number of prompts is of no use."""
        if batch != self._captured_batch:
            self.device.synchronize()
            self._forget_graph()
            self._captured_batch = batch
        self._run_token(inputs)

    def _run_piece(self, vision_mask: Bools, hidden: Floats, cache: KvCache, asked: Ints) -> Floats:
        """See TrtBackend."""
        assert isinstance(cache, Lanes), "lanes made by this backend"
        return self.run_call(single_call(vision_mask, hidden, asked), cache)

    def decode(self, hidden: Floats, cache: KvCache) -> Floats:
        """See Backend."""
        logits: Floats = self._run_piece(np.zeros(1, np.bool_), hidden, cache, np.zeros(1, np.int64))[0]
        return logits

    def _shapes(self, inputs: dict[str, NDArray[Any]]) -> dict[str, tuple[int, ...]]:
        """See TrtBackend. Every input has a batch axis, the cache too."""
        shape, batch = self.manifest.cache, len(inputs["write_index"])
        past = (batch, shape.kv_heads, self.manifest.context_tokens, shape.head_dim)
        names = [f"past_{kind}.{layer}" for layer in range(shape.num_layers) for kind in ("key", "value")]
        return {name: value.shape for name, value in inputs.items()} | dict.fromkeys(names, past)

"""The routed decoder in ONNX Runtime on a CPU: the plugin's operations are run by their function bodies. Slow, and
exact: it is how a routed bundle is verified where there is no TensorRT, and what its engine is compared with."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmdeploy.bundle import Manifest
from vlmdeploy.layout import Bools, Ints
from vlmdeploy.runtime.backends.door import ROUTED_GRAPH, Floats, KvCache
from vlmdeploy.runtime.backends.ort import OrtBackend, bind_cache, kv_arrays
from vlmdeploy.runtime.batch import Call, Lanes, call_inputs, single_call

MOST_PROMPTS = 4  # of one call: each takes its own lane of the cache


class OrtLanes(Lanes):
    """Lanes with their arrays: keys and values of every layer, [batch, kv_heads, slots, head_dim] each."""

    arrays: dict[str, NDArray[Any]]
    values: dict[str, Any]

    def allocate(self, ort: ModuleType, manifest: Manifest, slots: int, kind: type[np.floating[Any]]) -> None:
        """Make the arrays, all zeros."""
        self.arrays = kv_arrays(manifest, len(self.lengths), slots, kind)
        self.values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in self.arrays.items()}


class RoutedOrtBackend(OrtBackend):
    """Executes a routed bundle's graphs with ONNX Runtime. Takes what OrtBackend takes."""

    mixes_experts = True
    most_prompts = MOST_PROMPTS

    def new_lanes(self, positions: Sequence[Ints]) -> OrtLanes:
        """See BatchBackend."""
        lanes = OrtLanes.of(positions)
        slots = self.manifest.context_tokens if self._has_fixed_cache else lanes.positions.shape[1]
        lanes.allocate(self.ort, self.manifest, slots, self._cache_type)
        return lanes

    def new_cache(self, positions: Ints) -> OrtLanes:
        """See Backend: lanes of one prompt."""
        return self.new_lanes([positions])

    def run_call(self, call: Call, lanes: Lanes) -> Floats:
        """See BatchBackend."""
        return self.run_lanes(call, lanes, ("logits",))["logits"]

    def run_lanes(self, call: Call, lanes: Lanes, outputs: tuple[str, ...]) -> dict[str, Floats]:
        """One call of the graph; the named outputs beside the cache, rows [batch * rows, ...] of all lanes."""
        assert isinstance(lanes, OrtLanes), "lanes made by this backend"
        values = lanes.values
        found = self._run_bound(
            ROUTED_GRAPH, lambda binding: bind_cache(binding, values), call_inputs(call, lanes), outputs
        )
        lanes.lengths += call.counts
        return found

    def run_rows(self, vision_mask: Bools, hidden: Floats, cache: KvCache, logit_rows: Ints) -> Floats:
        """See Backend."""
        assert isinstance(cache, OrtLanes), "lanes made by this backend"
        return self.run_call(single_call(vision_mask, hidden, logit_rows), cache)

    def graph_of(self, vision_mask: Bools) -> str:
        """See OrtBackend."""
        return ROUTED_GRAPH

    def run_graph(
        self, vision_mask: Bools, hidden: Floats, cache: KvCache, logit_rows: Ints, outputs: tuple[str, ...]
    ) -> dict[str, Floats]:
        """See OrtBackend."""
        assert isinstance(cache, OrtLanes), "lanes made by this backend"
        return self.run_lanes(single_call(vision_mask, hidden, logit_rows), cache, outputs)

    def decode(self, hidden: Floats, cache: KvCache) -> Floats:
        """See Backend."""
        logits: Floats = self.run_rows(np.zeros(1, np.bool_), hidden, cache, np.zeros(1, np.int64))[0]
        return logits

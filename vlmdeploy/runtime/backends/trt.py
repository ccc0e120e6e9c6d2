"""The TensorRT backend: the bundle's engines over one KV cache on the device. Calls of a routed decoder take rows of
both experts and of several prompts; its inputs have a batch axis.

Buffers are allocated once. Keys and values are written in place: past and present of a layer are one address. A decoded
token is one launch of a captured CUDA graph. With residency "phase" the engines that only a prompt needs are unloaded
when it is read, and loaded again for the next one.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vlmdeploy.bundle import EngineInfo, Manifest
from vlmdeploy.byte_sizes import gigabytes
from vlmdeploy.errors import BackendError
from vlmdeploy.layout import Bools, expert_of
from vlmdeploy.runtime.backends.cuda_device import Buffer, CudaDevice
from vlmdeploy.runtime.backends.door import CACHE_TYPES, GRAPH_OF_EXPERT, PROMPT_ONLY, ROUTED_GRAPH, DeviceUse
from vlmdeploy.runtime.backends.lanes import Call, Floats, Lanes
from vlmdeploy.runtime.backends.plugin_library import load_plugin_library
from vlmdeploy.runtime.backends.trt_engine import ONE_TOKEN, PROMPT, Engine, RuntimeCache, check_engine
from vlmdeploy.runtime.backends.trt_library import TensorrtLibrary, import_tensorrt, library_of

if TYPE_CHECKING:
    import tensorrt as trt

logger = logging.getLogger("vlmdeploy")

RESERVE_BYTES = 300 << 20  # CUDA context, libraries and kernels


class TrtBackend:
    """Executes a bundle's engines with TensorRT or TensorRT-RTX."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        residency: str = "all",
        library: TensorrtLibrary | None = None,
        device: CudaDevice | None = None,
    ) -> None:
        """Raises BackendError where library, GPU or engines are missing or do not fit, or memory is short."""
        self.folder = folder
        self.manifest = manifest
        self.residency = residency
        if not manifest.engines:
            raise BackendError(
                f"{folder}: has no engines yet: compile them on this machine with `vlmdeploy build`; --provider cpu "
                "runs its graphs in ONNX Runtime"
            )
        self.library = library or import_tensorrt(library_of(manifest.target))
        if manifest.plugin is not None and manifest.plugin.library:
            load_plugin_library(folder / manifest.plugin.library, self.library)  # before an engine that needs it
        self.device = device or CudaDevice()
        self.mixes_experts = manifest.is_routed
        self.chunk_rows = min(engine.chunk_rows for engine in manifest.engines.values())
        self.most_logits = min(engine.logit_rows for engine in manifest.engines.values())
        self.most_lanes = min(engine.batch for engine in manifest.engines.values())
        for info in manifest.engines.values():
            check_engine(f"{folder / info.file}", info, self.library, self.device.compute_capability)
        check_memory(folder, manifest, residency, self.device.free_bytes())
        self._logger = self.library.logger(_tell)
        self._runtime: trt.Runtime = self.library.module.Runtime(self._logger)
        self._engines: dict[str, list[Engine]] = {}
        sizes = buffer_bytes(manifest, self.chunk_rows, self.most_logits, self.most_lanes)
        self._buffers = {name: self.device.allocate(size) for name, size in sizes.items()}
        self._scratch = self.device.allocate(0)
        self._graph: object = None
        self._graph_lanes = 0  # lanes of a call that the captured graph serves
        self._can_capture: bool | None = None  # not asked yet
        self._newest: Lanes | None = None

    def engines(self, graph: str) -> list[Engine]:
        """The engines of a graph in the order of their layers, loaded on first use."""
        if graph not in self._engines:
            infos = [info for info in self.manifest.engines.values() if info.graph == graph]
            self._engines[graph] = [self._load(info) for info in sorted(infos, key=lambda info: info.part)]
            self._grow_scratch(max(engine.scratch_bytes for engine in self._engines[graph]))
        return self._engines[graph]

    def _load(self, info: EngineInfo) -> Engine:
        cache = RuntimeCache.of(self.manifest.files[info.file], self.device)
        return Engine(self.folder / info.file, info, self._runtime, self.library, cache)

    def _grow_scratch(self, size: int) -> None:
        """One working memory for all engines; contexts that hold a smaller one are made anew."""
        if size <= self._scratch.size:
            return
        self.device.synchronize()  # before contexts go that may be running
        self._forget_graph()
        for engine in self._loaded():
            engine.forget_contexts()
        self.device.free(self._scratch)
        self._scratch = Buffer(0, 0)  # until there is a new one
        self._scratch = self.device.allocate(size)

    def _loaded(self) -> list[Engine]:
        return [engine for engines in self._engines.values() for engine in engines]

    def drop(self, graph: str) -> None:
        """Unload a graph's engines; they are loaded again when needed."""
        self.device.synchronize()
        if graph == self.manifest.token_graph:
            self._forget_graph()
        for engine in self._engines.pop(graph, ()):
            engine.close()

    def encode_images(self, pixels: Floats) -> Floats:
        """See Backend."""
        if self.residency == "phase":
            self.drop(self.manifest.token_graph)  # of the prompt before
        rows = np.empty((len(pixels), self.manifest.tokens.rows_per_image, self.manifest.embedding.hidden), np.float32)
        for index in range(len(pixels)):
            one = pixels[index : index + 1]
            self.device.upload(one, self._buffers["pixels"])
            self._run("vision", PROMPT, {"pixels": one.shape})
            self.device.download(self._buffers["rows"], rows[index : index + 1])
        if self.residency == "phase":
            self.drop("vision")
        return rows

    def new_lanes(self, count: int, slots: int) -> Lanes:
        """See Backend. The lanes made before are no longer valid: all use the same memory."""
        assert count <= self.most_lanes and slots <= self.manifest.context_tokens, "what the engines were built for"
        self._newest = Lanes(count, self.manifest.context_tokens)
        return self._newest

    def run(self, call: Call, lanes: Lanes) -> Floats:
        """See Backend."""
        inputs = self._inputs(call, lanes)
        self._upload(inputs)
        self._run(self._graph_of(call.vision_mask), PROMPT, self._shapes(inputs))
        lanes.append(call.counts)
        return self._download_logits(len(call.logit_rows))

    def _graph_of(self, vision_mask: Bools) -> str:
        return ROUTED_GRAPH if self.mixes_experts else GRAPH_OF_EXPERT[expert_of(vision_mask.reshape(-1))]

    def _download_logits(self, count: int) -> Floats:
        logits = np.empty((count, self.manifest.embedding.vocab_size), np.float32)
        if count:
            self.device.download(self._buffers["logits"], logits)
        return logits

    def _inputs(self, call: Call, lanes: Lanes) -> dict[str, NDArray[Any]]:
        """What one call of a decoder is told, by name of the graph's input. An engine gives at least one row of
        logits."""
        self._check_newest(lanes)
        inputs = {name: value for name, value in lanes.inputs(call).items() if name in self._buffers}
        return inputs if len(call.logit_rows) else inputs | {"logit_rows": np.zeros(1, np.int64)}

    def _check_newest(self, lanes: Lanes) -> None:
        if lanes is not self._newest:
            raise BackendError("this KV cache was given up when a new prompt was begun")

    def _upload(self, inputs: dict[str, NDArray[Any]]) -> None:
        for name, value in inputs.items():
            self.device.upload(value, self._buffers[name])

    def _shapes(self, inputs: dict[str, NDArray[Any]]) -> dict[str, tuple[int, ...]]:
        """Shapes of the inputs whose shape varies: in a routed decoder all that have a batch axis, the cache too."""
        if not self.mixes_experts:
            return {name: inputs[name].shape for name in ("hidden", "position_ids", "logit_rows")}
        shape, lanes = self.manifest.cache, len(inputs["write_index"])
        past = (lanes, shape.kv_heads, self.manifest.context_tokens, shape.head_dim)
        names = [f"past_{kind}.{layer}" for layer in range(shape.num_layers) for kind in ("key", "value")]
        return {name: value.shape for name, value in inputs.items()} | dict.fromkeys(names, past)

    def decode(self, hidden: Floats, is_fed: Bools, lanes: Lanes) -> Floats:
        """See Backend. A graph captured for another number of lanes does not serve."""
        call = Call.of_tokens(hidden, is_fed)
        inputs = self._inputs(call, lanes)
        if lanes.count != self._graph_lanes:
            self.device.synchronize()
            self._forget_graph()
            self._graph_lanes = lanes.count
        self._run_token(inputs)
        lanes.append(call.counts)
        return self._download_logits(lanes.count)

    def _run_token(self, inputs: dict[str, NDArray[Any]]) -> None:
        """Run one row of each prompt, from the second time on by launching a captured graph."""
        self._upload(inputs)
        if self._graph is not None:
            self.device.launch(self._graph)
            return
        # The first run also warms up what a capture must not do.
        self._run(self.manifest.token_graph, ONE_TOKEN, self._shapes(inputs))
        if self._can_capture is None or self._can_capture:
            self._graph = self._captured()

    def _captured(self) -> object:
        """One decoded token as a CUDA graph: every address and shape stays the same."""
        self.device.synchronize()
        runs = [
            (engine, engine.context(ONE_TOKEN, self._scratch, self.device))
            for engine in self.engines(self.manifest.token_graph)
        ]
        # TensorRT cannot be asked: it captures whatever has neither loops nor branches, as our graphs.
        self._can_capture = not self.library.is_rtx or all(
            context.is_stream_capturable(self.device.stream) for _, context in runs
        )
        if not self._can_capture:
            logger.warning("TensorRT cannot be captured in a CUDA graph here: tokens are slower, not other ones")
            return None

        def enqueue() -> None:
            for engine, context in runs:
                engine.enqueue(context, self.device)

        return self.device.capture(enqueue)

    def _forget_graph(self) -> None:
        if self._graph is not None:
            self.device.discard(self._graph)
            self._graph = None

    def _run(self, graph: str, profile: int, shapes: dict[str, tuple[int, ...]]) -> None:
        """Run every engine of a graph, one after the other; rows go from one to the next."""
        for engine in self.engines(graph):
            context = engine.context(profile, self._scratch, self.device)
            first = engine.info.layers[0]
            own = {**shapes, f"layer.{first - 1}.out": shapes["hidden"]} if first else shapes
            engine.bind(context, {name: self._address(name, engine.info) for name in engine.names}, own)
            engine.enqueue(context, self.device)

    def _address(self, name: str, info: EngineInfo) -> int:
        """Where a tensor of an engine lives."""
        return self._buffers[buffer_of(name, info)].address

    def warm_up(self, graphs: Sequence[str]) -> None:
        """See Backend."""
        for graph in graphs:
            self.engines(graph)

    def device_use(self) -> DeviceUse:
        """See Backend."""
        planned = sum(buffer.size for buffer in self._buffers.values())
        before = planned + self.device.free_bytes()
        return DeviceUse(self.device.name, planned, lambda: before - self.device.free_bytes())

    def end_prefill(self) -> None:
        """Unload what only a prompt needs, when only the current phase shall be resident."""
        if self.residency == "phase":
            for graph in PROMPT_ONLY:
                self.drop(graph)

    def close(self) -> None:
        """Give everything on the device back, and keep the kernels that were compiled; then it is of no use."""
        self.device.synchronize()
        for graph in list(self._engines):
            self.drop(graph)
        for buffer in (*self._buffers.values(), self._scratch):
            self.device.free(buffer)
        self._buffers.clear()
        self.device.close()


def _tell(severity: str, message: str) -> None:
    """TensorRT's own words: errors and warnings only."""
    if severity in ("INTERNAL_ERROR", "ERROR"):
        logger.error("TensorRT: %s", message)
    elif severity == "WARNING":
        logger.warning("TensorRT: %s", message)


def buffer_of(name: str, info: EngineInfo) -> str:
    """The buffer that a tensor of an engine lives in: past and present of a layer in the same one; rows between the
    parts of a decoder in two by turns, so that none reads what it writes."""
    if name.startswith(("past_", "present_")):
        return name.partition("_")[2]
    if name.startswith("layer."):
        is_input = name == f"layer.{info.layers[0] - 1}.out"
        return f"between.{(info.part - is_input) % 2}"
    return name


def buffer_bytes(manifest: Manifest, chunk_rows: int, logit_rows: int, batch: int = 1) -> dict[str, int]:
    """The memory plan: bytes of every buffer of a session. chunk_rows: of each of `batch` prompts."""
    hidden, side = manifest.embedding.hidden, manifest.image.size_px
    shape, has_parts = manifest.cache, any(engine.part for engine in manifest.engines.values())
    slots, tokens = batch * manifest.context_tokens, batch * chunk_rows
    layer = shape.kv_heads * slots * shape.head_dim * np.dtype(CACHE_TYPES[shape.dtype]).itemsize
    sizes = {
        "pixels": 4 * 3 * side * side,
        "rows": 4 * manifest.tokens.rows_per_image * hidden,
        "hidden": 4 * tokens * hidden,
        "position_ids": 8 * tokens,
        "write_index": 8 * batch,
        "lengths": 8 * batch,
        "logit_rows": 8 * logit_rows,
        "logits": 4 * logit_rows * manifest.embedding.vocab_size,
    }
    sizes |= {"experts": 4 * tokens} if manifest.is_routed else {}
    between = {f"between.{turn}": 4 * tokens * hidden for turn in range(2)} if has_parts else {}
    cache = {f"{kind}.{index}": layer for index in range(shape.num_layers) for kind in ("key", "value")}
    return sizes | between | cache


def check_memory(folder: Path, manifest: Manifest, residency: str, free_bytes: int) -> None:
    """Raise BackendError, with the plan, where engines and buffers of some phase do not fit into the free memory."""
    sizes: dict[str, int] = {}
    for info in manifest.engines.values():
        sizes[info.graph] = sizes.get(info.graph, 0) + manifest.files[info.file].bytes
    engine = next(iter(manifest.engines.values()))
    needed, buffers = needed_bytes(manifest, sizes, engine.chunk_rows, engine.logit_rows, residency, engine.batch)
    if needed > free_bytes:
        parts = ", ".join(f"{graph} {gigabytes(size)}" for graph, size in sizes.items())
        advice = "close other programs" if residency == "phase" else "use --residency phase"
        raise BackendError(
            f"{folder}: needs {gigabytes(needed)} of GPU memory and {gigabytes(free_bytes)} are free ({parts}, buffers "
            f"and KV cache of {manifest.context_tokens} tokens {gigabytes(buffers)}): {advice}, or export with a "
            "smaller --context"
        )


def needed_bytes(
    manifest: Manifest, graph_bytes: dict[str, int], chunk_rows: int, logit_rows: int, residency: str, batch: int = 1
) -> tuple[int, int]:
    """What the device must have free, and how much of that is buffers and KV cache. graph_bytes: of each graph."""
    buffers = sum(buffer_bytes(manifest, chunk_rows, logit_rows, batch).values())
    return peak_bytes(graph_bytes, residency) + buffers + RESERVE_BYTES, buffers


def peak_bytes(graph_bytes: dict[str, int], residency: str) -> int:
    """The most bytes of weights that are on the device together: in phases the encoder alone, then both experts."""
    experts = sum(graph_bytes.values()) - graph_bytes["vision"]
    return max(graph_bytes["vision"], experts) if residency == "phase" else sum(graph_bytes.values())

"""The TensorRT backend: the bundle's engines over one KV cache on the device. A call of a routed decoder takes rows of
both experts and of several prompts; its inputs have a batch axis.

Buffers are allocated once. Keys and values are written in place: past and present of a layer share one address. A
decoded token is one launch of a captured CUDA graph. Residency "phase" unloads the engines that only prompts need after
prefill and reloads them for the next prompt.
"""

import logging
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vlmdeploy.byte_sizes import gigabytes
from vlmdeploy.errors import BackendError
from vlmdeploy.layout import Bools
from vlmdeploy.manifest import EngineInfo, Manifest
from vlmdeploy.overriding import override
from vlmdeploy.runtime.backends.cuda_device import Buffer, CudaDevice
from vlmdeploy.runtime.backends.door import CACHE_TYPES, PROMPT_ONLY, Backend, DeviceUse, decoder_graph
from vlmdeploy.runtime.backends.lanes import Call, Floats, Lanes
from vlmdeploy.runtime.backends.plugin_library import load_plugin_library
from vlmdeploy.runtime.backends.trt_engine import ONE_TOKEN, PROMPT, Engine, RuntimeCache, check_engine
from vlmdeploy.runtime.backends.trt_library import TensorrtLibrary, import_tensorrt, library_of
from vlmdeploy.runtime.integrity import BundleFiles

if TYPE_CHECKING:
    import tensorrt as trt

logger = logging.getLogger("vlmdeploy")

RESERVE_BYTES = 300 << 20  # CUDA context, libraries and kernels


class TrtBackend(Backend):
    """Executes a bundle's engines with TensorRT or TensorRT-RTX."""

    def __init__(
        self,
        files: BundleFiles,
        residency: str = "all",
        library: TensorrtLibrary | None = None,
        device: CudaDevice | None = None,
    ) -> None:
        """Raises BackendError if library, GPU or engines are missing or do not match, or memory is short."""
        self.files = files
        self.manifest = manifest = files.manifest
        folder = files.folder
        self.residency = residency
        if not manifest.engines:
            raise BackendError(
                f"{folder}: has no engines yet: compile them on this machine with `vlmdeploy build`; --provider cpu "
                "runs its graphs in ONNX Runtime"
            )
        self.library = library or import_tensorrt(library_of(manifest.target))
        if manifest.plugin is not None and manifest.plugin.library:
            files.require_unchanged(manifest.plugin.library)
            load_plugin_library(folder / manifest.plugin.library, self.library)  # before the engines that use it
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
        self._graph_lanes = 0  # lanes that the graph was captured for
        self._can_capture: bool | None = None  # not known yet
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
        return Engine(self.files, info, self._runtime, self.library, cache)

    def _grow_scratch(self, size: int) -> None:
        """Grow the working memory that all engines share; contexts that hold the old one are recreated on next use."""
        if size <= self._scratch.size:
            return
        self.device.synchronize()  # a context may still be running
        self._forget_graph()
        for engine in chain.from_iterable(self._engines.values()):
            engine.forget_contexts()
        self.device.free(self._scratch)
        self._scratch = Buffer(0, 0)  # if allocating fails
        self._scratch = self.device.allocate(size)

    def drop(self, graph: str) -> None:
        """Unload a graph's engines; they reload on next use."""
        self.device.synchronize()
        if graph == self.manifest.token_graph:
            self._forget_graph()
        for engine in self._engines.pop(graph, ()):
            engine.close()

    @override
    def encode_images(self, pixels: Floats) -> Floats:
        if self.residency == "phase":
            self.drop(self.manifest.token_graph)  # loaded for the previous prompt
        rows = np.empty((len(pixels), self.manifest.tokens.rows_per_image, self.manifest.embedding.hidden), np.float32)
        for index in range(len(pixels)):
            one = pixels[index : index + 1]
            self.device.upload(one, self._buffers["pixels"])
            self._run("vision", PROMPT, {"pixels": one.shape})
            self.device.download(self._buffers["rows"], rows[index : index + 1])
        if self.residency == "phase":
            self.drop("vision")
        return rows

    @override
    def new_lanes(self, count: int, slots: int) -> Lanes:
        """Invalidates the previous lanes: all use the same memory."""
        assert count <= self.most_lanes and slots <= self.manifest.context_tokens, "what the engines were built for"
        self._newest = Lanes(count, self.manifest.context_tokens)
        return self._newest

    @override
    def run(self, call: Call, lanes: Lanes) -> Floats:
        inputs = self._inputs(call, lanes)
        self._upload(inputs)
        self._run(decoder_graph(self.manifest, call.vision_mask), PROMPT, self._shapes(inputs))
        lanes.append(call.counts)
        return self._download_logits(len(call.logit_rows))

    def _download_logits(self, count: int) -> Floats:
        logits = np.empty((count, self.manifest.embedding.vocab_size), np.float32)
        if count:
            self.device.download(self._buffers["logits"], logits)
        return logits

    def _inputs(self, call: Call, lanes: Lanes) -> dict[str, NDArray[Any]]:
        """Inputs of a decoder call, by name. An engine returns at least one row of logits."""
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
        """Shapes of the inputs that vary: in a routed decoder all with a batch axis, including the cache."""
        if not self.mixes_experts:
            return {name: inputs[name].shape for name in ("hidden", "position_ids", "logit_rows")}
        shape, lanes = self.manifest.cache, len(inputs["write_index"])
        past = (lanes, shape.kv_heads, self.manifest.context_tokens, shape.head_dim)
        names = [f"past_{kind}.{layer}" for layer in range(shape.num_layers) for kind in ("key", "value")]
        return {name: value.shape for name, value in inputs.items()} | dict.fromkeys(names, past)

    @override
    def decode(self, hidden: Floats, is_fed: Bools, lanes: Lanes) -> Floats:
        """A captured graph serves one number of lanes; another number captures again."""
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
        """Run one row of each prompt, from the second token on by launching a captured graph."""
        self._upload(inputs)
        if self._graph is not None:
            self.device.launch(self._graph)
            return
        # The first run does the setup that a capture must not contain.
        self._run(self.manifest.token_graph, ONE_TOKEN, self._shapes(inputs))
        if self._can_capture is not False:
            self._graph = self._captured()

    def _captured(self) -> object:
        """One decoded token as a CUDA graph: its addresses and shapes never change."""
        self.device.synchronize()
        runs = [
            (engine, engine.context(ONE_TOKEN, self._scratch, self.device))
            for engine in self.engines(self.manifest.token_graph)
        ]
        # Only TensorRT-RTX has a query; TensorRT captures whatever has no loops or branches, like our graphs.
        self._can_capture = not self.library.is_rtx or all(
            context.is_stream_capturable(self.device.stream) for _, context in runs
        )
        if not self._can_capture:
            logger.warning("TensorRT cannot be captured in a CUDA graph here: decoding is slower, its tokens the same")
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
        """Run the engines of a graph in order; each passes its rows to the next."""
        for engine in self.engines(graph):
            context = engine.context(profile, self._scratch, self.device)
            first = engine.info.layers[0]
            own = {**shapes, f"layer.{first - 1}.out": shapes["hidden"]} if first else shapes
            addresses = {name: self._buffers[buffer_of(name, engine.info)].address for name in engine.names}
            engine.bind(context, addresses, own)
            engine.enqueue(context, self.device)

    @override
    def warm_up(self, graphs: Sequence[str]) -> None:
        for graph in graphs:
            self.engines(graph)

    @override
    def device_use(self) -> DeviceUse:
        planned = sum(buffer.size for buffer in self._buffers.values())
        before = planned + self.device.free_bytes()
        return DeviceUse(self.device.name, planned, lambda: before - self.device.free_bytes())

    @override
    def end_prefill(self) -> None:
        if self.residency == "phase":
            for graph in PROMPT_ONLY:
                self.drop(graph)

    @override
    def close(self) -> None:
        """Also writes newly compiled kernels to the user's cache."""
        self.device.synchronize()
        for graph in list(self._engines):
            self.drop(graph)
        for buffer in (*self._buffers.values(), self._scratch):
            self.device.free(buffer)
        self._buffers.clear()
        self.device.close()


def _tell(severity: str, message: str) -> None:
    """Log TensorRT's errors and warnings."""
    if severity in ("INTERNAL_ERROR", "ERROR"):
        logger.error("TensorRT: %s", message)
    elif severity == "WARNING":
        logger.warning("TensorRT: %s", message)


def buffer_of(name: str, info: EngineInfo) -> str:
    """The buffer of an engine's tensor. Past and present of a layer share one; rows between the parts of a decoder
    alternate between two, so that no part reads what it writes."""
    if name.startswith(("past_", "present_")):
        return name.partition("_")[2]
    if name.startswith("layer."):
        is_input = name == f"layer.{info.layers[0] - 1}.out"
        return f"between.{(info.part - is_input) % 2}"
    return name


def buffer_bytes(manifest: Manifest, chunk_rows: int, logit_rows: int, batch: int = 1) -> dict[str, int]:
    """The memory plan: bytes of every buffer of a session. chunk_rows: per prompt, of `batch` prompts."""
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
    """Raise BackendError, with the memory plan, if engines and buffers of a phase do not fit into the free memory."""
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
    """Device memory that a bundle needs, and how much of it is buffers and KV cache."""
    buffers = sum(buffer_bytes(manifest, chunk_rows, logit_rows, batch).values())
    return peak_bytes(graph_bytes, residency) + buffers + RESERVE_BYTES, buffers


def peak_bytes(graph_bytes: dict[str, int], residency: str) -> int:
    """Peak bytes of weights on the device; with residency "phase" the encoder alone, then both experts."""
    experts = sum(graph_bytes.values()) - graph_bytes["vision"]
    return max(graph_bytes["vision"], experts) if residency == "phase" else sum(graph_bytes.values())

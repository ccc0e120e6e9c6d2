"""The ONNX Runtime backend: one session per graph, loaded on first use, over one KV cache written in place.

Past and present of a layer share one buffer; attention recognizes its address. Each decoded token is one
session call with bindings made once.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from vlmdeploy.errors import BackendError
from vlmdeploy.kernels import cpu
from vlmdeploy.layout import Bools, Ints
from vlmdeploy.manifest import CACHE_GROUP, CacheShape, Manifest
from vlmdeploy.overriding import override
from vlmdeploy.runtime.backends.cuda_device import CudaDevice
from vlmdeploy.runtime.backends.door import CACHE_TYPES, PROMPT_ONLY, Backend, DeviceUse, decoder_graph
from vlmdeploy.runtime.backends.lanes import COUNTERS, Call, Floats, Lanes, rope_table
from vlmdeploy.runtime.integrity import BundleFiles
from vlmdeploy.runtime.memory import release_freed

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
FUSED_ACCURACY_KEY = "session.qdq_matmulnbits_accuracy_level"  # the default rounds activations to int8
SPIN_KEY = "session.intra_op.spin_duration_us"
EXTERNAL_FOLDER_KEY = "session.model_external_initializers_file_folder_path"
CHUNK_ROWS = 256  # prompt rows per graph call: bounds memory; larger chunks are no faster
MOST_LANES = 4  # per call of a routed decoder


class OrtLanes(Lanes):
    """Lanes with their memory on `device`: the tensors of every layer by name ("key.0"), each [lanes, kv_heads, slots,
    width]. On a CPU `arrays` are views of them."""

    def __init__(
        self, ort: ModuleType, manifest: Manifest, count: int, slots: int, shape: CacheShape, device: str
    ) -> None:
        super().__init__(count, slots)
        self.device = device
        self._on_device = ort.OrtValue.ortvalue_from_numpy
        self._rope_shape = shape if manifest.dialect == "ort" else None  # trt graphs contain their tables
        self.arrays = {
            f"{name}.{layer}": np.zeros((count, shape.kv_heads, slots, width), CACHE_TYPES[dtype])
            for layer in range(shape.num_layers)
            for name, (dtype, width) in shape.tensors.items()
        }
        self.values = {name: self._on_device(array, device, 0) for name, array in self.arrays.items()}
        self.tables: dict[str, Any] = {}

    @override
    def begin(self, lane: int, positions: Ints) -> None:
        super().begin(lane, positions)
        if self._rope_shape is not None:
            assert self.count == 1, "graphs of this dialect take one lane"
            rope = rope_table(self._rope_shape, positions)
            self.tables = {name: self._on_device(getattr(rope, name), self.device, 0) for name in ("cos", "sin")}

    def floats(self, name: str) -> Floats:
        """Keys or values of a layer ("key.0") as floats, [lanes, kv_heads, slots, head_dim]; on a CPU."""
        part, _, layer = name.partition(".")
        scales = self.arrays.get(f"{part}_scales.{layer}")
        stored = self.arrays[name].astype(np.float32)
        return stored if scales is None else stored * scales.astype(np.float32).repeat(CACHE_GROUP, -1)

    def bind(self, binding: Any) -> None:
        """Bind an io-binding's rotary tables, past and present to this memory."""
        for name, value in self.tables.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in self.values.items():
            binding.bind_ortvalue_input(f"past_{name}", value)
            binding.bind_ortvalue_output(f"present_{name}", value)


class DecodeBinding:
    """Decodes one token per lane with buffers that are bound once and refilled for each step."""

    def __init__(
        self, ort: ModuleType, session: Any, inputs: Sequence[str], lanes: OrtLanes, call: Call, vocab_size: int
    ) -> None:
        self.lanes = lanes
        self._tables = lanes.tables
        self._counters = [(name, COUNTERS[name]) for name in inputs if name in COUNTERS]
        self._session = session
        values = lanes.inputs(call)
        self._arrays = {name: np.ascontiguousarray(values[name]) for name in inputs if name in values}
        self._buffers = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in self._arrays.items()}
        self._binding = session.io_binding()
        lanes.bind(self._binding)
        self._bind_inputs()
        self.logits = np.zeros((lanes.count, vocab_size), np.float32)
        self._logits = ort.OrtValue.ortvalue_from_numpy(self.logits)
        self._binding.bind_ortvalue_output("logits", self._logits)

    def fits(self, lanes: OrtLanes) -> bool:
        """Whether it is bound to the current buffers of these lanes."""
        return lanes is self.lanes and lanes.tables is self._tables

    def _bind_inputs(self) -> None:
        for name, buffer in self._buffers.items():
            self._binding.bind_ortvalue_input(name, buffer)

    def run(self, hidden: Floats, counts: Ints) -> Floats:
        """Append counts rows, 0 or 1, to each lane; logits [lanes, vocab], valid until the next call."""
        self._arrays["hidden"][:] = hidden
        for name, counter in self._counters:
            self._arrays[name][...] = counter(self.lanes, counts, 1)
        if self.lanes.device != "cpu":
            self._bind_inputs()  # on a GPU, binding copies them
        self._session.run_with_iobinding(self._binding)
        self.lanes.append(counts)
        return self.logits


class OrtBackend(Backend):
    """Executes a bundle's graphs with ONNX Runtime. A routed decoder runs the function bodies of the plugin operators:
    slow but exact. Verification without TensorRT uses them, and engines are compared with them."""

    most_logits = sys.maxsize

    def __init__(
        self,
        files: BundleFiles,
        threads: int | None = None,
        residency: str = "all",
        provider: str = "cpu",
        load_graph: Callable[[str], Any] | None = None,
        cache_type: str | None = None,
    ) -> None:
        """load_graph: makes the session of a graph, with a cache of any length and of `cache_type` (default: the
        bundle's); verification passes one that edits the graphs in memory."""
        self.ort = import_onnxruntime()
        self.files = files
        self.manifest = manifest = files.manifest
        self.chunk_rows = CHUNK_ROWS
        self.mixes_experts = manifest.is_routed
        self.most_lanes = MOST_LANES if manifest.is_routed else 1
        self.threads = threads
        self.residency = residency
        self.provider = provider
        self._load_graph = load_graph or self._load_file
        self._cache = replace(manifest.cache, dtype=cache_type) if cache_type else manifest.cache
        if manifest.dialect == "ort" and provider == "cpu" and self._cache.dtype != "fp32" and not cpu.library():
            raise BackendError(f"{files.folder}: its KV cache is {self._cache.dtype}, which {cpu.MISSING}")
        self._has_fixed_cache = load_graph is None and manifest.dialect == "trt"
        self._sessions: dict[str, Any] = {}
        self._decode: DecodeBinding | None = None

    def session(self, graph: str) -> Any:
        """The session of a graph, loaded on first use."""
        if graph not in self._sessions:
            self._sessions[graph] = self._load_graph(graph)
        return self._sessions[graph]

    def _load_file(self, graph: str) -> Any:
        path = self.files.folder / self.manifest.graphs[graph].file
        content = self.files.graph(graph)
        session = load_session(self.ort, path, content, self.provider, self.threads, self.manifest.dialect)
        self.files.require_unchanged(self.manifest.graphs[graph].data_file)  # which onnxruntime opened by its name
        return session

    def drop(self, graph: str) -> None:
        """Release a graph's memory; it is loaded again when needed."""
        if self._sessions.pop(graph, None) is not None:
            release_freed()

    @override
    def encode_images(self, pixels: Floats) -> Floats:
        if self.residency == "phase":
            self._decode = None
            self.drop(self.manifest.token_graph)  # loaded for the previous prompt
        session = self.session("vision")
        with self._failures_named("vision"):
            rows: Floats = session.run(["rows"], {"pixels": pixels})[0]
        tokens, hidden = self.manifest.tokens.rows_per_image, self.manifest.embedding.hidden
        self._check_shape("vision", "rows", rows, (len(pixels), tokens, hidden))
        rows = rows.copy()  # onnxruntime's array keeps the session's whole working memory alive
        if self.residency == "phase":
            self.drop("vision")
        return rows

    @override
    def new_lanes(self, count: int, slots: int) -> OrtLanes:
        self._decode = None  # holds the previous cache
        if self.provider != "cpu":
            self.session(self.manifest.token_graph)  # its error says what is missing; a failed allocation does not
        slots = self.manifest.context_tokens if self._has_fixed_cache else slots
        return OrtLanes(self.ort, self.manifest, count, slots, self._cache, self.provider)

    @override
    def run(self, call: Call, lanes: Lanes) -> Floats:
        has_head = decoder_graph(self.manifest, call.vision_mask) == self.manifest.token_graph
        outputs = self.run_graph(call, lanes, ("logits",) if has_head else ())
        vocab_size = self.manifest.embedding.vocab_size
        logits = outputs["logits"] if has_head else np.zeros((0, vocab_size), np.float32)
        self._check_shape(self.manifest.token_graph, "logits", logits, (len(logits) if logits.ndim else 0, vocab_size))
        return logits

    def run_graph(self, call: Call, lanes: Lanes, outputs: tuple[str, ...]) -> dict[str, Floats]:
        """Call the decoder graph that takes these rows; returns the named outputs, [lanes * rows, ...]."""
        assert isinstance(lanes, OrtLanes), "lanes made by this backend"
        graph = decoder_graph(self.manifest, call.vision_mask)
        session, values = self.session(graph), lanes.inputs(call)
        binding = session.io_binding()
        lanes.bind(binding)
        for info in self.manifest.graphs[graph].inputs:
            if info.name in values:
                binding.bind_cpu_input(info.name, np.ascontiguousarray(values[info.name]))
        for name in outputs:
            binding.bind_output(name, "cpu")
        with self._failures_named(graph):
            session.run_with_iobinding(binding)
        lanes.append(call.counts)
        found = binding.get_outputs()[len(lanes.values) :]  # in the order they were bound
        return {name: value.numpy() for name, value in zip(outputs, found, strict=True)}

    @override
    def decode(self, hidden: Floats, is_fed: Bools, lanes: Lanes) -> Floats:
        assert isinstance(lanes, OrtLanes), "lanes made by this backend"
        if self._decode is None or not self._decode.fits(lanes):
            graph, vocab_size = self.manifest.token_graph, self.manifest.embedding.vocab_size
            inputs = [info.name for info in self.manifest.graphs[graph].inputs]
            call = Call.of_tokens(hidden, is_fed)
            self._decode = DecodeBinding(self.ort, self.session(graph), inputs, lanes, call, vocab_size)
        with self._failures_named(self.manifest.token_graph):
            return self._decode.run(hidden, is_fed.astype(np.int64))

    @contextmanager
    def _failures_named(self, graph: str) -> Iterator[None]:
        """Turn the engine's errors, of its own private classes, into BackendErrors."""
        try:
            yield
        except Exception as error:
            where = self.files.folder / self.manifest.graphs[graph].file
            raise BackendError(f"{where}: onnxruntime cannot run it ({error})") from error

    def _check_shape(self, graph: str, name: str, found: Floats, wanted: tuple[int, ...]) -> None:
        if found.shape != wanted or found.dtype != np.float32:
            where = self.files.folder / self.manifest.graphs[graph].file
            raise BackendError(f"{where}: {name} is {found.dtype} {list(found.shape)}, expected float32 {list(wanted)}")

    @override
    def warm_up(self, graphs: Sequence[str]) -> None:
        for graph in graphs:
            self.session(graph)

    @override
    def device_use(self) -> DeviceUse | None:
        if self.provider != "cuda":
            return None
        device = CudaDevice()
        before = device.free_bytes()
        return DeviceUse(device.name, None, lambda: before - device.free_bytes())

    @override
    def close(self) -> None:
        self._decode = None
        self._sessions.clear()

    @override
    def end_prefill(self) -> None:
        if self.residency == "phase":
            for graph in PROMPT_ONLY:
                self.drop(graph)


def import_onnxruntime() -> ModuleType:
    """The onnxruntime module, without its telemetry; raises BackendError if it is missing or installed twice."""
    installed = [name for name in ("onnxruntime", "onnxruntime-gpu") if _is_installed(name)]
    if len(installed) == 2:
        raise BackendError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files: "
            "pip uninstall both, then install one of vlmdeploy[cpu] and vlmdeploy[cuda]"
        )
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read once, when it is imported
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(f"onnxruntime cannot be imported ({error}): pip install vlmdeploy[cpu]") from error
    module: ModuleType = onnxruntime
    return module


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def session_options(ort: ModuleType, threads: int | None) -> Any:
    """Options shared by all sessions: quiet, with `threads` threads (default: one per core)."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what fails is an exception: its log would stand beside our error
    options.add_session_config_entry(FUSED_ACCURACY_KEY, "0")  # exact float activations
    # Microseconds until idle threads sleep. By default they disturb the next graph, whose threads are others.
    options.add_session_config_entry(SPIN_KEY, "200")
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def load_session(
    ort: ModuleType,
    path: Path,
    content: bytes,
    provider: str,
    threads: int | None,
    dialect: str,
    keeps_outputs: bool = False,
    own_operators: bool = True,
) -> Any:
    """A session of one graph on exactly this provider; raises BackendError if onnxruntime chose another.

    content: the serialized graph; its weights are read from the folder of `path`. keeps_outputs: the caller keeps
    outputs for long, which would keep the session's whole arena alive. own_operators: use our compiled operators where
    this installation has them; else onnxruntime runs their functions in the graph.
    """
    wanted, options = PROVIDERS[provider], session_options(ort, threads)
    options.add_session_config_entry(EXTERNAL_FOLDER_KEY, str(path.parent))
    options.enable_cpu_mem_arena = not keeps_outputs
    library = cpu.library() if own_operators and dialect == "ort" and provider == "cpu" else None
    # Folding would widen or transpose whole fp16 matrices in graphs of the trt dialect.
    disabled = ["ConstantFolding"] if dialect == "trt" else []
    if wanted not in ort.get_available_providers():
        raise BackendError(
            f"{path}: made for {wanted}, which this onnxruntime does not have: pip uninstall onnxruntime, then "
            f'pip install "vlmdeploy[{provider}]"'
        )
    try:
        if library:
            options.register_custom_ops_library(str(library))
        session = ort.InferenceSession(content, options, [wanted], enable_fallback=0, disabled_optimizers=disabled)
    except Exception as error:  # onnxruntime raises a family of its own classes, none of them public
        raise BackendError(f"{path}: onnxruntime cannot load it ({error})") from error
    if session.get_providers()[0] != wanted:
        raise BackendError(
            f"{path}: wanted {wanted}, onnxruntime fell back to {session.get_providers()[0]}: is there a GPU, and do "
            "its driver, CUDA and cuDNN fit this onnxruntime?"
        )
    return session

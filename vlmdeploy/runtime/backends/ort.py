"""The ONNX Runtime backend: one session per graph, loaded when first needed, over one KV cache written in place.

Past and present of a layer are bound to the same buffer, which GroupQueryAttention recognizes by its address. A decoded
token costs one session call; its bindings are made once.
"""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vlmdeploy.bundle import Manifest
from vlmdeploy.errors import BackendError
from vlmdeploy.layout import Bools, Ints, expert_of
from vlmdeploy.runtime.backends.door import CACHE_TYPES, GRAPH_OF_EXPERT, PROMPT_ONLY, Floats, KvCache, rope_table
from vlmdeploy.runtime.memory import release_freed

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
FUSED_ACCURACY_KEY = "session.qdq_matmulnbits_accuracy_level"  # the default rounds activations to int8
CHUNK_ROWS = 256  # rows per graph call while the prompt is read: bounds memory, and is no slower than more


class HostCache(KvCache, Protocol):
    """A cache whose keys and values, [batch, kv_heads, slots, head_dim] by name ("key.0"), can be read on the host."""

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays themselves."""


def kv_arrays(manifest: Manifest, batch: int, slots: int, kind: type[np.floating[Any]]) -> dict[str, NDArray[Any]]:
    """Empty keys and values of every layer, [batch, kv_heads, slots, head_dim] each."""
    shape = manifest.cache
    dims = (batch, shape.kv_heads, slots, shape.head_dim)
    return {f"{part}.{layer}": np.zeros(dims, kind) for layer in range(shape.num_layers) for part in ("key", "value")}


def bind_cache(binding: Any, values: dict[str, Any]) -> None:
    """Bind past and present of every layer to the same memory."""
    for name, value in values.items():
        binding.bind_ortvalue_input(f"past_{name}", value)
        binding.bind_ortvalue_output(f"present_{name}", value)


class OrtCache:
    """Keys and values of every layer, [1, kv_heads, slots, head_dim] each, and the positions of the slots in use, in
    the memory of `device`; on a CPU `arrays` are views of them.

    `counters` is what a call must be told beside its rows, which depends on the dialect of the graphs.
    """

    def __init__(
        self,
        ort: ModuleType,
        manifest: Manifest,
        positions: Ints,
        slots: int,
        kind: type[np.floating[Any]],
        device: str,
    ) -> None:
        self.length = 0
        self.capacity = len(positions)
        self.positions = positions
        self.dialect = manifest.dialect
        self.device = device
        self.arrays = kv_arrays(manifest, 1, slots, kind)
        rope = rope_table(manifest.cache, positions)
        tables = {"cos": rope.cos, "sin": rope.sin} if self.dialect == "ort" else {}
        on_device = ort.OrtValue.ortvalue_from_numpy
        self.values = {name: on_device(array, device, 0) for name, array in self.arrays.items()}
        self.tables = {name: on_device(table, device, 0) for name, table in tables.items()}

    def bind(self, binding: Any) -> None:
        """Bind tables, past and present of an io-binding to this cache."""
        for name, value in self.tables.items():
            binding.bind_ortvalue_input(name, value)
        bind_cache(binding, self.values)

    def counters(self, rows: int) -> dict[str, NDArray[Any]]:
        """The inputs that say where the next rows go."""
        total = self.length + rows
        if self.dialect == "ort":
            return {"seqlens_k": np.array([total - 1], np.int32), "total_sequence_length": np.array(total, np.int32)}
        return {
            "position_ids": self.positions[None, self.length : total],
            "write_index": np.array([self.length], np.int64),
            "lengths": np.array([total], np.int64),
        }


class DecodeBinding:
    """One token's bindings: buffers that are filled anew for each step and bound once."""

    def __init__(self, ort: ModuleType, session: Any, cache: OrtCache, hidden: int, vocab_size: int) -> None:
        self.cache = cache
        self.hidden = np.zeros((1, hidden), np.float32)
        self.logits = np.zeros((1, vocab_size), np.float32)
        self.counters = {name: np.ascontiguousarray(value) for name, value in cache.counters(1).items()}
        self._session = session
        self._binding = session.io_binding()
        cache.bind(self._binding)
        inputs: dict[str, NDArray[Any]] = {
            "hidden": self.hidden, "logit_rows": np.zeros(1, np.int64), **self.counters
        }  # fmt: skip
        self._buffers = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items()}
        self._buffers["logits"] = ort.OrtValue.ortvalue_from_numpy(self.logits)
        self._inputs = list(inputs)
        self._bind_inputs()
        self._binding.bind_ortvalue_output("logits", self._buffers["logits"])

    def _bind_inputs(self) -> None:
        for name in self._inputs:
            self._binding.bind_ortvalue_input(name, self._buffers[name])

    def run(self, hidden: Floats) -> Floats:
        """Append one row; logits [vocab], valid until the next call."""
        self.hidden[:] = hidden
        for name, value in self.cache.counters(1).items():
            self.counters[name][...] = value
        if self.cache.device != "cpu":
            self._bind_inputs()  # there binding is what copies them
        self._session.run_with_iobinding(self._binding)
        self.cache.length += 1
        logits: Floats = self.logits[0]
        return logits


class OrtBackend:
    """Executes a bundle's graphs with ONNX Runtime."""

    chunk_rows = CHUNK_ROWS
    mixes_experts = False

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        threads: int | None = None,
        residency: str = "all",
        provider: str = "cpu",
        load_graph: Callable[[str], Any] | None = None,
        cache_type: str | None = None,
    ) -> None:
        """`load_graph` makes the session of a graph, its cache of any length and of `cache_type` (default: the
        bundle's): verification hands in one that edits the graphs in memory."""
        self.ort = import_onnxruntime()
        self.folder = folder
        self.manifest = manifest
        self.threads = threads
        self.residency = residency
        self.provider = provider
        self._load_graph = load_graph or self._load_file
        self._cache_type = CACHE_TYPES[cache_type or manifest.cache.dtype]
        self._has_fixed_cache = load_graph is None and manifest.dialect == "trt"
        self._sessions: dict[str, Any] = {}
        self._decode: DecodeBinding | None = None

    def session(self, graph: str) -> Any:
        """The session of a graph, loaded on first use."""
        if graph not in self._sessions:
            self._sessions[graph] = self._load_graph(graph)
        return self._sessions[graph]

    def _load_file(self, graph: str) -> Any:
        path = self.folder / self.manifest.graphs[graph].file
        return load_session(self.ort, path, self.provider, self.threads, self.manifest.dialect)

    def drop(self, graph: str) -> None:
        """Release a graph's memory; it is loaded again when needed."""
        if self._sessions.pop(graph, None) is not None:
            release_freed()

    def encode_images(self, pixels: Floats) -> Floats:
        """See Backend."""
        if self.residency == "phase":
            self._decode = None
            self.drop(self.manifest.token_graph)  # of the prompt before
        rows: Floats = self.session("vision").run(["rows"], {"pixels": pixels})[0]
        rows = rows.copy()  # what onnxruntime hands out keeps the session's whole working memory alive
        if self.residency == "phase":
            self.drop("vision")
        return rows

    def new_cache(self, positions: Ints) -> HostCache:
        """See Backend."""
        if self.provider != "cpu":
            self.session(self.manifest.token_graph)  # which tells what is missing, where memory of a device only fails
        slots = self.manifest.context_tokens if self._has_fixed_cache else len(positions)
        return OrtCache(self.ort, self.manifest, positions, slots, self._cache_type, self.provider)

    def run_rows(self, vision_mask: Bools, hidden: Floats, cache: KvCache, logit_rows: Ints) -> Floats:
        """See Backend."""
        outputs = self.run_graph(vision_mask, hidden, cache, logit_rows, () if vision_mask.all() else ("logits",))
        return outputs.get("logits", np.zeros((0, self.manifest.embedding.vocab_size), np.float32))

    def graph_of(self, vision_mask: Bools) -> str:
        """The decoder graph that takes rows of these experts."""
        return GRAPH_OF_EXPERT[expert_of(vision_mask)]

    def run_graph(
        self, vision_mask: Bools, hidden: Floats, cache: KvCache, logit_rows: Ints, outputs: tuple[str, ...]
    ) -> dict[str, Floats]:
        """One call of the decoder graph of the rows' expert; the named outputs beside the cache."""
        assert isinstance(cache, OrtCache), "a cache made by this backend"
        inputs: dict[str, NDArray[Any]] = {"hidden": hidden, **cache.counters(len(hidden)), "logit_rows": logit_rows}
        found = self._run_bound(self.graph_of(vision_mask), cache.bind, inputs, outputs)
        cache.length += len(hidden)
        return found

    def _run_bound(
        self,
        graph: str,
        bind_cache: Callable[[Any], None],
        inputs: dict[str, NDArray[Any]],
        outputs: tuple[str, ...],
    ) -> dict[str, Floats]:
        """One call of a decoder graph over a bound cache, with those of the inputs that it takes; the named outputs."""
        session = self.session(graph)
        binding = session.io_binding()
        bind_cache(binding)
        for info in self.manifest.graphs[graph].inputs:
            if info.name in inputs:
                binding.bind_cpu_input(info.name, np.ascontiguousarray(inputs[info.name]))
        for name in outputs:
            binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        values = binding.get_outputs()[2 * self.manifest.cache.num_layers :]  # in the order they were bound
        return {name: value.numpy() for name, value in zip(outputs, values, strict=True)}

    def decode(self, hidden: Floats, cache: KvCache) -> Floats:
        """See Backend."""
        assert isinstance(cache, OrtCache), "a cache made by this backend"
        if self._decode is None or self._decode.cache is not cache:
            info = self.manifest.embedding
            self._decode = DecodeBinding(self.ort, self.session("decoder_text"), cache, info.hidden, info.vocab_size)
        return self._decode.run(hidden)

    def close(self) -> None:
        """See Backend."""
        self._decode = None
        self._sessions.clear()

    def end_prefill(self) -> None:
        """Drop the prompt's graphs when only the current phase shall be resident."""
        if self.residency == "phase":
            for graph in PROMPT_ONLY:
                self.drop(graph)


def import_onnxruntime() -> ModuleType:
    """The onnxruntime module; raises BackendError where it is missing or installed twice."""
    installed = [name for name in ("onnxruntime", "onnxruntime-gpu") if _is_installed(name)]
    if len(installed) == 2:
        raise BackendError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files: "
            "pip uninstall both, then install one of vlmdeploy[cpu] and vlmdeploy[cuda]"
        )
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
    """Options shared by all sessions: quiet, and as many threads as asked for (default: one per core)."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(FUSED_ACCURACY_KEY, "0")  # products with codes as DequantizeLinear means them
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def unwanted_optimizers(dialect: str) -> list[str]:
    """What ONNX Runtime must not do to the graphs of a dialect: fold what widens or turns whole fp16 matrices."""
    return ["ConstantFolding"] if dialect == "trt" else []


def load_session(ort: ModuleType, path: Path, provider: str, threads: int | None, dialect: str) -> Any:
    """A session of one graph on exactly the wanted provider; raises BackendError if it got another."""
    wanted = PROVIDERS[provider]
    if wanted not in ort.get_available_providers():
        raise BackendError(
            f"{path}: made for {wanted}, which this onnxruntime does not have: pip uninstall onnxruntime, then "
            f'pip install "vlmdeploy[{provider}]"'
        )
    try:
        session = ort.InferenceSession(
            str(path), session_options(ort, threads), [wanted], enable_fallback=0,
            disabled_optimizers=unwanted_optimizers(dialect),
        )  # fmt: skip
    except Exception as error:  # onnxruntime raises a family of its own classes, none of them public
        raise BackendError(f"{path}: onnxruntime cannot load it ({str(error).splitlines()[0]})") from error
    if session.get_providers()[0] != wanted:
        raise BackendError(
            f"{path}: wanted {wanted}, onnxruntime fell back to {session.get_providers()[0]}: is there a GPU, and do "
            "its driver, CUDA and cuDNN fit this onnxruntime?"
        )
    return session

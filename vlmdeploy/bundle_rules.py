"""The rules of a manifest, beyond the types of its values. One from a stranger must not name files outside the bundle,
nor make a reader loop, overflow or ask for memory that no file of the bundle accounts for."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from vlmdeploy.errors import BundleError, shown
from vlmdeploy.input_files import is_plain_name
from vlmdeploy.manifest import (
    CACHE_GROUP,
    ENGINES,
    MANIFEST_NAME,
    TOKENIZER_NAME,
    EmbeddingInfo,
    EngineInfo,
    GraphInfo,
    Manifest,
    Verification,
    cache_types,
)

TARGET = re.compile(r"(ort|trt|rtx)-[a-z0-9]+")
HEX_SHA256 = re.compile(r"[0-9a-f]{64}")
GRAPH_SETS = ({"vision", "decoder_text"}, {"vision", "decoder_text", "decoder_vision"}, {"vision", "decoder"})
MOST_FILE_BYTES = 1 << 50
MOST_CONTEXT = 1 << 22  # tokens
MOST_IMAGE_PX = 8192
MOST_IMAGES = 64
MOST_LAYERS = 4096
MOST_ROWS = 1 << 20  # of one call
MOST_TEMPLATES = 256
MOST_TENSORS = 1 << 16
VALUE_BYTES = {"fp32": 4.0, "fp16": 2.0, "int8": 1.0, "int4": 0.5}


def check_manifest(manifest: Manifest, where: str) -> None:
    """Raise BundleError, naming `where`, key, value and what is allowed, for a manifest that breaks a rule."""
    _Checker(manifest, where).check()


@dataclass(frozen=True)
class _Checker:
    manifest: Manifest
    where: str

    def check(self) -> None:
        """Check every rule, files first: later ones rely on their sizes."""
        self._files()
        self._read_files()
        self._target()
        self._numbers()
        self._embedding(self.manifest.embedding)
        self._cache()
        for name, graph in self.manifest.graphs.items():
            self._graph(f"graphs.{name}", graph)
        for name, engine in self.manifest.engines.items():
            self._engine(f"engines.{name}", engine)
        if self.manifest.verification is not None:
            self._verification(self.manifest.verification)

    def _fail(self, key: str, found: object, expected: str) -> None:
        raise BundleError(f'{self.where}: "{key}" is {shown(found, 120)}, expected {expected}')

    def _require(self, holds: bool, key: str, found: object, expected: str) -> None:
        if not holds:
            self._fail(key, found, expected)

    def _within(self, key: str, found: float, least: float, most: float) -> None:
        self._require(least <= found <= most, key, found, f"a number from {least} to {most}")  # false for NaN

    def _files(self) -> None:
        for name, entry in self.manifest.files.items():
            plain = name.removeprefix(f"{ENGINES}/")
            is_name = is_plain_name(plain) and plain not in (MANIFEST_NAME, ENGINES)
            self._require(is_name, "files", name, f"plain file names, or {ENGINES}/NAME")
            self._within(f"files.{name}.bytes", entry.bytes, 0, MOST_FILE_BYTES)
            self._require(
                bool(HEX_SHA256.fullmatch(entry.sha256)), f"files.{name}.sha256", entry.sha256, "64 hex digits"
            )

    def _read_files(self) -> None:
        """Whatever is read is listed, so that it is hashed; no two graphs share a file."""
        for key, name in self._named():
            self._require(name in self.manifest.files, key, name, 'a file that "files" lists')
        graphs = self.manifest.graphs.values()
        names = [name for graph in graphs for name in (graph.file, graph.data_file)]
        self._require(
            len(set(names)) == len(names), "graphs", names, "a file of its own for each graph and its weights"
        )

    def _named(self) -> Iterator[tuple[str, str]]:
        manifest = self.manifest
        for name, graph in manifest.graphs.items():
            yield f"graphs.{name}.file", graph.file
            yield f"graphs.{name}.data_file", graph.data_file
        yield "embedding.file", manifest.embedding.file
        if manifest.has_tokenizer:
            yield "has_tokenizer", TOKENIZER_NAME
        for name, engine in manifest.engines.items():
            yield f"engines.{name}.file", engine.file
        if manifest.plugin is not None and manifest.plugin.library:
            yield "plugin.library", manifest.plugin.library

    def _target(self) -> None:
        """Only targets of TensorRT have engines and plugins, which are native code."""
        manifest = self.manifest
        self._require(bool(TARGET.fullmatch(manifest.target)), "target", manifest.target, "ort-*, trt-* or rtx-*")
        self._require(
            set(manifest.graphs) in GRAPH_SETS, "graphs", sorted(manifest.graphs), "a vision and decoder graphs"
        )
        if manifest.dialect == "ort":
            self._require(not manifest.engines, "engines", sorted(manifest.engines), f"none for {manifest.target}")
        if manifest.plugin is not None:
            is_right = manifest.target.startswith("trt-") and manifest.is_routed
            self._require(is_right, "plugin", manifest.target, "a routed decoder for trt-*")
            library = manifest.plugin.library
            self._require(
                not library or library.startswith(f"{ENGINES}/"), "plugin.library", library, f"{ENGINES}/NAME"
            )

    def _numbers(self) -> None:
        manifest, image, tokens = self.manifest, self.manifest.image, self.manifest.tokens
        self._within("context_tokens", manifest.context_tokens, 1, MOST_CONTEXT)
        self._within("image.size_px", image.size_px, 1, MOST_IMAGE_PX)
        for index, (mean, std) in enumerate(zip(image.mean, image.std, strict=True)):
            self._within(f"image.mean.{index}", mean, -1e6, 1e6)
            self._within(f"image.std.{index}", std, 1e-6, 1e6)
        self._within("tokens.rows_per_image", tokens.rows_per_image, 1, manifest.context_tokens)
        self._within("tokens.max_images", tokens.max_images, 0, MOST_IMAGES)
        ids = {"bos_id": tokens.bos_id, "placeholder_id": tokens.placeholder_id}
        for name, token in ids.items():
            self._within(f"tokens.{name}", token, 0, manifest.embedding.vocab_size - 1)
        self._within("templates", len(manifest.templates), 1, MOST_TEMPLATES)
        for phase, size in manifest.memory_bytes.items():
            self._within(f"memory_bytes.{phase}", size, 0, MOST_FILE_BYTES)

    def _embedding(self, info: EmbeddingInfo) -> None:
        """The table fills its file, so that its rows are never asked of memory that is not there."""
        values, held = info.vocab_size * info.hidden, self.manifest.files[info.file].bytes
        self._within("embedding.vocab_size", info.vocab_size, 1, held * 2)
        self._within("embedding.hidden", info.hidden, 1, held * 2)
        end = math.ceil(values * VALUE_BYTES[info.dtype])
        if info.dtype in ("int8", "int4"):
            divides = info.group_size > 0 and info.hidden % info.group_size == 0 and info.hidden % 2 == 0
            self._require(divides, "embedding.group_size", info.group_size, f"a divisor of the width {info.hidden}")
            self._within("embedding.scales_offset", info.scales_offset, end, held)
            self._require(info.scales_offset % 2 == 0, "embedding.scales_offset", info.scales_offset, "an even number")
            end = info.scales_offset + 2 * values // info.group_size
        self._require(
            end <= held, "embedding", f"{info.vocab_size} x {info.hidden}", f"a table within its {held} bytes"
        )

    def _cache(self) -> None:
        """The weights that make a layer's keys are larger than one token's keys, which bounds the cache."""
        manifest, cache = self.manifest, self.manifest.cache
        types = cache_types(manifest.dialect, manifest.provider)
        self._require(cache.dtype in types, "cache.dtype", cache.dtype, " or ".join(types))
        self._within("cache.num_layers", cache.num_layers, 1, MOST_LAYERS)
        weights = manifest.files[manifest.graphs[manifest.token_graph].data_file].bytes
        for name in ("kv_heads", "head_dim"):
            self._within(f"cache.{name}", getattr(cache, name), 1, weights)
        divides = cache.dtype != "int8" or cache.head_dim % CACHE_GROUP == 0
        self._require(divides, "cache.head_dim", cache.head_dim, f"a multiple of {CACHE_GROUP}")
        per_token = cache.num_layers * cache.kv_heads * cache.head_dim
        self._require(
            per_token <= weights, "cache", f"{per_token} keys per token", f"at most {weights}, the weights' bytes"
        )
        is_right = len(cache.inv_freq) == cache.head_dim // 2 and all(map(math.isfinite, cache.inv_freq))
        self._require(
            is_right, "cache.inv_freq", f"{len(cache.inv_freq)} numbers", f"{cache.head_dim // 2} finite ones"
        )

    def _graph(self, key: str, graph: GraphInfo) -> None:
        tensors = (*graph.inputs, *graph.outputs)
        self._within(key, len(tensors), 0, MOST_TENSORS)
        for tensor in tensors:
            lengths = [length for length in tensor.shape if isinstance(length, int)]
            is_right = len(tensor.shape) <= 8 and all(0 <= length < 1 << 31 for length in lengths)
            self._require(is_right, f"{key}.{tensor.name}", tensor.shape, "at most 8 lengths below 2^31")

    def _engine(self, key: str, engine: EngineInfo) -> None:
        self._require(engine.file.startswith(f"{ENGINES}/"), f"{key}.file", engine.file, f"{ENGINES}/NAME")
        self._require(engine.graph in self.manifest.graphs, f"{key}.graph", engine.graph, "a graph of the bundle")
        first, last = engine.layers
        is_right = 0 <= first <= last <= self.manifest.cache.num_layers and 0 <= engine.part < MOST_LAYERS
        self._require(is_right, f"{key}.layers", engine.layers, "layers of the decoder, in order")
        for name in ("chunk_rows", "logit_rows", "batch"):
            self._within(f"{key}.{name}", getattr(engine, name), 1, MOST_ROWS)

    def _verification(self, verification: Verification) -> None:
        self._within("verification.stages", len(verification.stages), 1, MOST_TENSORS)
        for stage in verification.stages:
            self._within(f"verification.{stage.stage}.tolerance", stage.tolerance, 1e-30, 1e30)
            self._within(f"verification.{stage.stage}.max_error", stage.max_error, 0, 1e30)

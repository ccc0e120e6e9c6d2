"""Bytes of a bundle's tensors, from widths and precisions alone: what the graph builder would write.

Counts every matrix as the dialect stores it (codes in whole fields, scales, zero points) and every small tensor in
float32; omits alignment and the graphs themselves, about 1 MB.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vlmdeploy.export.graphs.head_layout import HeadLayout
from vlmdeploy.export.graphs.ort_dialect import OrtCudaGraph, OrtGraph
from vlmdeploy.export.graphs.trt_dialect import kernel_width
from vlmdeploy.manifest import dialect_of
from vlmdeploy.quant.conversions import field_bits, matmul_block_size
from vlmdeploy.quant.precision import Precision, PrecisionPlan
from vlmdeploy.runtime.backends.door import GRAPH_OF_EXPERT
from vlmdeploy.spec.decoder import DecoderSpec, ExpertSpec
from vlmdeploy.spec.matrices import Matrix, matrices
from vlmdeploy.spec.model import Geometry

WEIGHT_PARTS = ("vision", "connector", "language_experts", "vision_experts", "embedding", "lm_head", "other")
FLOAT_BYTES = {"fp32": 4, "fp16": 2}


@dataclass(frozen=True)
class Storage:
    """How the graphs of a target and provider store numbers."""

    dialect: str  # "ort" or "trt"
    provider: str  # "cpu" or "cuda"

    @classmethod
    def of(cls, target: str, provider: str) -> "Storage":
        """The storage of a target; TensorRT's graphs do not depend on the provider."""
        dialect = dialect_of(target)
        return cls(dialect, "cuda" if dialect == "trt" else provider)

    @property
    def _ort_graph(self) -> type[OrtGraph]:
        return OrtCudaGraph if self.provider == "cuda" else OrtGraph

    def block(self, precision: Precision) -> int:
        """Inputs that share one stored scale."""
        if self.dialect == "trt":
            return precision.group_size
        return min(matmul_block_size(precision.group_size), self._ort_graph.largest_block)

    def matrix_bytes(self, rows: int, width: int, precision: Precision) -> int:
        """Bytes of a matrix [rows, width], including scales and zero points."""
        if not precision.bits:
            kind = "fp16" if self.dialect == "ort" and self.provider == "cuda" and precision.type != "fp32" else None
            return rows * width * FLOAT_BYTES[kind or precision.type]
        bits, block = field_bits(precision.bits), self.block(precision)
        blocks = width // block
        scale = 2 if self.dialect == "trt" else FLOAT_BYTES[self._ort_graph.scale_type(bits, block)]
        zeros = 0 if precision.symmetric else -(-blocks * bits // 8)
        return rows * (width * bits // 8 + blocks * scale + zeros)

    def embedding_bytes(self, rows: int, width: int, precision: Precision) -> int:
        """Bytes of the embedding table, which is in no graph: codes and fp16 scales, or floats."""
        if not precision.bits:
            return rows * width * FLOAT_BYTES[precision.type]
        return rows * (width * precision.bits // 8 + 2 * (width // precision.group_size))


@dataclass(frozen=True)
class StoredMatrix:
    """One matrix as a bundle ships it: its part, graph and rows."""

    matrix: Matrix
    part: str  # of WEIGHT_PARTS
    graph: str
    rows: int
    precision: Precision

    @property
    def width(self) -> int:
        """Inputs of a row."""
        return self.matrix.in_width


def stored_matrices(geometry: Geometry, plan: PrecisionPlan, storage: Storage) -> Iterator[StoredMatrix]:
    """Every matrix of the graphs, with the dialect's padded heads and only keys and values of the vision expert's last
    layer."""
    for matrix in matrices(geometry):
        rows = _rows(geometry, matrix, storage)
        if rows:
            part, graph = _place(matrix)
            yield StoredMatrix(matrix, part, graph, rows, plan[matrix.target])


def _place(matrix: Matrix) -> tuple[str, str]:
    """Part and graph of a matrix."""
    if matrix.expert is None:
        return matrix.part, "decoder_text" if matrix.part == "lm_head" else "vision"
    return f"{matrix.expert}_experts", GRAPH_OF_EXPERT[matrix.expert]


def _rows(geometry: Geometry, matrix: Matrix, storage: Storage) -> int:
    """Shipped output rows; 0 for a matrix that is not shipped."""
    vision, decoder = geometry.vision, geometry.decoder
    if not matrix.is_read:
        return 0
    if matrix.name != "qkv":
        return matrix.out_width
    if matrix.part == "vision":
        return 3 * vision.num_heads * (kernel_width(vision.head_dim) if storage.dialect == "trt" else vision.head_dim)
    has_queries = matrix.expert == "language" or matrix.layer != decoder.num_layers - 1
    return (has_queries * decoder.num_heads + 2 * decoder.num_kv_heads) * HeadLayout(decoder).padded


def small_bytes(geometry: Geometry, storage: Storage) -> dict[str, int]:
    """Bytes of a graph's other tensors: norms, biases, patches, positions; by graph."""
    connector = sum(step.small_values() for step in geometry.connector.steps)
    sizes = {"vision": 4 * (_vision_values(geometry, storage) + connector)}
    for expert in geometry.decoder.experts:
        values = _decoder_values(geometry.decoder, expert)
        if storage.dialect == "trt":  # cosines and sines of every slot
            values += geometry.decoder.context_tokens * HeadLayout(geometry.decoder).padded
        sizes[GRAPH_OF_EXPERT[expert.name]] = 4 * values
    return sizes


def _vision_values(geometry: Geometry, storage: Storage) -> int:
    vision = geometry.vision
    head = kernel_width(vision.head_dim) if storage.dialect == "trt" else vision.head_dim
    per_layer = 3 * vision.num_heads * head + vision.width + vision.mlp_width + vision.width + 4 * vision.width
    patches = 3 * vision.patch_px**2 * vision.width
    rows = vision.num_patches + 2 + vision.patch_bias + 2 * (vision.embed_norm_eps is not None)
    return patches + rows * vision.width + vision.num_layers * per_layer


def _decoder_values(decoder: DecoderSpec, expert: ExpertSpec) -> int:
    padded, is_vision = HeadLayout(decoder).padded, expert.name == "vision"
    norms = (2 * decoder.num_layers + (-1 if is_vision else 1)) * decoder.hidden
    if not expert.qkv_bias:
        return norms
    whole = (decoder.num_heads + 2 * decoder.num_kv_heads) * padded
    last = 2 * decoder.num_kv_heads * padded if is_vision else whole
    return norms + (decoder.num_layers - 1) * whole + last


@dataclass(frozen=True)
class WeightSizes:
    """Bytes that a bundle ships: by part (keys WEIGHT_PARTS), and by graph (without embedding)."""

    parts: dict[str, int]
    graphs: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of all weights."""
        return sum(self.parts.values())


def weight_sizes(geometry: Geometry, plan: PrecisionPlan, storage: Storage) -> WeightSizes:
    """What the bundle of a model weighs."""
    parts, graphs = dict.fromkeys(WEIGHT_PARTS, 0), small_bytes(geometry, storage)
    parts["other"] = sum(graphs.values())
    for matrix in stored_matrices(geometry, plan, storage):
        size = storage.matrix_bytes(matrix.rows, matrix.width, matrix.precision)
        parts[matrix.part] += size
        graphs[matrix.graph] += size
    decoder = geometry.decoder
    parts["embedding"] = storage.embedding_bytes(decoder.vocab_size, decoder.hidden, plan["embedding.weight"])
    return WeightSizes(parts, graphs)


def kv_bytes_per_token(decoder: DecoderSpec, kind: str) -> int:
    """Bytes that keys and values of one token take in all layers, `kind` being fp32, fp16 or int8."""
    return HeadLayout(decoder).cache_shape(np.zeros(0, np.float32), kind).token_bytes

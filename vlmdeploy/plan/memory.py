"""Peak memory of a bundle by phase, from widths alone: resident weights, KV cache, activations, buffers and the
engine's overhead.

ONNX Runtime on a CPU is modelled on measurements (benchmarks/plan_vs_measured.py compares). For TensorRT this counts
the runtime's memory plan and estimates the scratch of engines: none has been measured.
"""

from dataclasses import dataclass, fields

from vlmdeploy.plan.sizes import (
    Storage,
    StoredMatrix,
    kv_bytes_per_token,
    small_bytes,
    stored_matrices,
    weight_sizes,
)
from vlmdeploy.quant.conversions import field_bits
from vlmdeploy.quant.precision import PrecisionPlan
from vlmdeploy.runtime.backends.ort import CHUNK_ROWS
from vlmdeploy.runtime.backends.trt import RESERVE_BYTES
from vlmdeploy.spec.model import Geometry

PHASES = ("vision", "prefill", "decode")
MB = 10**6

# One process of Python, numpy, Pillow, tokenizers and ONNX Runtime on x86-64: 45 MB of its own, 45 to 70 MB of files.
ORT_PROCESS_BYTES = 104 * MB
# Loading fp16 matrices for a CPU widens them and leaves this share of the fp32 weights behind.
WIDENING = {"phase": 0.15, "all": 0.07}
ORT_CUDA_BYTES = 800 * MB  # CUDA's context, cuDNN, cuBLAS: a guess, not measured
ENGINE_COPIES_BYTES = 10  # an engine's scratch per value of the widest layer: two of fp32, one of fp16; a guess


@dataclass(frozen=True)
class Setting:
    """How a bundle is used. cache_tokens: slots of the allocated cache; text_tokens: of the prompt, beside the image's
    rows."""

    residency: str = "phase"
    images: int = 1
    cache_tokens: int = 2048
    text_tokens: int = 64
    kv: str = "fp16"
    chunk_rows: int = 512  # of engines
    logit_rows: int = 8


@dataclass(frozen=True)
class PlannedMemory:
    """Bytes that one phase needs at the same time."""

    weights: int
    kv: int
    activations: int
    buffers: int
    overhead: int

    @property
    def total(self) -> int:
        """The phase's peak."""
        return sum(getattr(self, item.name) for item in fields(self))


def phase_memory(
    geometry: Geometry, plan: PrecisionPlan, storage: Storage, setting: Setting
) -> dict[str, PlannedMemory]:
    """The memory of each phase; its keys are PHASES. Without an image the encoder is never loaded."""
    if storage.dialect == "ort" and storage.provider == "cpu":
        return _ort_cpu(geometry, plan, storage, setting)
    weights = _resident(weight_sizes(geometry, plan, storage).graphs, setting)
    activations = _engine_activations(geometry, setting)
    buffers, kv = sum(engine_buffers(geometry, setting).values()), _cache(geometry, setting)
    overhead = RESERVE_BYTES if storage.dialect == "trt" else ORT_CUDA_BYTES
    return {phase: PlannedMemory(weights[phase], kv, activations[phase], buffers, overhead) for phase in PHASES}


def _ort_cpu(geometry: Geometry, plan: PrecisionPlan, storage: Storage, setting: Setting) -> dict[str, PlannedMemory]:
    graphs, wide = ort_resident_bytes(geometry, plan, storage)
    loaded = {name: size + int(WIDENING[setting.residency] * wide[name]) for name, size in graphs.items()}
    weights = _resident(loaded, setting)
    if setting.residency == "phase":  # the runtime has returned what widening left behind
        weights["decode"] = graphs["decoder_text"]
    vision, prompt = _vision_work(geometry) if setting.images else 0, _prompt_work(geometry, setting)
    if setting.residency == "all":  # a session keeps its working memory
        activations = {"vision": vision, "prefill": vision + prompt, "decode": vision + prompt}
    else:
        text_rows = min(setting.text_tokens, CHUNK_ROWS)
        activations = {"vision": vision, "prefill": prompt, "decode": _chunk_work(geometry, text_rows, setting)}
    cache, pixels = _cache(geometry, setting), _picture_bytes(geometry) if setting.images else 0
    return {
        phase: PlannedMemory(weights[phase], cache, activations[phase], pixels, ORT_PROCESS_BYTES) for phase in PHASES
    }


def _resident(graphs: dict[str, int], setting: Setting) -> dict[str, int]:
    """Bytes of weights loaded in each phase."""
    text = graphs["decoder_text"]
    prompt = text + (graphs.get("decoder_vision", 0) if setting.images else 0)
    vision = graphs["vision"] if setting.images else 0
    if setting.residency == "all":
        return dict.fromkeys(PHASES, vision + prompt)
    return {"vision": vision, "prefill": prompt, "decode": text}


def _cache(geometry: Geometry, setting: Setting) -> int:
    return setting.cache_tokens * kv_bytes_per_token(geometry.decoder, setting.kv)


def ort_resident_bytes(
    geometry: Geometry, plan: PrecisionPlan, storage: Storage
) -> tuple[dict[str, int], dict[str, int]]:
    """Memory of each graph once ONNX Runtime has packed it for a CPU, and its fp32 bytes of fp16 matrices.

    It packs codes with an fp32 scale and block sum per block, keeping the file's scales mapped; widens fp16 to fp32;
    packs fp32 as it is; and unmaps what it packed.
    """
    graphs, wide = small_bytes(geometry, storage), dict.fromkeys(small_bytes(geometry, storage), 0)
    for matrix in stored_matrices(geometry, plan, storage):
        graphs[matrix.graph] += _packed_bytes(matrix, storage)
        if matrix.precision.type == "fp16":
            wide[matrix.graph] += 4 * matrix.rows * matrix.width
    return graphs, wide


def _packed_bytes(matrix: StoredMatrix, storage: Storage) -> int:
    if not matrix.precision.bits:
        return 4 * matrix.rows * matrix.width
    blocks = matrix.width // storage.block(matrix.precision)
    return matrix.rows * (matrix.width * field_bits(matrix.precision.bits) // 8 + blocks * (4 + 4 + 4))


def _vision_work(geometry: Geometry) -> int:
    """Working memory of the encoder, fp32: per row thirteen widths in attention, which stores no scores, and two and a
    quarter of the MLP's; or two and a half times the connector's widest product, if larger. Both measured."""
    vision = geometry.vision
    rows = vision.num_patches + 1
    encoder = rows * (13 * vision.width + 9 * vision.mlp_width // 4)
    widths = [matrix.out_width for step in geometry.connector.steps for matrix in step.matrices()]
    connector = geometry.connector.rows(vision) * 5 * max(widths, default=0) // 2
    return 4 * max(encoder, connector)


def _prompt_work(geometry: Geometry, setting: Setting) -> int:
    """Working memory of a prompt's chunks: each decoder's session keeps its own."""
    texts = min(setting.text_tokens, CHUNK_ROWS)
    if not setting.images:
        return _chunk_work(geometry, texts, setting)
    rows = geometry.connector.rows(geometry.vision)
    if len(geometry.decoder.experts) == 1:
        return _chunk_work(geometry, min(rows + texts, CHUNK_ROWS), setting)
    return _chunk_work(geometry, min(rows, CHUNK_ROWS), setting) + _chunk_work(geometry, texts, setting)


def _chunk_work(geometry: Geometry, rows: int, setting: Setting) -> int:
    """Working memory of one chunk in a layer, fp32: MLP widths, the residual stream, and attention's scores."""
    decoder = geometry.decoder
    prompt = setting.text_tokens + (geometry.connector.rows(geometry.vision) if setting.images else 0)
    return 4 * rows * (6 * decoder.mlp_width + 4 * decoder.hidden + decoder.num_heads * prompt)


def _picture_bytes(geometry: Geometry) -> int:
    """Pixels and rows of one picture, float32."""
    side = geometry.vision.image_px
    return 4 * (3 * side * side + geometry.connector.rows(geometry.vision) * geometry.decoder.hidden)


def engine_buffers(geometry: Geometry, setting: Setting) -> dict[str, int]:
    """What the TensorRT backend allocates at start, except the KV cache."""
    decoder, side = geometry.decoder, geometry.vision.image_px
    return {
        "pixels": 4 * 3 * side * side,
        "rows": 4 * geometry.connector.rows(geometry.vision) * decoder.hidden,
        "hidden": 4 * setting.chunk_rows * decoder.hidden,
        "logits": 4 * setting.logit_rows * decoder.vocab_size,
        "counters": 8 * setting.chunk_rows + 16 + 8 * setting.logit_rows,
    }


def _engine_activations(geometry: Geometry, setting: Setting) -> dict[str, int]:
    """The scratch that all engines share, sized for the largest; attention is fused and stores no scores."""
    vision, decoder = geometry.vision, geometry.decoder
    encoder = (vision.num_patches + 1) * max(vision.mlp_width, 3 * vision.width) if setting.images else 0
    values = max(encoder, setting.chunk_rows * 2 * decoder.mlp_width)
    return dict.fromkeys(PHASES, ENGINE_COPIES_BYTES * values)

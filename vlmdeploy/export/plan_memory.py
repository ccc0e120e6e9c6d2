"""Peak memory of a bundle by phase, from widths alone: weights that are resident, KV cache, activations, buffers and
what the engine takes for itself.

ONNX Runtime on a CPU is modelled after what it does (measured: benchmarks/plan_vs_measured.py). TensorRT's part is an
estimate from the same arithmetic and its memory plan; no engine has been measured.
"""

from dataclasses import dataclass, fields

from vlmdeploy.bundle import GraphInfo as GraphInfo
from vlmdeploy.export.plan_sizes import (
    Storage,
    StoredMatrix,
    WeightSizes,
    kv_bytes_per_token,
    small_bytes,
    stored_matrices,
)
from vlmdeploy.export.precision import PrecisionPlan
from vlmdeploy.families.spec import GatedMlp, Geometry
from vlmdeploy.quant.conversions import field_bits
from vlmdeploy.runtime.ort_backend import CHUNK_ROWS
from vlmdeploy.runtime.tensorrt_backend import RESERVE_BYTES

PHASES = ("vision", "prefill", "decode")
MB = 10**6

# Python, numpy, Pillow, ONNX Runtime and tokenizers of one process: 47 MB of its own and 60 MB of files, x86-64.
ORT_PROCESS_BYTES = 107 * MB
# fp16 matrices are widened while a graph is loaded; pieces of that stay in the session's memory. Of the widened weights:
WIDENING_SHARE = {"phase": 0.15, "all": 0.07}
ORT_CUDA_RESERVE_BYTES = 800 * MB  # CUDA context, cuDNN, cuBLAS workspaces: not measured by us
ACTIVATION_COPIES = 10  # bytes for each value of the widest layer in an engine: two of fp32 and one of fp16


@dataclass(frozen=True)
class PhaseMemory:
    """Bytes that are needed at the same time in one phase."""

    weights: int
    kv: int
    activations: int
    buffers: int
    overhead: int

    @property
    def total(self) -> int:
        """The phase's peak."""
        return sum(getattr(self, item.name) for item in fields(self))


@dataclass(frozen=True)
class Setting:
    """How a bundle is used: tokens of the cache that is allocated and of the prompt's text, and what stays loaded."""

    residency: str = "phase"
    images: int = 1
    cache_tokens: int = 0
    text_tokens: int = 64
    kv: str = "fp16"
    chunk_rows: int = 512
    logit_rows: int = 8


def phase_memory(
    geometry: Geometry, plan: PrecisionPlan, sizes: WeightSizes, storage: Storage, setting: Setting
) -> dict[str, PhaseMemory]:
    """The memory of each phase; its keys are PHASES. Without an image nothing is needed for `vision`."""
    on_cpu = storage.dialect == "ort" and storage.provider == "cpu"
    loaded = _cpu_graph_bytes(geometry, plan, storage) if on_cpu else sizes.graphs
    resident = _resident(loaded, setting)
    activations = _cpu_activations(geometry, setting) if on_cpu else _engine_activations(geometry, setting)
    overhead = ORT_PROCESS_BYTES if on_cpu else RESERVE_BYTES if storage.dialect == "trt" else ORT_CUDA_RESERVE_BYTES
    kv = setting.cache_tokens * kv_bytes_per_token(geometry.decoder, setting.kv)
    buffers = _buffers(geometry, setting, storage)
    widened = _widened(geometry, plan, storage) if on_cpu else dict.fromkeys(PHASES, 0)
    return {
        phase: PhaseMemory(resident[phase] + widened[phase], kv, activations[phase], buffers, overhead)
        if phase != "vision" or setting.images
        else PhaseMemory(0, 0, 0, 0, overhead)
        for phase in PHASES
    }


def _resident(graphs: dict[str, int], setting: Setting) -> dict[str, int]:
    """Bytes of weights that are loaded in each phase."""
    text = graphs["decoder_text"]
    prompt = text + (graphs.get("decoder_vision", 0) if setting.images else 0)
    if setting.residency == "all":
        return dict.fromkeys(PHASES, prompt + (graphs["vision"] if setting.images else 0))
    return {"vision": graphs["vision"], "prefill": prompt, "decode": text}

"""Speed of a bundle on a device: ranges from its bandwidth and compute, and the assumptions in words.

A phase takes as long as its arithmetic or reading its weights once, whichever is longer, at the share of the peak rate
that real engines reach. The shares are assumptions: `assumptions` states them and their sources.
"""

import math
from dataclasses import dataclass

from vlmdeploy.plan.device import PlanDevice
from vlmdeploy.plan.memory import Setting
from vlmdeploy.plan.sizes import Storage, kv_bytes_per_token, weight_sizes
from vlmdeploy.quant.precision import PrecisionPlan
from vlmdeploy.spec.matrices import matrices
from vlmdeploy.spec.model import Geometry

Range = tuple[float, float]

# Published: TensorRT Edge-LLM's tables (Qwen3-VL-8B int4: 18.9 tokens/s on Orin NX 16, 32.3 on AGX Orin 64) are 61 to
# 89 % of bandwidth, as head and embedding are counted; its encoder and prefill rates 46 to 65 % of dense float16.
BANDWIDTH_SHARE: Range = (0.5, 0.85)
COMPUTE_SHARE: Range = (0.3, 0.65)
# ONNX Runtime beside numpy's float32 product: 0.8 with floats, 1.5 with int8 activations (accuracy level 4).
CPU_COMPUTE_SHARE: Range = (0.5, 1.6)
LOAD_BYTES_PER_S: Range = (1.0e9, 3.0e9)  # an NVMe drive behind a Jetson or in a PC


@dataclass(frozen=True)
class Speed:
    """Seconds to the first token and tokens per second after it, each (low, high).

    None if the device's compute rate is unknown; decoding then follows from bandwidth alone. ttft_s is vision_s plus
    prefill_s. reload_s: time to reload encoder and experts for a new picture with residency "phase"; (0, 0) with "all".
    """

    ttft_s: Range | None
    vision_s: Range | None
    prefill_s: Range | None
    decode_tok_s: Range
    reload_s: Range
    vision_flop: float
    prefill_flop: float
    decode_bytes: int


def speed(geometry: Geometry, plan: PrecisionPlan, storage: Storage, setting: Setting, device: PlanDevice) -> Speed:
    """The ranges of one bundle on one device."""
    graphs = weight_sizes(geometry, plan, storage).graphs
    on_cpu = storage.dialect == "ort" and storage.provider == "cpu"
    rate, shares = (device.cpu_flop_per_s, CPU_COMPUTE_SHARE) if on_cpu else (device.fp16_flop_per_s, COMPUTE_SHARE)
    vision_flop = encoder_flop(geometry) if setting.images else 0.0
    prefill_flop = prompt_flop(geometry, setting)
    vision_bytes = graphs["vision"] if setting.images else 0
    prompt_bytes = graphs["decoder_text"] + (graphs.get("decoder_vision", 0) if setting.images else 0)
    decode_bytes = graphs["decoder_text"] + _prompt_tokens(geometry, setting) * kv_bytes_per_token(
        geometry.decoder, setting.kv
    )
    vision = prefill = None
    if rate is not None:
        vision = _seconds(vision_flop, rate, shares, vision_bytes, device)
        prefill = _seconds(prefill_flop, rate, shares, prompt_bytes, device)
    token = _seconds(token_flop(geometry, setting), rate or math.inf, shares, decode_bytes, device)
    reloaded = vision_bytes + prompt_bytes if setting.residency == "phase" and setting.images else 0
    return Speed(
        ttft_s=None if vision is None or prefill is None else (vision[0] + prefill[0], vision[1] + prefill[1]),
        vision_s=vision,
        prefill_s=prefill,
        decode_tok_s=(1 / token[1], 1 / token[0]),
        reload_s=(reloaded / LOAD_BYTES_PER_S[1], reloaded / LOAD_BYTES_PER_S[0]),
        vision_flop=vision_flop,
        prefill_flop=prefill_flop,
        decode_bytes=decode_bytes,
    )


def _seconds(flop: float, rate: float, shares: Range, weight_bytes: int, device: PlanDevice) -> Range:
    """The fast and the slow end of a phase."""
    ends = [
        max(flop / (share * rate), weight_bytes / (reading * device.bandwidth_bytes_per_s))
        for share, reading in zip(shares, BANDWIDTH_SHARE, strict=True)
    ]
    return ends[1], ends[0]


def _prompt_tokens(geometry: Geometry, setting: Setting) -> int:
    return setting.text_tokens + setting.images * geometry.connector.rows(geometry.vision)


def encoder_flop(geometry: Geometry) -> float:
    """Operations of encoder and connector for one picture; a multiply-add counts as two."""
    vision = geometry.vision
    patches, rows = vision.num_patches + 1, geometry.connector.rows(vision)
    encoder = sum(2 * item.values for item in matrices(geometry) if item.part == "vision")
    connector = sum(2 * item.values for item in matrices(geometry) if item.part == "connector")
    attention = 4 * patches**2 * vision.width * vision.num_layers
    return float(patches * encoder + rows * connector + attention)


def prompt_flop(geometry: Geometry, setting: Setting) -> float:
    """Operations of reading the prompt; all rows of an image but the last use the vision expert, if there is one."""
    decoder = geometry.decoder
    rows = setting.images * geometry.connector.rows(geometry.vision)
    expert_rows = max(0, rows - 1) if len(decoder.experts) == 2 and setting.images else 0
    text_rows = rows + setting.text_tokens - expert_rows
    flop = 0.0
    for item in matrices(geometry):
        if item.part == "lm_head":
            flop += 2 * item.values  # of the last row only
        elif item.part == "decoder":
            flop += 2 * item.values * (expert_rows if item.expert == "vision" else text_rows)
    tokens = rows + setting.text_tokens
    return flop + 2 * tokens**2 * decoder.num_heads * decoder.head_dim * decoder.num_layers


def token_flop(geometry: Geometry, setting: Setting) -> float:
    """Operations of decoding the first token after the prompt: the language expert, the head and attention."""
    decoder = geometry.decoder
    read = [item for item in matrices(geometry) if item.part == "lm_head" or item.expert == "language"]
    products = sum(2 * item.values for item in read)
    attention = 4 * _prompt_tokens(geometry, setting) * decoder.num_heads * decoder.head_dim * decoder.num_layers
    return float(products + attention)


def assumptions(storage: Storage, setting: Setting, device: PlanDevice) -> list[str]:
    """The assumptions behind the ranges, one sentence each."""
    on_cpu = storage.dialect == "ort" and storage.provider == "cpu"
    low, high = CPU_COMPUTE_SHARE if on_cpu else COMPUTE_SHARE
    rate = device.cpu_flop_per_s if on_cpu else device.fp16_flop_per_s
    pictures = "one image" if setting.images else "no image"
    lines = [
        f"device: {device.source}; memory bandwidth {device.bandwidth_bytes_per_s / 1e9:.1f} GB/s, of which "
        f"{BANDWIDTH_SHARE[0]:.0%} to {BANDWIDTH_SHARE[1]:.0%} are reached",
        f"prompt: {pictures} and {setting.text_tokens} text tokens; decoding reads the language expert, "
        "the head and the cache of the prompt once per token",
    ]
    if rate is None:
        lines.append(
            "the compute rate for this target is not known: no time to first token, and decoding may be slower than "
            "bandwidth allows"
        )
    else:
        kind = "float32 of the CPU" if on_cpu else "dense float16"
        lines.append(f"compute: {rate / 1e12:.2f} TFLOP/s {kind}, of which {low:.0%} to {high:.0%} are reached")
    if setting.residency == "phase" and setting.images:
        lines.append("every new picture loads encoder and experts again, at 1 to 3 GB/s: reload_s, not part of ttft_s")
    if storage.dialect == "trt":
        lines.append("engines: scratch is estimated, nothing was run on a device; power limits and heat are left out")
    return lines

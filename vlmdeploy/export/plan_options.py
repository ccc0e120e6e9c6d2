"""What a user may choose for a plan, checked against the model and the device before anything is counted."""

from dataclasses import dataclass, field, replace
from typing import Any

from vlmdeploy.errors import ConfigError
from vlmdeploy.export.plan_device import PlanDevice
from vlmdeploy.export.plan_model import ONE_IMAGE, Widths
from vlmdeploy.export.plan_sizes import Storage
from vlmdeploy.export.precision import TARGETS, is_tensorrt
from vlmdeploy.families.spec import Geometry
from vlmdeploy.sizes import parse_size

DEFAULT_TARGETS = {"jetson": "trt-int4", "rtx": "rtx-int4", "datacenter": "trt-int4", "cpu": "ort-int4"}


@dataclass(frozen=True)
class PlanOptions:
    """What a user may choose; None: the target's table, the model's context, and so on.

    precisions: part -> type, as `export` takes them. bits: of the decoder's codes.
    """

    target: str | None = None
    provider: str = "cpu"
    precisions: dict[str, str] = field(default_factory=dict)
    bits: int | None = None
    group: int = 128
    kv: str | None = None
    context_tokens: int | None = None
    images: int = 1
    text_tokens: int = 64
    residency: str = "phase"
    chunk_rows: int = 512
    swap_bytes: int = 0


def read_plan_options(
    vision: str | None,
    connector: str | None,
    lm_head: str | None,
    embedding: str | None,
    bits: str | None,
    context: int | None,
    swap: str | None,
    **others: Any,
) -> PlanOptions:
    """Options from what the command line takes; `others` are fields of PlanOptions. Raises ConfigError."""
    chosen = {"vision": vision, "connector": connector, "lm_head": lm_head, "embedding": embedding}
    return PlanOptions(
        precisions={part: precision for part, precision in chosen.items() if precision},
        bits=None if bits is None else int(bits),
        context_tokens=context,
        swap_bytes=0 if swap is None else parse_size(swap, "--swap"),
        **others,
    )


def with_context(geometry: Geometry, options: PlanOptions) -> Geometry:
    """The widths with the context that was chosen. Raises ConfigError."""
    decoder = geometry.decoder
    if options.context_tokens is None:
        return geometry
    if options.context_tokens > decoder.context_tokens:
        raise ConfigError(
            f"--context is {options.context_tokens}, expected at most {decoder.context_tokens}, the model's own"
        )
    return Widths(geometry.vision, geometry.connector, replace(decoder, context_tokens=options.context_tokens))


def check_options(geometry: Geometry, target: str, device: PlanDevice, options: PlanOptions) -> None:
    """Raise ConfigError where options contradict each other, the model or the device."""
    if target not in TARGETS:
        raise ConfigError(f'--target "{target}" is not known: choose one of {", ".join(TARGETS)}')
    if options.images > ONE_IMAGE:
        raise ConfigError(f"--images is {options.images}, expected 0 or 1: the model takes one image")
    needed = options.text_tokens + options.images * geometry.connector.rows(geometry.vision)
    if needed >= geometry.decoder.context_tokens:
        raise ConfigError(
            f"a prompt of {needed} tokens ({options.text_tokens} of text) leaves no room in the context of "
            f"{geometry.decoder.context_tokens}: a longer --context, or fewer --text-tokens"
        )
    if device.kind == "cpu" and (is_tensorrt(target) or options.provider == "cuda"):
        raise ConfigError(f"device {device.name} has no GPU: plan with an ort target for the CPU, such as ort-int4")
    wanted = "fp32" if Storage.of(target, options.provider).provider == "cpu" else "fp16"
    if options.kv not in (None, wanted):
        raise ConfigError(f"--kv is {options.kv}, but the cache of {target} on this provider is {wanted}")

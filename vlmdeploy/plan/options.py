"""What a user may choose for a plan, checked against the model and the device first: refuses what an export or a build
would refuse, and options without effect."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from vlmdeploy.byte_sizes import parse_size
from vlmdeploy.errors import ConfigError
from vlmdeploy.manifest import cache_types
from vlmdeploy.plan.device import PlanDevice
from vlmdeploy.plan.planned_model import ONE_IMAGE, Widths
from vlmdeploy.plan.sizes import Storage
from vlmdeploy.quant.precision import BITS, DEFAULT_GROUP, TARGETS, is_tensorrt
from vlmdeploy.runtime.backends.trt_library import library_of
from vlmdeploy.spec.model import Geometry, least_context

DEFAULT_TARGETS = {"jetson": "trt-int4", "rtx": "rtx-int4", "datacenter": "trt-int4", "cpu": "ort-int4"}
HELD_BITS = {"int4": (3, 4, 8), "int8": (8,)}  # bits of a quantized decoder that a target of this type ships unchanged
CHUNK_ROWS = 512  # default of engines


@dataclass(frozen=True)
class PlanOptions:
    """The options of the command line; None: the target's table, the model's context, and so on.

    precisions: part -> type, as `export` takes them. bits: of the decoder's codes.
    """

    target: str | None = None
    provider: str | None = None
    precisions: dict[str, str] = field(default_factory=dict)
    bits: int | None = None
    group: int | None = None
    kv: str | None = None
    context_tokens: int | None = None
    images: int = 1
    text_tokens: int = 64
    residency: str = "phase"
    chunk_rows: int | None = None
    swap: str | None = None  # such as "16GB"

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return DEFAULT_GROUP if self.group is None else self.group

    @property
    def swap_bytes(self) -> int:
        """Swap of the device. Raises ConfigError for a text that is no size."""
        return 0 if self.swap is None else parse_size(self.swap, "--swap")


def with_context(geometry: Geometry, options: PlanOptions) -> Geometry:
    """The widths with the chosen context."""
    if options.context_tokens is None:
        return geometry
    decoder = replace(geometry.decoder, context_tokens=options.context_tokens)
    return Widths(geometry.vision, geometry.connector, decoder)


def storage_of(target: str, options: PlanOptions) -> Storage:
    """How the target's graphs store numbers."""
    return Storage.of(target, options.provider or "cpu")


def check_options(geometry: Geometry, target: str, device: PlanDevice, options: PlanOptions) -> None:
    """Raise ConfigError if options contradict each other, the model or the device, or have no effect.

    geometry: the model's own, with its whole context.
    """
    if target not in TARGETS:
        raise ConfigError(f'--target "{target}" is not known: choose one of {", ".join(TARGETS)}')
    _check_device(target, device, options)
    for option in _without_effect(target, device, options):
        raise ConfigError(f"{option} has no effect on {target}: leave it out, or choose another --target")
    _check_bits(target, options)
    _check_prompt(geometry, options)
    storage = storage_of(target, options)
    types = cache_types(storage.dialect, storage.provider)
    if options.kv is not None and options.kv not in types:
        raise ConfigError(f"--kv is {options.kv}, but the cache of {target} on this provider is {' or '.join(types)}")


def _check_device(target: str, device: PlanDevice, options: PlanOptions) -> None:
    """Raise ConfigError if the device cannot run the target."""
    if device.kind == "cpu" and (is_tensorrt(target) or options.provider == "cuda"):
        raise ConfigError(f"device {device.name} has no GPU: plan with an ort target for the CPU, such as ort-int4")
    if is_tensorrt(target) and device.engine != library_of(target):
        other = DEFAULT_TARGETS[device.kind]
        raise ConfigError(f"device {device.name} runs engines of {device.engine}: plan with --target {other}")
    if not is_tensorrt(target) and not device.is_unified and options.provider != "cuda":
        raise ConfigError(
            f"device {device.name} is a card, and {target} would run on the CPU beside it: --provider cuda, --target "
            f"{DEFAULT_TARGETS[device.kind]}, or --device host on that machine"
        )


def _without_effect(target: str, device: PlanDevice, options: PlanOptions) -> Iterator[str]:
    """Given options that change nothing here."""
    if is_tensorrt(target) and options.provider is not None:
        yield f"--provider {options.provider}"
    if not is_tensorrt(target) and options.chunk_rows is not None:
        yield f"--chunk-rows {options.chunk_rows}"
    if options.swap_bytes and not (target.startswith("trt-") and device.is_unified):
        yield "--swap"
    kinds = {**TARGETS[target], **options.precisions}.values()
    if options.group is not None and not any(kind in BITS for kind in kinds):
        yield f"--group {options.group}"


def _check_bits(target: str, options: PlanOptions) -> None:
    """Raise ConfigError for bits that an export to this target widens or refuses."""
    kind = TARGETS[target]["decoder"]
    if options.bits is not None and options.bits not in HELD_BITS.get(kind, ()):
        raise ConfigError(f"--bits is {options.bits}, but the decoder of {target} is {kind}: choose another --target")


def _check_prompt(geometry: Geometry, options: PlanOptions) -> None:
    """Raise ConfigError if no bundle has such a context, or the prompt does not fit into it."""
    own, rows = geometry.decoder.context_tokens, geometry.connector.rows(geometry.vision)
    context, least = options.context_tokens or own, least_context(rows)
    if not least <= context <= own:
        raise ConfigError(
            f"--context is {context}, expected {least} (an image and a word) to {own} (the model's own context)"
        )
    if options.images > ONE_IMAGE:
        raise ConfigError(f"--images is {options.images}, expected 0 or 1: the model takes one image")
    needed = options.text_tokens + options.images * rows
    if needed >= context:
        raise ConfigError(
            f"a prompt of {needed} tokens ({options.text_tokens} of text) leaves no room in the context of {context}: "
            "a longer --context, or fewer --text-tokens"
        )

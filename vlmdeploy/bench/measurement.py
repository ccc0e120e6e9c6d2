"""The options and results of measuring a bundle, as dataclasses with a strict JSON form.

Times are wall-clock milliseconds unless a name says otherwise; docs/benchmarking.md defines each number.
"""

from dataclasses import dataclass

import numpy as np

from vlmdeploy.errors import ConfigError

LIMITS = {"new_tokens": 1, "repeats": 1, "warmup": 0, "threads": 1}  # minimum of each option


@dataclass(frozen=True)
class MeasureOptions:
    """What to measure. Raises ConfigError, naming the option.

    image: a path or a data URL; default: a random picture, or none with text_only. prompt: default: a fixed question,
    or random ids if the bundle has no tokenizer. new_tokens: decode steps of every answer, past stop ids. warmup:
    untimed answers at the start.
    """

    image: str | None = None
    text_only: bool = False
    prompt: str | None = None
    new_tokens: int = 64
    repeats: int = 5
    warmup: int = 1
    provider: str | None = None
    threads: int | None = None
    residency: str = "all"
    template: str | None = None

    def __post_init__(self) -> None:
        for name, least in LIMITS.items():
            value = getattr(self, name)
            is_unset = name == "threads" and value is None
            if not is_unset and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ConfigError(f"option {name} is {value!r}, expected a whole number of at least {least}")
        for name in ("image", "prompt", "template"):
            if not isinstance(getattr(self, name), str | None):
                raise ConfigError(f"option {name} is a {type(getattr(self, name)).__name__}, expected a string")
        if self.residency not in ("all", "phase"):
            raise ConfigError(f'option residency is {self.residency!r}, expected "all" or "phase"')
        if self.text_only and self.image is not None:
            raise ConfigError(f"{self.image}: text_only takes no image: give one of the two")


@dataclass(frozen=True)
class Spread:
    """Milliseconds over all repeats; p50 is the median."""

    p50: float
    p95: float
    mean: float
    minimum: float
    count: int

    @classmethod
    def of(cls, values_ms: list[float]) -> "Spread":
        """The spread of one or more values; percentiles are interpolated linearly."""
        p50, p95 = np.percentile(values_ms, (50, 95)).tolist()
        return cls(p50, p95, float(np.mean(values_ms)), min(values_ms), len(values_ms))


@dataclass(frozen=True)
class Machine:
    """The machine. board: its name in the device tree, as on a Jetson; gpu: only if the bundle ran on it."""

    cpu: str
    logical_cores: int
    memory_bytes: int
    kernel: str
    board: str | None
    gpu: str | None


@dataclass(frozen=True)
class EngineUsed:
    """The engine that executed the graphs. threads None: the library's default. operators: the instructions of our
    compiled operators for a CPU; None if others ran."""

    library: str
    version: str
    provider: str
    threads: int | None
    residency: str
    operators: str | None = None


@dataclass(frozen=True)
class BundleUsed:
    """The measured bundle."""

    folder: str
    family: str
    target: str
    precision: dict[str, str]
    context_tokens: int


@dataclass(frozen=True)
class DiskUse:
    """Bytes of the bundle's files, by part. data: the weights of the graphs; other: tokenizer, record, licences."""

    total: int
    graphs: int
    data: int
    embedding: int
    engines: int
    other: int


@dataclass(frozen=True)
class PhaseMemory:
    """Memory of one phase, the largest over all answers, warm-up included.

    peak_bytes: resident memory. Anonymous and file pages (None if unknown) are measured at the phase's end: at the peak
    Linux only knows their sum. device_peak_bytes: the GPU's own memory, if measured.
    """

    peak_bytes: int
    end_bytes: int
    end_anonymous_bytes: int | None
    end_file_bytes: int | None
    device_peak_bytes: int | None


@dataclass(frozen=True)
class MemoryUse:
    """Memory by phase: "open", "preprocess", "vision", "prefill", "decode".

    method, device_method: what was measured, or why not. baseline_bytes: resident before opening, that is interpreter
    and libraries. device_planned_bytes: buffers and KV cache that the backend allocated when opened.
    """

    method: str
    baseline_bytes: int
    phases: dict[str, PhaseMemory]
    device_method: str
    device_planned_bytes: int | None

    @property
    def peak_bytes(self) -> int:
        """The highest of all phases."""
        return max(phase.peak_bytes for phase in self.phases.values())


@dataclass(frozen=True)
class Energy:
    """Joules, mean over the timed answers. method: which part of the machine they cover.

    A token's joules cover decoding, an answer's all phases. "above_idle" subtracts the idle power (idle_w) for the same
    time.
    """

    method: str
    idle_w: float
    phases_j: dict[str, float]
    answer_j: float
    token_j: float
    answer_above_idle_j: float
    token_above_idle_j: float


@dataclass(frozen=True)
class Measurement:
    """One bundle on one machine.

    load_s: from opening the checked folder until it can answer; with residency "phase" graphs are loaded inside the
    phases instead. first_token = preprocess + vision + prefill (vision None: no picture). prompt_tokens include the
    image_rows. Rates are computed from medians. energy_unknown: why energy is None.
    """

    bundle: BundleUsed
    machine: Machine
    engine: EngineUsed
    picture: str
    prompt_tokens: int
    image_rows: int
    new_tokens: int
    repeats: int
    warmup: int
    load_s: float
    preprocess: Spread
    vision: Spread | None
    prefill: Spread
    first_token: Spread
    decode_per_token: Spread
    prefill_tok_s: float
    decode_tok_s: float
    disk_bytes: DiskUse
    memory: MemoryUse
    energy: Energy | None
    energy_unknown: str | None

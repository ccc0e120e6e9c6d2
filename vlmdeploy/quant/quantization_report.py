"""The report that `vlmdeploy quantize` writes beside the weights: its schema and its reader. `calib` writes it."""

from dataclasses import asdict, dataclass
from pathlib import Path

from vlmdeploy.errors import ConfigError
from vlmdeploy.input_files import find_inside
from vlmdeploy.records import Config, read_object, record_of

REPORT_NAME = "quantization_report.json"
MOST_REPORT_BYTES = 8 << 20  # 600 bytes per linear; the largest models have a few thousand


@dataclass(frozen=True)
class LinearReport:
    """How one linear was quantized. Errors are relative to the mean square of its outputs, on `judged_rows`.

    method: "gptq" or "rtn". negative_scales: how many groups have one. held_out_error: None without held-out tokens.
    condition_number: of the damped Hessian.
    """

    name: str
    bits: int
    group_size: int
    method: str
    tokens: int = 0
    samples: int = 0
    held_out_tokens: int = 0
    damping: float | None = None
    sweeps: int = 0
    asymmetric: bool = False
    negative_scales: int = 0
    dead_inputs: int = 0
    effective_rank: float | None = None
    condition_number: float | None = None
    calibration_error: float | None = None
    held_out_error: float | None = None
    held_out_error_rtn: float | None = None
    note: str = ""


@dataclass(frozen=True)
class ExpertCoverage:
    """Calibration and held-out tokens of an expert, the encoder or the connector, and their number of samples."""

    expert: str
    tokens: int
    samples: int
    held_out_tokens: int
    wanted_tokens: int


@dataclass(frozen=True)
class _Settings:
    """The settings that are read again."""

    parts: dict[str, str]
    hessian: str
    quality: str


@dataclass(frozen=True)
class _Calibration:
    data: str
    samples: int
    experts: tuple[ExpertCoverage, ...]
    skipped: int = 0


@dataclass(frozen=True)
class _Report:
    settings: _Settings
    calibration: _Calibration
    size_bytes: int
    linears: tuple[LinearReport, ...]


def read_report(folder: Path, follow_links: bool = False) -> Config:
    """Read the report in a folder, with defaults filled in for every linear; {} if there is none.

    Raises ConfigError for a file that is no report, or a link out of the folder without `follow_links`.
    """
    path = find_inside(folder, REPORT_NAME, ConfigError, follow_links)
    if path is None:
        return {}
    try:
        content = read_object(path, most_bytes=MOST_REPORT_BYTES)
        report = record_of(_Report, content, str(path))
    except ConfigError as error:
        found = str(error).removeprefix(f"{path}: ")
        raise ConfigError(
            f"{path}: damaged ({found}); remove the file, or the whole folder to quantize again"
        ) from error
    return {**content, "linears": [asdict(linear) for linear in report.linears]}

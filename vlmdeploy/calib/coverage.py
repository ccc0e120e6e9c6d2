"""Check that calibration data reaches every expert. Too few tokens are an error, fewer than recommended a warning."""

from dataclasses import asdict, dataclass
from typing import Any

from vlmdeploy.calib.calibration_set import Pictures, Tokens
from vlmdeploy.calib.processes import Processes
from vlmdeploy.errors import CalibrationError
from vlmdeploy.quant.precision import PrecisionPlan
from vlmdeploy.quant.quantization_report import ExpertCoverage
from vlmdeploy.spec.matrices import matrices
from vlmdeploy.spec.model import ModelSpec

WANTED_PER_INPUT = 4  # tokens per input of the widest linear
WANTED_SAMPLES = 64  # pictures or texts: tokens of one picture are similar
FLOOR_SHARE = 4  # the floor is a quarter of the widest input
NAMES = {"vision": "vision encoder", "connector": "connector"}


@dataclass(frozen=True)
class Coverage:
    """The coverage of every expert. A linear with fewer tokens than `floor` is not calibrated."""

    experts: tuple[ExpertCoverage, ...]
    floor: int
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The coverage as the report stores it."""
        return {"least_tokens": self.floor, "experts": [asdict(expert) for expert in self.experts]}


def check_coverage(
    spec: ModelSpec,
    plan: PrecisionPlan,
    tokens: Tokens,
    pictures: Pictures,
    processes: Processes,
    allow_uncalibrated: bool,
) -> Coverage:
    """Count the tokens of every expert, the encoder and the connector, as far as they are quantized.

    Raises CalibrationError if one gets fewer than the floor, unless `allow_uncalibrated`.
    """
    quantized = [matrix for matrix in matrices(spec) if plan[matrix.target].bits]
    floor = -(-max((matrix.in_width for matrix in quantized), default=0) // FLOOR_SHARE)
    widest = max(spec.decoder.hidden, spec.decoder.mlp_width)
    experts = [
        _coverage(expert.name, expert.name, widest, tokens, processes)
        for expert in spec.decoder.experts
        if any(matrix.expert == expert.name for matrix in quantized)
    ]
    parts = {"vision": spec.vision.num_patches + 1, "connector": spec.connector.multiplied_rows(spec.vision)}
    for part, rows_each in parts.items():
        members = [matrix.in_width for matrix in quantized if matrix.part == part]
        if members:
            experts.append(_coverage(NAMES[part], None, max(members), pictures.tokens(rows_each), processes))
    warnings = []
    for expert in experts:
        if expert.tokens < floor:
            warnings.append(_missing(expert, floor, allow_uncalibrated))
        elif expert.tokens < expert.wanted_tokens or expert.samples < WANTED_SAMPLES:
            warnings.append(
                f"the {_called(expert)} is calibrated with {expert.tokens} tokens from {expert.samples} samples; "
                f"{expert.wanted_tokens} tokens from {WANTED_SAMPLES} samples or more give a better model"
            )
    return Coverage(tuple(experts), floor, tuple(warnings))


def _coverage(name: str, expert: str | None, widest: int, tokens: Tokens, processes: Processes) -> ExpertCoverage:
    rows, held_out = tokens.select(expert, held_out=False), tokens.select(expert, held_out=True)
    counts = processes.sum_counts(len(rows), tokens.samples_in(rows), len(held_out))
    return ExpertCoverage(name, counts[0], counts[1], counts[2], WANTED_PER_INPUT * widest)


def _called(expert: ExpertCoverage) -> str:
    return expert.expert if expert.expert in NAMES.values() else f"{expert.expert} expert"


def _missing(expert: ExpertCoverage, floor: int, allow_uncalibrated: bool) -> str:
    kind = "text" if expert.expert == "language" else "pictures"
    found = f"the {_called(expert)} gets {expert.tokens} calibration tokens, at least {floor} are needed"
    if not allow_uncalibrated:
        raise CalibrationError(
            f"{found}: give data with more {kind}, more --samples, or --allow-uncalibrated to round it to nearest"
        )
    return f"{found}: it is rounded to nearest"

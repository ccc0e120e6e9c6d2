"""The result of comparing two models: verdict, table and JSON document."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from vlmdeploy.diff.row_difference import RowDifference
from vlmdeploy.diff.staged_checkpoint import Arithmetic
from vlmdeploy.errors import ConfigError
from vlmdeploy.runtime import parity


@dataclass(frozen=True)
class DiffTolerance:
    """The largest relative error that passes, on a stage's own stream and isolated, and the reason."""

    own: float
    isolated: float
    reason: str


@dataclass(frozen=True)
class StageDifference:
    """One stage's rows: of one expert ("vision", "language"), or "all"."""

    stage: str
    rows: str
    own: RowDifference
    isolated: RowDifference | None = None

    @property
    def title(self) -> str:
        """Its name in messages."""
        return self.stage if self.rows == "all" else f"{self.stage}, {self.rows} rows"


@dataclass(frozen=True)
class ModelDiff:
    """The differences of two models in all stages, in the order of the forward pass; `input` describes their input."""

    a: str
    b: str
    input: dict[str, Any]
    tolerance: DiffTolerance
    stages: tuple[StageDifference, ...]

    @property
    def is_isolated(self) -> bool:
        """Whether stages also ran on A's input."""
        return self.stages[0].isolated is not None

    def first_beyond(self) -> StageDifference | None:
        """The first stage whose own stream leaves the tolerance."""
        return next((item for item in self.stages if _is_beyond(item.own, self.tolerance.own)), None)

    def beyond_alone(self) -> list[StageDifference]:
        """The stages that leave the tolerance on A's input."""
        return [item for item in self.stages if item.isolated and _is_beyond(item.isolated, self.tolerance.isolated)]

    @property
    def agrees(self) -> bool:
        """Whether nothing leaves the tolerance."""
        return self.first_beyond() is None and not self.beyond_alone()

    def verdict(self) -> list[str]:
        """The result in a few lines."""
        first, alone, allowed = self.first_beyond(), self.beyond_alone(), self.tolerance
        if first is None:
            lines = [f"all stages within tolerance {allowed.own:g} ({allowed.reason})"]
        else:
            lines = [
                f"first stage beyond tolerance: {first.title}: {_told(first.own)}; allowed {allowed.own:g} "
                f"({allowed.reason})"
            ]
        if self.is_isolated:
            names = "; ".join(f"{item.title} ({_error(item.isolated)})" for item in alone if item.isolated)
            lines.append(f"isolated, beyond tolerance {allowed.isolated:g}: {names or 'none'}{self._farthest()}")
        logits = self.stages[-1].own
        if logits.top1_agreement is not None:
            lines.append(f"best token equal in {logits.top1_agreement:.1%} of rows, KL {logits.kl_nats:.3g} nats")
        return lines

    def _farthest(self) -> str:
        """The layer whose update differs most, beyond the tolerance or not; "" if all are equal."""
        pairs = [(item.isolated.update_error, item) for item in self.stages if item.isolated]
        errors = [(error, item) for error, item in pairs if error is not None and math.isfinite(error)]
        error, item = max(errors, key=lambda pair: pair[0], default=(0.0, self.stages[0]))
        return f"; farthest layer: {item.title}, {error:.3g} of what it adds" if error > 0 else ""

    def as_json(self) -> dict[str, Any]:
        """The document of `diff --json`; null for figures that are not finite."""
        first = self.first_beyond()
        return {
            "a": self.a,
            "b": self.b,
            "input": self.input,
            "tolerance": asdict(self.tolerance),
            "stages": [self._stage_json(item) for item in self.stages],
            "first_beyond": None if first is None else first.stage,
            "first_beyond_rows": None if first is None else first.rows,
            "beyond_alone": [[item.stage, item.rows] for item in self.beyond_alone()] if self.is_isolated else None,
        }

    def _stage_json(self, item: StageDifference) -> dict[str, Any]:
        found = {"stage": item.stage, "rows": item.rows, "own": _json(item.own, self.tolerance.own)}
        if item.isolated is not None:
            found["isolated"] = _json(item.isolated, self.tolerance.isolated)
        return found

    def columns(self) -> list[str]:
        """Titles of the table."""
        own = ["stage", "rows", "relative error", "cosine", "worst cosine", "largest error", "at row, channel"]
        return own + (["isolated: relative error", "of what is added", "worst cosine"] if self.is_isolated else [])

    def rows(self) -> list[list[str]]:
        """A row per stage; marks errors beyond the tolerance."""
        return [self._row(item) for item in self.stages]

    def _row(self, item: StageDifference) -> list[str]:
        own = item.own
        cells = [item.stage, item.rows, _marked(own, self.tolerance.own)]
        if own.not_finite is not None:
            cells += [own.not_finite, "", "", ""]
        else:
            worst = f"{_cosine(own.cosine_worst)} (row {own.cosine_worst_row})"
            cells += [_cosine(own.cosine_mean), worst, f"{own.max_abs_error:.3g}", f"{own.max_at[0]}, {own.max_at[1]}"]
        if item.isolated is not None:
            alone = item.isolated
            added = "" if alone.update_error is None else f"{alone.update_error:.3g}"
            worst = alone.not_finite or _cosine(alone.cosine_worst)
            cells += [_marked(alone, self.tolerance.isolated), added, worst]
        return cells


def checked_tolerance(value: float) -> DiffTolerance:
    """The user's tolerance. Raises ConfigError if it is negative or not finite."""
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"--tolerance is {value}, expected a relative error of 0 or more")
    return DiffTolerance(value, value, "as asked for")


def default_tolerance(a: Arithmetic, b: Arithmetic) -> DiffTolerance:
    """The gate's bounds for the coarser of the two arithmetics; wider if only one model has 4-bit weights."""
    reason, kinds = f"for {a} against {b}", {a, b}
    if "int4" in kinds and len(kinds) == 2:
        return DiffTolerance(parity.ROUNDED_END_TO_END.bound, parity.ROUNDED.bound, reason)
    check = "structure" if kinds == {"float32"} else "shipped"
    is_half = not kinds & {"int4", "int8"}
    whole, alone = parity.end_to_end_bound_of(check, is_half), parity.bound_of(check, is_half)
    return DiffTolerance(whole.bound, alone.bound, reason)


def _is_beyond(found: RowDifference, allowed: float) -> bool:
    return not found.relative_error <= allowed  # NaN is beyond


def _told(found: RowDifference) -> str:
    if found.not_finite is not None:
        return found.not_finite
    row, channel = found.max_at
    return (
        f"relative error {found.relative_error:.3g}, cosine {_cosine(found.cosine_mean)}, largest error "
        f"{found.max_abs_error:.3g} at row {row}, channel {channel}"
    )


def _error(found: RowDifference) -> str:
    return "Inf or NaN" if found.not_finite else f"{found.relative_error:.3g}"


def _marked(found: RowDifference, allowed: float) -> str:
    """The error, and a mark where it is beyond."""
    return _error(found) + (" !" if _is_beyond(found, allowed) else "")


def _cosine(value: float) -> str:
    return f"{value:.6f}"


def _json(found: RowDifference, allowed: float) -> dict[str, Any]:
    values = {name: None if _is_odd(value) else value for name, value in asdict(found).items()}
    if found.not_finite is not None:
        values |= {"cosine_worst_row": None, "max_at": None}
    return {**values, "is_beyond": _is_beyond(found, allowed)}


def _is_odd(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)

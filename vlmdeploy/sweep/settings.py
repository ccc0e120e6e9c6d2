"""The settings file of a sweep, which a resumed sweep must match."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlmdeploy.artifact import LOCK, check_name, check_not_read, check_output, is_aside, write_file
from vlmdeploy.errors import ConfigError
from vlmdeploy.records import read_object, record_of
from vlmdeploy.report.run import is_report
from vlmdeploy.sweep.grid import Point
from vlmdeploy.sweep.task import Shared

SETTINGS = "sweep.json"
CALIBRATION = ("calib", "calibration")


def check_output_folder(shared: Shared) -> None:
    """Raise ConfigError or ExportError, before writing anything, for a folder that is not a sweep's."""
    check_name(shared.out)
    if shared.out.is_symlink() and not shared.out.exists():
        raise ConfigError(f"{shared.out}: is a broken link; choose another --out")
    if not shared.out.exists():
        return
    if not shared.out.is_dir():
        raise ConfigError(f"{shared.out}: exists and is not a folder; choose another --out")
    found = {item.name for item in shared.out.iterdir() if not is_aside(item)}
    others = sorted(found - {LOCK})
    if others and SETTINGS not in found:
        raise ConfigError(f"{shared.out}: holds {others[0]} and is not a sweep; choose another --out")
    check_output(shared.report.out, True, is_report)
    check_not_read(shared.report.out, (shared.ckpt, shared.calib, shared.report.data, shared.report.asked.tokenizer))


def check_settings(shared: Shared, points: Sequence[Point], fingerprint: str) -> None:
    """Store the settings that decide results, or raise ConfigError if they differ from an earlier run's. Calibration
    may be added later, and omitted if no point needs it.

    fingerprint: of the checkpoint. The caller has locked the folder.
    """
    path = shared.out / SETTINGS
    before = _read_settings(path) if path.is_file() else {}
    now: dict[str, Any] = {"ckpt": str(shared.ckpt), "ckpt_sha256": fingerprint}
    if shared.calib is not None or before.get("calib") is None:
        now |= _calibration_of(shared)
    compared = [key for key in now if before and (key not in CALIBRATION or before.get("calib") is not None)]
    for key in compared:
        if before.get(key) != now[key]:
            raise ConfigError(
                f"{shared.out}: holds a sweep whose {key} is {before.get(key)!r}, now it is {now[key]!r}: "
                "choose another --out"
            )
    known = before.get("points", {})
    for point in points:
        _check_made(point, known.get(point.name, {}), shared)
    after = before | now | {"points": known | {point.name: asdict(point) for point in points}}
    if after != before:
        write_file(path, lambda file: file.write(json.dumps(after, indent=1).encode()))


def _calibration_of(shared: Shared) -> dict[str, Any]:
    """The settings that decide calibrated points; calib None: there are none."""
    settings = {key: str(value) for key, value in asdict(shared.calibration).items()}
    return {"calib": None if shared.calib is None else str(shared.calib), "calibration": settings}


@dataclass(frozen=True)
class _Settings:
    """The settings that are read back."""

    ckpt: str
    points: dict[str, dict[str, Any]] = field(default_factory=dict)


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        found = read_object(path)
        record_of(_Settings, found, str(path))
    except ConfigError as error:
        problem = str(error).removeprefix(f"{path}: ")
        raise ConfigError(f"{path}: is damaged ({problem}); choose another --out") from error
    return found


def _check_made(point: Point, before: Mapping[str, Any], shared: Shared) -> None:
    """Raise ConfigError if the bundle of this name was made with other settings."""
    if not shared.bundle(point).exists():
        return
    for key, value in asdict(point).items():
        if key in before and before[key] != value:
            raise ConfigError(
                f'{shared.out}: its point "{point.name}" was made with {key} {before[key]}, now it is {value}: '
                "rename it, or choose another --out"
            )

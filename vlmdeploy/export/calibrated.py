"""Exports a float checkpoint to an integer target: quantizes it into OUT.quantized, exports and removes that. After a
kill or failure the same command continues."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from vlmdeploy.artifact import check_not_read, check_output, remove_output
from vlmdeploy.bundle import is_bundle
from vlmdeploy.calib.request import QuantizeOptions, quantize_checkpoint
from vlmdeploy.errors import ConfigError
from vlmdeploy.export.exporter import export_bundle
from vlmdeploy.export.options import ExportOptions
from vlmdeploy.manifest import Manifest
from vlmdeploy.model.checkpoint import Checkpoint
from vlmdeploy.progress import Progress
from vlmdeploy.quant.precision import TARGETS, is_tensorrt

BITS_OF_TARGET = {"ort-int4": "4", "ort-int8": "8", "rtx-int4": "4", "trt-int4": "4"}


def holds_codes(ckpt: Path, follow_links: bool = False) -> bool:
    """Whether a checkpoint is quantized already. Raises ConfigError and WeightsError."""
    return Checkpoint(ckpt, follow_links).is_quantized


def export_calibrated(
    ckpt: Path,
    out: Path,
    options: ExportOptions,
    calibration: QuantizeOptions,
    progress: Progress,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[Manifest, tuple[str, ...]]:
    """Quantize with calibration data, then export; returns the manifest and the warnings of both. tell: takes a line
    about what is to come."""
    check_output(out, options.force, is_bundle)
    check_not_read(out, (ckpt, calibration.calib, options.tokenizer))
    if options.target not in BITS_OF_TARGET:
        raise ConfigError(f"--calib has no effect on {options.target}, which holds no codes: leave it out")
    aside = out.absolute().with_name(f"{out.name}.quantized")
    asked = TARGETS[options.target] | options.precisions
    wanted = replace(
        calibration,
        bits=BITS_OF_TARGET[options.target],
        group=options.group,
        vision=asked["vision"],
        connector=asked["connector"],
        lm_head=asked["lm_head"],
        positive_scales=is_tensorrt(options.target),
        tokenizer=options.tokenizer,
        template=options.default_template,
        seed=options.seed,
        follow_links=options.follow_links,
        force=True,
        reuse=True,
    )
    quantized = quantize_checkpoint(ckpt, aside, wanted, progress, tell)
    manifest, warnings = export_bundle(aside, out, options, progress)
    remove_output(aside)
    return manifest, (*quantized.warnings, *warnings)

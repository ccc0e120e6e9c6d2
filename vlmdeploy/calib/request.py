"""Resolve the options of `vlmdeploy quantize`: the precision of every linear, the calibration samples, and the settings
that determine the result."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from vlmdeploy.artifact import check_name, check_not_read, partial_folder
from vlmdeploy.byte_sizes import parse_size
from vlmdeploy.calib.activations import Pool
from vlmdeploy.calib.allocation import Budget, allocate_plan, grids_of, with_grids
from vlmdeploy.calib.calibration_set import CalibrationSample, hold_out, read_calibration_sample
from vlmdeploy.calib.perplexity import answer_perplexities
from vlmdeploy.calib.processes import Processes
from vlmdeploy.calib.run import (
    Calibration,
    QuantizeResult,
    RunOptions,
    run_quantization,
)
from vlmdeploy.calib.solver import GptqSolver
from vlmdeploy.calib.state import SETTINGS, unfinished_settings
from vlmdeploy.calib.statistics import HessianKind
from vlmdeploy.data.balance import Candidate, across_range, balance, draw_samples
from vlmdeploy.data.samples import Picture, Sample
from vlmdeploy.data.source import Skipped, check_picture, open_source
from vlmdeploy.errors import CalibrationError, ConfigError, DataError
from vlmdeploy.model.checkpoint import Checkpoint
from vlmdeploy.model.tokenizer import checkpoint_tokenizer, import_tokenizer
from vlmdeploy.progress import Progress
from vlmdeploy.quant.gptq import best_loops
from vlmdeploy.quant.precision import (
    DEFAULT_GROUP,
    Precision,
    PrecisionPlan,
    plan_precision,
    plan_warnings,
    with_overrides,
)
from vlmdeploy.quant.quantization_report import REPORT_NAME, read_report
from vlmdeploy.records import first_difference
from vlmdeploy.runtime.chat import Tokenizer
from vlmdeploy.runtime.image import picture_bytes
from vlmdeploy.spec.model import with_settings

TOKENS_PER_INPUT = 4  # default calibration tokens of an expert, per input of its widest linear
CANDIDATES_PER_SAMPLE = 4  # samples read per sample used
DECODER_BITS = ("3", "4", "8")


@dataclass(frozen=True)
class QuantizeOptions:
    """The options of `vlmdeploy quantize`, named like its parameters; None: the default in its help.

    reuse: keep an output made with the same settings, even with `force`. follow_links: out of the checkpoint's folder.
    """

    calib: Path
    calib_prompt: str | None = None
    samples: int = 512
    tokens: int | None = None
    skip_broken: bool = False
    quality: Literal["default", "high", "best"] = "default"
    select: Literal["random", "perplexity"] = "random"
    tokenizer: Path | None = None
    template: str | None = None
    bits: str = "4"
    group: int = DEFAULT_GROUP
    asymmetric: bool = False
    positive_scales: bool = False
    vision: str | None = None
    connector: str | None = None
    lm_head: str | None = None
    override: tuple[str, ...] = ()
    budget: str | None = None
    hessian: HessianKind = "routed"
    allow_uncalibrated: bool = False
    max_memory: str = "1GB"
    seed: int = 0
    force: bool = False
    reuse: bool = False
    follow_links: bool = False

    @property
    def memory_bytes(self) -> int:
        """Memory limit of activations. Raises ConfigError for a malformed size."""
        return parse_size(self.max_memory, "--max-memory")

    @property
    def parts(self) -> dict[str, str]:
        """The chosen precision of each part; the embedding is not quantized here."""
        chosen = {"vision": self.vision, "connector": self.connector, "lm_head": self.lm_head}
        asked = {part: kind for part, kind in chosen.items() if kind}
        return {"decoder": f"int{self.bits}", "embedding": "fp16", **asked}


def use_threads(count: int | None) -> None:
    """Set the number of threads of PyTorch, which our own loops use too."""
    if count is not None:
        torch.set_num_threads(count)


def quantize_checkpoint(
    ckpt: Path, out: Path, options: QuantizeOptions, progress: Progress, tell: Callable[[str], None] = lambda line: None
) -> QuantizeResult:
    """Quantize a float checkpoint with calibration data; see `run_quantization`. tell: takes a line about what is to
    come.

    Raises ConfigError, WeightsError, DataError, CalibrationError, QuantizationError and ExportError.
    """
    check_name(out)
    check_not_read(out, (ckpt, options.calib, options.tokenizer))
    if options.quality == "best" and options.hessian != "routed":
        raise ConfigError(f"--quality best weighs the tokens of each expert, so --hessian {options.hessian} has no use")
    budget = None if options.budget is None else Budget.parse(options.budget)
    memory_bytes = options.memory_bytes
    checkpoint = Checkpoint(ckpt, options.follow_links)
    if checkpoint.is_quantized:
        raise CalibrationError(f"{ckpt}: is quantized already; give the float checkpoint that it was made from")
    processes = Processes.join()
    plan = quantization_plan(checkpoint, options)
    calibration, everyone = read_calibration(checkpoint, options, processes, progress)
    settings = all_settings(checkpoint, plan, options, everyone, processes)
    if budget is not None:
        plan = known_plan(out, settings, plan) or allocate_plan(
            checkpoint, plan, everyone, budget, memory_bytes, options.seed, progress, not options.positive_scales
        )
        settings["grids"] = grids_of(plan)
    run_options = RunOptions(
        settings,
        options.hessian,
        options.quality != "default",
        options.allow_uncalibrated,
        memory_bytes,
        "gradients" if options.quality == "best" else "firsts",
        force=options.force,
        reuse=options.reuse,
        tell=tell,
    )
    solver = GptqSolver(signed=not options.positive_scales)
    result = run_quantization(checkpoint, plan, calibration, solver, out, run_options, progress)
    slow = () if best_loops().is_compiled else ("numba is not installed: the inner loops run in numpy, far slower",)
    return replace(result, warnings=(*slow, *plan_warnings(plan, options.group), *result.warnings))


def known_plan(out: Path, settings: dict[str, Any], plan: PrecisionPlan) -> PrecisionPlan | None:
    """The grids that an earlier run with these settings chose: measuring again could choose others.

    None if there was no such run. Raises ConfigError if its grids are damaged.
    """
    partial = partial_folder(out.absolute())
    before = {partial / SETTINGS: unfinished_settings(partial), out / REPORT_NAME: read_report(out).get("settings")}
    for path, found in before.items():
        if found is not None and first_difference(settings, {**found, "grids": None}) is None:
            try:
                return with_grids(plan, found.get("grids"))
            except ConfigError as error:
                raise ConfigError(f"{path}: damaged ({error}); remove {path.parent} to start over") from error
    return None


def quantization_plan(checkpoint: Checkpoint, options: QuantizeOptions) -> PrecisionPlan:
    """The precision of every linear. Raises ExportError for invalid precisions, groups and overrides."""
    if options.bits not in DECODER_BITS:
        raise ConfigError(f"--bits is {options.bits}, expected {', '.join(DECODER_BITS)}")
    plan = plan_precision(checkpoint.spec, "ort-int4", options.parts, options.group, not options.asymmetric)
    names = {target: tuple(source.name for source in rule.sources) for target, rule in checkpoint.rules.items()}
    return _storable(checkpoint, with_overrides(plan, checkpoint.spec, options.override, names))


def _storable(checkpoint: Checkpoint, plan: PrecisionPlan) -> PrecisionPlan:
    """Keep linears in float whose rows or columns do not fill the 32-bit words of a GPTQ file."""
    odd = [
        target
        for target, precision in plan.by_target.items()
        if precision.grid is not None and not checkpoint.can_store(target, precision.grid)
    ]
    by_target = {**plan.by_target, **dict.fromkeys(odd, Precision("fp32"))}
    return replace(plan, by_target=by_target, kept_in_float=(*plan.kept_in_float, *odd))


def read_calibration(
    checkpoint: Checkpoint, options: QuantizeOptions, processes: Processes, progress: Progress
) -> tuple[Calibration, tuple[CalibrationSample, ...]]:
    """The samples of this process, and of all processes. Raises DataError and CalibrationError."""
    with_settings(checkpoint.spec, None, options.template)  # fail early: no sample is to blame for an unknown template
    source = open_source(options.calib, options.calib_prompt)
    stream = source.samples(options.skip_broken)
    drawn = draw_samples(list(stream), CANDIDATES_PER_SAMPLE * options.samples, options.seed)
    found = _readable(drawn, checkpoint, options, stream.skipped)
    if options.select == "perplexity":
        found = _across_perplexity(found, checkpoint, options, progress)
    chosen = hold_out(_balanced(found, checkpoint, options))
    if not chosen:
        raise CalibrationError(f"{source.path}: holds no sample to calibrate with")
    mine = tuple(chosen[index] for index in _share(chosen, processes))
    skipped = {"skipped": stream.skipped.count, "skipped_reasons": stream.skipped.reasons}
    return Calibration.of(mine, source.description, **skipped), chosen


def _readable(
    samples: list[Sample], checkpoint: Checkpoint, options: QuantizeOptions, skipped: Skipped
) -> list[CalibrationSample]:
    """Tokenize samples. A broken or too long sample is counted with --skip-broken, else raised."""
    source = checkpoint_tokenizer(checkpoint.folder, options.tokenizer, options.follow_links)
    tokenizer, found = Tokenizer(import_tokenizer(source)), []
    for sample in samples:
        try:
            check_picture(sample)
            found.append(read_calibration_sample(sample, checkpoint.spec, tokenizer, options.template))
        except (DataError, CalibrationError) as error:
            if not options.skip_broken:
                raise
            skipped.add(DataError(str(error)))
    return found


def _balanced(
    samples: list[CalibrationSample], checkpoint: Checkpoint, options: QuantizeOptions
) -> list[CalibrationSample]:
    """Choose at most `samples` samples that give both experts their tokens, plus an eighth to hold out."""
    decoder = checkpoint.spec.decoder
    wanted = options.tokens or TOKENS_PER_INPUT * max(decoder.hidden, decoder.mlp_width)
    counts = [int(sample.vision_mask.sum()) for sample in samples]
    candidates = [Candidate(vision, len(sample.ids) - vision) for vision, sample in zip(counts, samples, strict=True)]
    chosen = balance(candidates, -(-wanted * 8 // 7), options.seed, options.samples).indexes
    return [samples[index] for index in chosen]


def _across_perplexity(
    samples: list[CalibrationSample], checkpoint: Checkpoint, options: QuantizeOptions, progress: Progress
) -> list[CalibrationSample]:
    """Choose samples evenly over the range of the float model's answer perplexities."""
    with TemporaryDirectory() as folder:
        pool = Pool(Path(folder), options.memory_bytes)
        scores = answer_perplexities(checkpoint, tuple(samples), pool, progress)
    return [samples[index] for index in sorted(across_range(scores, options.samples))]


def _share(samples: tuple[CalibrationSample, ...], processes: Processes) -> list[int]:
    """Indexes of this process's samples. All samples of a picture go to one process."""
    keys = list(dict.fromkeys(sample.image or index for index, sample in enumerate(samples)))
    number = {key: place for place, key in enumerate(keys)}
    return [
        index
        for index, sample in enumerate(samples)
        if number[sample.image or index] % processes.count == processes.rank
    ]


def all_settings(
    checkpoint: Checkpoint,
    plan: PrecisionPlan,
    options: QuantizeOptions,
    samples: tuple[CalibrationSample, ...],
    processes: Processes,
) -> dict[str, Any]:
    """Everything that determines the result: equal settings give the same checkpoint."""
    return {
        "checkpoint_sha256": processes.first_does(checkpoint.fingerprint),
        "calibration_sha256": _samples_hash(samples),
        "samples": len(samples),
        "parts": plan.parts,
        "group_sizes": plan.group_sizes,
        "symmetric": not options.asymmetric,
        "positive_scales": options.positive_scales,
        "overrides": list(options.override),
        "budget": options.budget,
        "quality": options.quality,
        "hessian": options.hessian,
        "allow_uncalibrated": options.allow_uncalibrated,
        "processes": processes.count,
        "seed": options.seed,
    }


def _samples_hash(samples: tuple[CalibrationSample, ...]) -> str:
    """SHA-256 over prompts and picture files."""
    digest, pictures = hashlib.sha256(), dict[Picture, bytes]()
    for sample in samples:
        digest.update(sample.ids.tobytes())
        if sample.image is not None:
            if sample.image not in pictures:
                pictures[sample.image] = hashlib.sha256(picture_bytes(sample.image)).digest()
            digest.update(pictures[sample.image])
    return digest.hexdigest()

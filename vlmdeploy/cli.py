"""The command line: each command parses, calls one function and prints its result. Heavy imports stay inside commands,
so that `--help` and `run` work where torch is not installed."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypeAlias, TypeVar

import click

import vlmdeploy
from vlmdeploy.console import print_json, print_rows, progress_bar, warn
from vlmdeploy.errors import VlmdeployError

Command = TypeVar("Command", bound=Callable[..., Any])
PRECISION = click.Choice(["fp32", "fp16", "int8", "int4"])
TARGET = click.Choice(["ort-fp32", "ort-fp16", "ort-int8", "ort-int4", "rtx-int4", "trt-int4", "trt-fp16"])
HESSIAN = click.Choice(["routed", "pooled", "text-only"])
PROVIDER = click.Choice(["cpu", "cuda"])
RESIDENCY = click.Choice(["all", "phase"])
EXTRAS = {
    "sklearn": "digits",
    "onnxruntime": "cpu",
    "jinja2": "report",
    "matplotlib": "report",
    "openpyxl": "report",
    "ray": "sweep",
}  # what brings a module, where it is not the toolchain
RULES = ("yes_no", "multiple_choice", "vqa_accuracy", "anls", "relaxed_accuracy", "ocrbench", "exact_match")
PromptStyle: TypeAlias = Literal["vlmevalkit", "cogvlm", "bare"]
PROMPT = click.Choice(["vlmevalkit", "cogvlm", "bare"])
FOLDER = click.Path(path_type=Path)


class Group(click.Group):
    """Prints our errors as one line on stderr and exits with status 1; --debug shows the traceback."""

    def invoke(self, context: click.Context) -> Any:
        """Run the command."""
        with noted_interrupts() as interrupts:
            try:
                return super().invoke(context)
            except (Exception, KeyboardInterrupt) as error:
                is_interrupt = bool(interrupts) or isinstance(error, (KeyboardInterrupt, click.Abort))
                line = "interrupted" if is_interrupt else error_line(error)
                if line is None or (context.params.get("debug") and not is_interrupt):
                    raise
                if not getattr(error, "is_told_elsewhere", False):
                    print(f"Error: {line}", file=sys.stderr)
                context.exit(1)


def error_line(error: BaseException) -> str | None:
    """What to tell about an error that the user can solve; None for click's own errors and for bugs of ours."""
    if isinstance(error, VlmdeployError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("vlmdeploy"):
        return f'{error.name} is not installed: pip install "vlmdeploy[{EXTRAS.get(error.name, "cpu,toolchain")}]"'
    return None


@contextmanager
def noted_interrupts() -> Iterator[list[int]]:
    """Every Ctrl-C is noted in the list and raises KeyboardInterrupt as usual.

    Compiled libraries turn that exception into senseless errors of their own; the list tells what really happened.
    """
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        raise KeyboardInterrupt

    is_ours = threading.current_thread() is threading.main_thread()
    if not (is_ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
        yield noted  # somebody else decides what Ctrl-C does, or nobody listens to it
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(vlmdeploy.__version__, prog_name="vlmdeploy")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Put a vision-language model of the CogVLM kind on a small device: exact, verified, small and fast."""


def json_option(command: Command) -> Command:
    """--json, the same for every command."""
    return click.option("as_json", "--json", is_flag=True, help="Print one JSON document on stdout.")(command)


def force_option(command: Command) -> Command:
    """--force, the same for every command that writes a folder."""
    return click.option("--force", is_flag=True, help="Replace an output folder that vlmdeploy made.")(command)


def provider_option(command: Command) -> Command:
    """--provider, the same for every command that runs a bundle."""
    text = "Run with this provider of ONNX Runtime.  [default: what the bundle was made for]"
    return click.option("--provider", type=PROVIDER, help=text)(command)


def threads_option(command: Command) -> Command:
    """--threads, the same for every command that runs a bundle."""
    text = "Threads of the inference engine.  [default: one per core]"
    return click.option("--threads", type=click.IntRange(min=1), help=text)(command)


@main.command()
@click.argument("config", type=FOLDER)
@click.option("--out", type=FOLDER, required=True, help="The checkpoint folder to write.")
@force_option
@json_option
def train(config: Path, out: Path, force: bool, as_json: bool) -> None:
    """Train a model as CONFIG (a TOML file) says; the same command continues an interrupted run."""
    from vlmdeploy.train.run import run

    with progress_bar() as progress:
        result = run(config, out, force, progress)
    if as_json:
        print_json(result)
    else:
        click.echo(f"{out}: {result.message}")


def question_options(command: Command) -> Command:
    """The options that say how questions of VLMEvalKit tables and RefCOCO files are put and scored."""
    from_set = "Scoring rule of a VLMEvalKit TSV.  [default: by the data set's name, else by its columns]"
    options = (
        click.option("--rule", type=click.Choice(RULES), help=from_set),
        click.option("--split", help="Only the rows of this split.  [default: all]"),
        click.option(
            "--prompt", type=PROMPT, default="vlmevalkit", help="How a TSV's questions are put; docs/evaluation.md."
        ),
        click.option("--first-picture", is_flag=True, help="Of a question's several pictures show the first."),
        click.option("--images", type=FOLDER, help="Pictures named by path.  [default: beside the data]"),
        click.option("--grounding-prompt", help="How a RefCOCO phrase, <expr>, is asked for."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@main.command()
@click.option("--ckpt", type=FOLDER, help="A checkpoint, run in PyTorch.")
@click.option("--bundle", type=FOLDER, help="A bundle, run in its runtime.")
@click.option("--from-predictions", type=FOLDER, help="A file of answers: nothing is run.")
@click.option("--data", type=FOLDER, required=True, help="JSONL, folder with data.jsonl, VLMEvalKit TSV, or RefCOCO.")
@click.option("--per-task", type=click.IntRange(min=1), help="At most this many questions of each task.")
@click.option("--seed", type=int, default=0, help="Which questions --per-task takes.")
@click.option("--compare", type=FOLDER, multiple=True, help="Another checkpoint or bundle: equal answers are counted.")
@question_options
@click.option("--predictions", type=FOLDER, help="Write the answers there too: .tsv, .xlsx or .jsonl.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, help="Longest answer.")
@click.option("--template", help="The prompt template for rows that name none.  [default: the model's]")
@click.option("--tokenizer", type=FOLDER, help="tokenizer.json, tokenizer.model, or a folder.  [default: --ckpt]")
@provider_option
@threads_option
@click.option("--force", is_flag=True, help="Replace an existing file of answers.")
@json_option
def validate(
    ckpt: Path | None,
    bundle: Path | None,
    from_predictions: Path | None,
    compare: tuple[Path, ...],
    as_json: bool,
    rule: str | None,
    split: str | None,
    prompt: PromptStyle,
    first_picture: bool,
    images: Path | None,
    grounding_prompt: str | None,
    **options: Any,
) -> None:
    """Score a checkpoint, a bundle or a file of answers on a data set, with 95 % intervals."""
    from vlmdeploy.calib.scorecard import ScoreOptions, score_models
    from vlmdeploy.data.questions import GROUNDING_PROMPT, QuestionOptions

    given = tuple(model for model in (ckpt, bundle, from_predictions) if model is not None)
    if len(given) != 1:
        raise click.UsageError("give one of --ckpt and --bundle, or --from-predictions")
    ask = GROUNDING_PROMPT if grounding_prompt is None else grounding_prompt
    questions = QuestionOptions(rule, prompt, split, first_picture, images, ask)
    with progress_bar() as progress:
        card = score_models((*given, *compare), ScoreOptions(questions=questions, **options), progress)
    if as_json:
        print_json(card.as_json())
    else:
        print_rows(card.source, card.columns(), card.rows())


def asking_options(command: Command) -> Command:
    """The options of `report` and `sweep`: what is asked, and how it is measured."""
    options = (
        click.option("--per-task", type=click.IntRange(min=1), help="Ask at most this many questions of each task."),
        click.option("--seed", type=click.IntRange(min=0), default=0, help="Which questions are drawn."),
        click.option("--template", help="The prompt template for rows that name none.  [default: the model's]"),
        click.option("--tokenizer", type=FOLDER, help="Of the checkpoint.  [default: the one in its folder]"),
        click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, help="Longest answer."),
        click.option("--new-tokens", type=click.IntRange(min=1), default=32, help="Tokens of the measured answers."),
        click.option("--repeat", type=click.IntRange(min=1), default=5, help="Measured answers."),
        click.option("--residency", type=RESIDENCY, default="all", help="Of the measured bundles; see `run`."),
    )
    for option in reversed(options):
        command = option(command)
    return question_options(command)


@main.command()
@click.argument("bundles", type=FOLDER, nargs=-1, required=True)
@click.option("--data", type=FOLDER, required=True, help="The questions: JSONL, VLMEvalKit TSV or RefCOCO.")
@click.option("--ref", type=FOLDER, help="The float checkpoint to compare with.  [default: the first bundle]")
@click.option("--out", type=FOLDER, required=True, help="The folder to write: report.html, JSON, CSV, PNG, Markdown.")
@click.option("--title", help="What the page is called.")
@asking_options
@provider_option
@threads_option
@force_option
@json_option
def report(bundles: tuple[Path, ...], ref: Path | None, out: Path, as_json: bool, **options: Any) -> None:
    """What compression cost and what it bought: bundles beside each other, as a page, tables and plots."""
    from vlmdeploy.calib.prepare import use_threads
    from vlmdeploy.calib.report.overview import SUMMARY_COLUMNS, summary_rows
    from vlmdeploy.calib.report.run import make_report, read_report_options

    use_threads(options["threads"])
    with progress_bar() as progress:
        made = make_report(read_report_options(bundles=bundles, ref=ref, out=out, **options), progress)
    if as_json:
        print_json({"report": str(out), **asdict(made)})
    else:
        print_rows(f"{out / 'report.html'}: {made.title}", SUMMARY_COLUMNS, summary_rows(made))


@main.command()
@click.option("--ckpt", type=FOLDER, required=True, help="The float checkpoint, which all points are compared with.")
@click.option("--grid", type=FOLDER, required=True, help="The grid of points, a TOML file.")
@click.option("--data", type=FOLDER, required=True, help="The questions: JSONL, VLMEvalKit TSV or RefCOCO.")
@click.option("--calib", type=FOLDER, help="Calibration data; see `quantize` for its kinds.")
@click.option("--out", type=FOLDER, required=True, help="The folder of the sweep; the same one continues it.")
@click.option("--samples", type=click.IntRange(min=1), default=512, help="At most this many calibration samples.")
@click.option("--tokens", type=click.IntRange(min=1), help="Calibration tokens wanted per expert; see `quantize`.")
@click.option("--ray", help='Run points on a Ray cluster: an address, "auto", or "local" for one on this machine.')
@click.option("--cpus", type=click.IntRange(min=1), help="CPUs of a point on the cluster.  [default: a whole machine]")
@click.option("--title", help="What the report is called.")
@asking_options
@threads_option
@json_option
def sweep(
    ckpt: Path,
    grid: Path,
    calib: Path | None,
    out: Path,
    samples: int,
    tokens: int | None,
    ray: str | None,
    cpus: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Quantize, export, score and measure every point of a grid, and report them together."""
    from vlmdeploy.calib.prepare import use_threads
    from vlmdeploy.calib.report.overview import SUMMARY_COLUMNS, summary_rows
    from vlmdeploy.calib.report.run import read_report_options
    from vlmdeploy.calib.sweep.run import SweepOptions, run_sweep, sweep_json

    use_threads(options["threads"])
    asked = read_report_options(bundles=(), ref=ckpt, out=out, **options)
    calibration = {"samples": samples, "tokens": tokens, "tokenizer": options["tokenizer"]}
    chosen = SweepOptions(ckpt, grid, out, asked, calib, calibration, options["threads"], ray, cpus)
    with progress_bar() as progress:
        result = run_sweep(chosen, progress)
    for failure in result.failures:
        warn(f"{failure.name} failed: {failure.error}")
    if as_json:
        print_json({"report": str(out / "report"), **sweep_json(result)})
    else:
        title = f"{out / 'report' / 'report.html'}: {len(result.points)} points, {len(result.failures)} failed"
        print_rows(title, SUMMARY_COLUMNS, summary_rows(result.report))


def calibration_options(command: Command) -> Command:
    """The options that `quantize` and `export` share."""
    quality = "high: a second stream of float activations corrects for layers quantized before; twice the time."
    options = (
        click.option("--calib-prompt", help="The question for each picture, where --calib is a folder of pictures."),
        click.option("--samples", type=click.IntRange(min=1), default=512, help="At most this many samples."),
        click.option(
            "--tokens", type=click.IntRange(min=1), help="Wanted per expert.  [default: 4 x its widest input]"
        ),
        click.option("--skip-broken", is_flag=True, help="Leave out and count samples that cannot be used."),
        click.option("--quality", type=click.Choice(["default", "high"]), default="default", help=quality),
    )
    for option in reversed(options):
        command = option(command)
    return command


def build_options(command: Command) -> Command:
    """The options that `export` and `build` share: what engines are compiled for."""
    options = (
        click.option("--sm", multiple=True, help='Compute capability of an engine, "8.6"; none: a portable RTX plan.'),
        click.option("--device", help="What the engines will run on, such as rtx-4060-ti-16 or agx-orin-64."),
        click.option("--chunk-rows", type=click.IntRange(min=1), default=512, help="Most prompt rows of one call."),
        click.option("--max-memory", help="Memory for building an engine, such as 12GB.  [default: what is free]"),
    )
    for option in reversed(options):
        command = option(command)
    return command


@main.command()
@click.option("--ckpt", type=FOLDER, help="A checkpoint folder; its weights may be missing.")
@click.option("--family", help="A family's released checkpoint; with --ckpt: what the folder holds.")
@click.option("--device", required=True, help='A device such as orin-nx-16, a profile file.toml, or "host".')
@click.option("--power-mode", help="Of a Jetson, as nvpmodel names it.  [default: the fastest of its standard flash]")
@click.option("--target", type=TARGET, help="[default: the one for the device]")
@click.option("--provider", type=PROVIDER, help="ONNX Runtime's execution provider, for ort targets.  [default: cpu]")
@click.option("--vision", type=PRECISION, help="Precision of the vision encoder.  [default: the target's]")
@click.option("--connector", type=PRECISION, help="Precision of the connector.  [default: the target's]")
@click.option("--lm-head", type=PRECISION, help="Precision of the head.  [default: the target's]")
@click.option("--embedding", type=PRECISION, help="Precision of the embedding table.  [default: the target's]")
@click.option("--kv", type=click.Choice(["fp32", "fp16"]), help="Precision of the KV cache.  [default: the target's]")
@click.option("--bits", type=click.Choice(["3", "4", "8"]), help="Of the decoder's codes.  [default: the target's]")
@click.option("--group", type=int, help="Weights that share a scale.  [default: 128]")
@click.option("--context", type=click.IntRange(min=1), help="Longest prompt and answer.  [default: the model's]")
@click.option("--images", type=click.IntRange(min=0), default=1, help="Pictures of one prompt.")
@click.option("--text-tokens", type=click.IntRange(min=1), default=64, help="Tokens of the prompt's text.")
@click.option("--residency", type=RESIDENCY, default="phase", help="phase: only what a phase needs is loaded.")
@click.option("--chunk-rows", type=click.IntRange(min=1), help="Most prompt rows of one engine call.  [default: 512]")
@click.option("--swap", help="Swap for building engines on the device, such as 16GB.")
@click.option("--html", type=FOLDER, help="Write the plan as a page, too.")
@json_option
def plan(
    ckpt: Path | None,
    family: str | None,
    device: str,
    power_mode: str | None,
    html: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Will it fit, and how fast could it be? Without weights, a device or a build."""
    from vlmdeploy.export.plan import make_plan, plan_json
    from vlmdeploy.export.plan_device import plan_device
    from vlmdeploy.export.plan_model import planned_model
    from vlmdeploy.export.plan_options import read_plan_options
    from vlmdeploy.export.plan_table import headline, plan_tables, write_page

    if ckpt is None and family is None:
        raise click.UsageError("give --ckpt or --family")
    chosen = read_plan_options(**options)
    made = make_plan(planned_model(ckpt, family), plan_device(device, power_mode), chosen)
    for message in made.warnings:
        warn(message)
    if html is not None:
        write_page(made, html)
    if as_json:
        print_json(plan_json(made))
        return
    print(headline(made))
    for table in plan_tables(made):
        print_rows(table.title, table.columns, table.rows)
    print_rows("what this rests on", [""], [[line] for line in made.assumptions])


@main.command()
@click.option("--ckpt", type=FOLDER, required=True, help="The float checkpoint folder.")
@click.option("--calib", type=FOLDER, required=True, help="JSONL, VLMEvalKit TSV, RefCOCO, SFT-311K root, or pictures.")
@click.option("--out", type=FOLDER, required=True, help="The quantized checkpoint folder to write.")
@calibration_options
@click.option("--select", type=click.Choice(["random", "perplexity"]), default="random", help="How samples are drawn.")
@click.option("--tokenizer", type=FOLDER, help="tokenizer.json, tokenizer.model, or a folder.  [default: --ckpt]")
@click.option("--template", help="The prompt template for rows that name none.  [default: the checkpoint's]")
@click.option("--bits", type=click.Choice(["3", "4", "8"]), default="4", help="Of the decoder's linears.")
@click.option("--group", type=int, default=128, help="Inputs that share a scale; -1: all of them.")
@click.option("--asymmetric", is_flag=True, help="Zero points for every group; not for TensorRT.")
@click.option("--vision", type=PRECISION, help="Precision of the vision encoder.  [default: int8]")
@click.option("--connector", type=PRECISION, help="Precision of the connector.  [default: int8]")
@click.option("--lm-head", type=PRECISION, help="Precision of the head.  [default: int8]")
@click.option("--override", multiple=True, help="PATTERN=TYPE or PATTERN=TYPE:GROUP for single linears.")
@click.option("--budget", help="Choose bits and groups by measured cost: 9.0GB in all, or average bits such as 4.25.")
@click.option("--hessian", type=HESSIAN, default="routed", help="Whose tokens calibrate an expert; others to compare.")
@click.option("--allow-uncalibrated", is_flag=True, help="Round an expert to nearest that too few tokens reach.")
@click.option("--max-memory", default="1GB", help="Activations beyond this go to disk.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Which samples are drawn.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of PyTorch.  [default: one per core]")
@force_option
@json_option
def quantize(
    ckpt: Path, calib: Path, out: Path, as_json: bool, threads: int | None, max_memory: str, **options: Any
) -> None:
    """Quantize a checkpoint with calibration data; the same command continues an interrupted run."""
    from vlmdeploy.calib.prepare import quantize as quantize_checkpoint
    from vlmdeploy.calib.prepare import quantize_options, use_threads
    from vlmdeploy.calib.report_table import COVERAGE_COLUMNS, ERROR_COLUMNS, coverage_rows, error_rows, summary_rows

    use_threads(threads)
    with progress_bar() as progress:
        result = quantize_checkpoint(ckpt, out, quantize_options(calib, max_memory, **options), progress)
    if not result.is_told_here:
        return
    for message in result.warnings:
        warn(message)
    if as_json:
        print_json({"checkpoint": str(out), "message": result.message, **result.report})
        return
    print_rows(f"{out}: {result.message}", ["", ""], summary_rows(result.report))
    print_rows("calibration", COVERAGE_COLUMNS, coverage_rows(result.report))
    print_rows(
        "errors, relative to the outputs, mean over layers", ERROR_COLUMNS, error_rows(result.report, each=False)
    )


@main.command()
@click.option("--ckpt", type=FOLDER, required=True, help="The checkpoint folder (Hugging Face layout, safetensors).")
@click.option("--target", type=TARGET, required=True, help="What the bundle runs on, and how precise it is.")
@click.option("--out", type=FOLDER, required=True, help="The bundle folder to write.")
@click.option("--calib", type=FOLDER, help="Data to quantize a float checkpoint with; see `quantize` for its kinds.")
@click.option("--quant", type=click.Choice(["rtn"]), help="rtn: round to nearest, without any data.")
@calibration_options
@click.option("--tokenizer", type=FOLDER, help="tokenizer.json, tokenizer.model, or a folder.  [default: --ckpt]")
@click.option("--vision", type=PRECISION, help="Precision of the vision encoder.  [default: the target's]")
@click.option("--connector", type=PRECISION, help="Precision of the connector.  [default: the target's]")
@click.option("--lm-head", type=PRECISION, help="Precision of the head.  [default: the target's]")
@click.option("--embedding", type=PRECISION, help="Precision of the embedding table.  [default: the target's]")
@click.option("--kv", type=click.Choice(["fp32", "fp16"]), help="Precision of the KV cache.  [default: the target's]")
@click.option("--group", type=int, default=128, help="Weights that share a scale.")
@click.option("--context", type=click.IntRange(min=1), help="Longest prompt and answer.  [default: the checkpoint's]")
@click.option("--template", help="The prompt template used by default.  [default: the checkpoint's]")
@click.option("--provider", type=PROVIDER, default="cpu", help="ONNX Runtime's execution provider, for ort targets.")
@build_options
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of the verification's picture and prompt.")
@threads_option
@force_option
@json_option
def export(
    ckpt: Path,
    target: str,
    out: Path,
    calib: Path | None,
    quant: str | None,
    tokenizer: Path | None,
    vision: str | None,
    connector: str | None,
    lm_head: str | None,
    embedding: str | None,
    kv: str | None,
    group: int,
    context: int | None,
    template: str | None,
    provider: Literal["cpu", "cuda"],
    seed: int,
    threads: int | None,
    force: bool,
    as_json: bool,
    sm: tuple[str, ...],
    device: str | None,
    chunk_rows: int,
    max_memory: str | None,
    **calibration: Any,
) -> None:
    """Write a verified bundle: graphs, weights, tokenizer and manifest in one folder."""
    from vlmdeploy.calib.export_calibrated import export_calibrated, holds_codes
    from vlmdeploy.calib.prepare import quantize_options
    from vlmdeploy.export.engine_build import read_build_options
    from vlmdeploy.export.exporter import export_bundle
    from vlmdeploy.export.options import ExportOptions
    from vlmdeploy.runtime.summary import bundle_rows

    if calib is not None and quant is not None:
        raise click.UsageError("--calib and --quant rtn exclude each other: give one of them")
    if calib is None and quant is None and target.endswith("int4") and not holds_codes(ckpt):
        raise click.UsageError(
            f"{ckpt} holds floats, so int4 codes must be chosen: give --calib DATA to calibrate them, or --quant rtn "
            "to round to nearest"
        )
    chosen = {"vision": vision, "connector": connector, "lm_head": lm_head, "embedding": embedding}
    precisions = {part: precision for part, precision in chosen.items() if precision}
    build = read_build_options(sm, chunk_rows, max_memory, device)
    options = ExportOptions(
        target, precisions, group, context, tokenizer, template, provider, force, seed, threads, build, kv
    )
    with progress_bar() as progress:
        if calib is None:
            manifest, warnings = export_bundle(ckpt, out, options, progress)
        else:
            chosen_data = quantize_options(calib, **calibration)
            manifest, warnings = export_calibrated(ckpt, out, options, chosen_data, progress)
    for message in warnings:
        warn(message)
    if as_json:
        print_json({"bundle": str(out), "warnings": warnings, "manifest": asdict(manifest)})
    else:
        print_rows(f"{out}: verified bundle", ["", ""], bundle_rows(manifest))


@main.command()
@click.argument("bundle", type=FOLDER)
@build_options
@json_option
def build(
    bundle: Path, sm: tuple[str, ...], device: str | None, chunk_rows: int, max_memory: str | None, as_json: bool
) -> None:
    """Compile a bundle's graphs with the TensorRT of this machine; they become a part of the bundle."""
    from vlmdeploy.export.engine_build import build_bundle, read_build_options
    from vlmdeploy.runtime.summary import ENGINE_COLUMNS, engine_rows

    with progress_bar() as progress:
        manifest, is_new = build_bundle(bundle, read_build_options(sm, chunk_rows, max_memory, device), progress)
    if as_json:
        print_json({"bundle": str(bundle), "is_new": is_new, "engines": manifest.engines})
    else:
        title = "engines built" if is_new else "the engines are built already, for these options"
        print_rows(f"{bundle}: {title}", ENGINE_COLUMNS, engine_rows(manifest))


@main.command()
@click.argument("bundle", type=FOLDER)
@click.option("--ckpt", type=FOLDER, help="Compare every stage with this checkpoint in PyTorch.")
@provider_option
@threads_option
@json_option
def verify(bundle: Path, ckpt: Path | None, provider: str | None, threads: int | None, as_json: bool) -> None:
    """Check a bundle on this machine: every hash, then every stage against --ckpt, or else the recorded run."""
    if ckpt is None:
        from vlmdeploy.runtime.replay import replay

        verdicts = replay(bundle, threads, provider)
    else:
        from vlmdeploy.export.verify import verify_bundle

        with progress_bar() as progress:
            verdicts = verify_bundle(bundle, ckpt, threads, progress)
    if as_json:
        print_json({"passed": True, "stages": [asdict(verdict) for verdict in verdicts]})
        return
    columns = ["stage", "check", "error", "allowed", "largest at"]
    rows = [[v.stage, v.check, f"{v.max_error:.2e}", f"{v.tolerance:.0e}", v.tensor] for v in verdicts]
    print_rows(f"{bundle}: agrees in all {len(rows)} comparisons", columns, rows)


@main.command()
@click.argument("a", type=FOLDER)
@click.argument("b", type=FOLDER)
@click.option("--image", help="A picture: a path or a data URL.  [default: a drawn one, or none beside --prompt]")
@click.option("--prompt", help="A question.  [default: drawn ids]")
@click.option("--isolate", is_flag=True, help="Also feed each stage of B with A's values: names what is wrong itself.")
@click.option("--tolerance", type=float, help="Relative error that passes.  [default: the gate's for these precisions]")
@click.option("--plot", type=FOLDER, help="Draw the errors of all stages into this file (png, svg, pdf).")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of the drawn picture and ids.")
@click.option("--fail", is_flag=True, help="Exit with status 1 if a stage is beyond the tolerance.")
@threads_option
@json_option
def diff(
    a: Path,
    b: Path,
    image: str | None,
    prompt: str | None,
    isolate: bool,
    tolerance: float | None,
    plot: Path | None,
    seed: int,
    fail: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Compare two models, checkpoints or bundles, stage by stage on the same input: where does B leave A?"""
    from vlmdeploy.export.diff import DiffOptions, diff_models
    from vlmdeploy.export.diff_plot import check_plot, write_plot

    if plot is not None:
        check_plot(plot)
    with progress_bar() as progress:
        found = diff_models(a, b, DiffOptions(image, prompt, isolate, tolerance, threads, seed), progress)
    if plot is not None:
        write_plot(found, plot)
    if as_json:
        print_json(found.as_json())
    else:
        print_rows(f"A: {a}, B: {b}", found.columns(), found.rows())
        click.echo("\n".join(found.verdict()))
    if fail and not found.agrees:
        raise click.exceptions.Exit(1)


@main.command()
@click.argument("bundle", type=FOLDER)
@click.option("--image", multiple=True, help="A picture: a path or a data URL.")
@click.option("--prompt", required=True, help="The question.")
@click.option("--template", help="The prompt template.  [default: the bundle's]")
@click.option("--max-new-tokens", type=int, default=256, help="Longest answer.")
@click.option("--temperature", type=float, default=0.0, help="0 takes the best token every time.")
@click.option("--top-k", type=int, default=0, help="Draw from the k best tokens; 0 is off.")
@click.option("--top-p", type=float, default=1.0, help="Draw from the tokens that hold this much probability.")
@click.option("--repetition-penalty", type=float, default=1.0, help="Above 1: repeat less; 1 is off.")
@click.option("--seed", type=int, help="Makes a drawn answer repeatable.")
@click.option("--stop", multiple=True, help="End the answer before this text.")
@click.option("--draw", type=FOLDER, help="Write the picture with the answer's boxes painted on it.")
@click.option("--residency", type=RESIDENCY, default="all", help="phase: free what only the prompt needed.")
@provider_option
@threads_option
@json_option
def run(
    bundle: Path,
    image: tuple[str, ...],
    prompt: str,
    template: str | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    repetition_penalty: float,
    seed: int | None,
    stop: tuple[str, ...],
    draw: Path | None,
    residency: str,
    provider: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Ask a bundle one question, with or without a picture."""
    from vlmdeploy.runtime.ask import ask
    from vlmdeploy.runtime.sampling import SamplingOptions

    options = SamplingOptions(temperature, top_k, top_p, repetition_penalty, seed, max_new_tokens, stop)
    show = None if as_json else lambda piece: print(piece, end="", flush=True)
    with vlmdeploy.open(bundle, provider=provider, threads=threads, residency=residency) as session:
        answer = ask(session, image, prompt, options, template, draw, show)
    if as_json:
        print_json(answer.as_json())
    else:
        print()


@main.command()
@click.argument("bundle", type=FOLDER)
@click.option("--image", help="A picture: a path or a data URL.  [default: a random one]")
@click.option("--text-only", is_flag=True, help="Ask without a picture.")
@click.option("--prompt", help="The question.  [default: a fixed one; random ids where there is no tokenizer]")
@click.option("--template", help="The prompt template.  [default: the bundle's]")
@click.option("--new-tokens", type=click.IntRange(min=1), default=64, help="Tokens decoded in every answer.")
@click.option("--repeat", "repeats", type=click.IntRange(min=1), default=5, help="Answers that are timed.")
@click.option("--warmup", type=click.IntRange(min=0), default=1, help="Answers before those, not timed.")
@click.option("--residency", type=RESIDENCY, default="all", help="phase: free what only the prompt needed.")
@provider_option
@threads_option
@json_option
def bench(bundle: Path, as_json: bool, **options: Any) -> None:
    """Measure a bundle on this machine: time to first token, decode rate, memory, energy."""
    from vlmdeploy.runtime.measure import measure_in_process
    from vlmdeploy.runtime.measurement import MeasureOptions
    from vlmdeploy.runtime.measurement_table import COLUMNS, measurement_rows, measurement_title

    if options["text_only"] and options["image"] is not None:
        raise click.UsageError("--text-only and --image exclude each other: give one of them")
    found = measure_in_process(bundle, MeasureOptions(**options))
    if as_json:
        print_json(asdict(found))
    else:
        print_rows(measurement_title(found), COLUMNS, measurement_rows(found))


@main.command()
@click.argument("folder", type=FOLDER)
@json_option
def inspect(folder: Path, as_json: bool) -> None:
    """Describe a checkpoint or a bundle."""
    from vlmdeploy.bundle import MANIFEST_NAME, read_manifest

    if (folder / MANIFEST_NAME).is_file():
        from vlmdeploy.runtime.summary import bundle_rows

        manifest = read_manifest(folder)
        rows, content = bundle_rows(manifest), asdict(manifest)
    else:
        from vlmdeploy.model.summary import checkpoint_rows, checkpoint_summary

        content = checkpoint_summary(folder)
        rows = checkpoint_rows(content)
    if as_json:
        print_json(content)
        return
    print_rows(str(folder), ["", ""], rows)
    if content.get("engines"):
        from vlmdeploy.runtime.summary import ENGINE_COLUMNS, engine_rows

        print_rows("engines", ENGINE_COLUMNS, engine_rows(manifest))
    if "quantization_report" in content:
        from vlmdeploy.calib.report_table import COVERAGE_COLUMNS, ERROR_COLUMNS, coverage_rows, error_rows

        report = content["quantization_report"]
        print_rows("calibration", COVERAGE_COLUMNS, coverage_rows(report))
        print_rows("errors, relative to the outputs", ERROR_COLUMNS, error_rows(report, each=True))

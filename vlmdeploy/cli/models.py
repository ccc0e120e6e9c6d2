"""Commands that make models and bundles: train, quantize, export, build, sweep."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from vlmdeploy.cli.console import print_headline, print_json, print_rows, progress_bar, warn
from vlmdeploy.cli.group import main
from vlmdeploy.cli.options import (
    FOLDER,
    HESSIAN,
    PROVIDER,
    TARGET,
    THREADS,
    asking_options,
    build_options,
    calibration_options,
    follow_links_option,
    force_option,
    json_option,
    kv_option,
    precision_options,
    report_options,
    routed_option,
    taken,
    taken_precisions,
    threads_option,
)
from vlmdeploy.standard_streams import say

CONTEXT = "Longest prompt and answer.  [default: the checkpoint's]"
IMAGE_RECIPE = "How a picture becomes square.  [default: the family's]"
TEMPLATE = "The prompt template used by default.  [default: the checkpoint's]"
CALIBRATION = ("calib_prompt", "samples", "tokens", "skip_broken", "quality")  # of `export`, for QuantizeOptions


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
        print_headline(f"{out}: {result.message}")


@main.command()
@click.option("--ckpt", type=FOLDER, required=True, help="The float checkpoint folder.")
@follow_links_option
@click.option("--calib", type=FOLDER, required=True, help="JSONL, VLMEvalKit TSV, RefCOCO, SFT-311K root, or pictures.")
@click.option("--out", type=FOLDER, required=True, help="The quantized checkpoint folder to write.")
@calibration_options
@click.option("--select", type=click.Choice(["random", "perplexity"]), default="random", help="How to draw samples.")
@click.option("--tokenizer", type=FOLDER, help="tokenizer.json, tokenizer.model, or a folder.  [default: --ckpt]")
@click.option("--template", help="The prompt template for rows that name none.  [default: the checkpoint's]")
@click.option("--bits", type=click.Choice(["3", "4", "8"]), default="4", help="Bits of the decoder's linears.")
@click.option("--group", type=int, default=128, help="Inputs that share a scale; -1: all of them.")
@click.option("--asymmetric", is_flag=True, help="One zero point per group; not for TensorRT.")
@click.option("--positive-scales", is_flag=True, help="No negative scales; for TensorRT, and readers that want none.")
@precision_options("vision connector lm-head", "int8")
@click.option("--override", multiple=True, help="PATTERN=TYPE or PATTERN=TYPE:GROUP for single linears.")
@click.option("--budget", help="Choose bits and groups by measured cost: 9.0GB in all, or average bits such as 4.25.")
@click.option("--hessian", type=HESSIAN, default="routed", help="Which tokens calibrate an expert.")
@click.option("--allow-uncalibrated", is_flag=True, help="Round an expert to nearest if too few tokens reach it.")
@click.option("--max-memory", default="1GB", help="Memory for activations; more goes to disk.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed for drawing the samples.")
@click.option("--threads", type=THREADS, help="Threads of PyTorch.  [default: one per core]")
@force_option
@json_option
def quantize(ckpt: Path, out: Path, as_json: bool, threads: int | None, **options: Any) -> None:
    """Quantize a checkpoint with calibration data; the same command continues an interrupted run."""
    from vlmdeploy.calib.request import QuantizeOptions, quantize_checkpoint, use_threads
    from vlmdeploy.quant.quantization_table import (
        COVERAGE_COLUMNS,
        ERROR_COLUMNS,
        coverage_rows,
        error_rows,
        summary_rows,
    )

    use_threads(threads)
    with progress_bar() as progress:
        result = quantize_checkpoint(ckpt, out, QuantizeOptions(**options), progress, say)
    if not result.is_reported_here:
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
@follow_links_option
@click.option("--target", type=TARGET, required=True, help="Where the bundle runs, and its precision.")
@click.option("--out", type=FOLDER, required=True, help="The bundle folder to write.")
@click.option("--calib", type=FOLDER, help="Data to quantize a float checkpoint with; `quantize` lists the kinds.")
@click.option("--quant", type=click.Choice(["rtn"]), help="rtn: round to nearest, without data.")
@calibration_options
@click.option("--tokenizer", type=FOLDER, help="tokenizer.json, tokenizer.model, or a folder.  [default: --ckpt]")
@precision_options("vision connector lm-head embedding", "the target's")
@kv_option
@click.option("--group", type=int, default=128, help="Weights that share a scale.")
@click.option("--context", "context_tokens", type=click.IntRange(min=1), help=CONTEXT)
@click.option("--template", "default_template", help=TEMPLATE)
@click.option("--image-recipe", type=click.Choice(["squash", "pad", "crop"]), help=IMAGE_RECIPE)
@click.option("--provider", type=PROVIDER, default="cpu", help="ONNX Runtime's execution provider, for ort targets.")
@routed_option
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
    as_json: bool,
    **options: Any,
) -> None:
    """Write a verified bundle: graphs, weights, tokenizer and manifest in one folder."""
    from vlmdeploy.calib.request import QuantizeOptions
    from vlmdeploy.export.calibrated import export_calibrated, holds_codes
    from vlmdeploy.export.engines.build import BuildOptions
    from vlmdeploy.export.exporter import export_bundle
    from vlmdeploy.export.options import ExportOptions
    from vlmdeploy.runtime.summary import bundle_rows

    if calib is not None and quant is not None:
        raise click.UsageError("--calib and --quant rtn exclude each other: give one of them")
    if calib is None and quant is None and target.endswith("int4") and not holds_codes(ckpt, options["follow_links"]):
        raise click.UsageError(
            f"{ckpt} holds floats, so int4 codes must be chosen: give --calib DATA to calibrate them, or --quant rtn "
            "to round to nearest"
        )
    data = {name: options.pop(name) for name in CALIBRATION}
    chosen = ExportOptions(target, taken_precisions(options), build=taken(BuildOptions, options), **options)
    with progress_bar() as progress:
        if calib is None:
            manifest, warnings = export_bundle(ckpt, out, chosen, progress)
        else:
            manifest, warnings = export_calibrated(ckpt, out, chosen, QuantizeOptions(calib, **data), progress, say)
    for message in warnings:
        warn(message)
    if as_json:
        print_json({"bundle": str(out), "warnings": warnings, "manifest": asdict(manifest)})
    else:
        print_rows(f"{out}: verified bundle", ["", ""], bundle_rows(manifest))


@main.command()
@click.argument("bundle", type=FOLDER)
@routed_option
@click.option("--plugin-library", type=FOLDER, help="The routed plugin.  [default: its kernels go into the engine]")
@click.option("--batch", type=click.IntRange(min=1), default=1, help="Most prompts per call of a routed decoder.")
@build_options
@json_option
def build(bundle: Path, as_json: bool, **options: Any) -> None:
    """Compile a bundle's graphs with the TensorRT of this machine; they become a part of the bundle."""
    from vlmdeploy.export.engines.build import BuildOptions, build_bundle
    from vlmdeploy.runtime.summary import ENGINE_COLUMNS, engine_rows

    with progress_bar() as progress:
        manifest, is_new = build_bundle(bundle, BuildOptions(**options), progress)
    if as_json:
        print_json({"bundle": str(bundle), "is_new": is_new, "engines": manifest.engines})
    else:
        title = "engines built" if is_new else "the engines are built already, for these options"
        print_rows(f"{bundle}: {title}", ENGINE_COLUMNS, engine_rows(manifest))


@main.command()
@click.option("--ckpt", type=FOLDER, required=True, help="The float checkpoint to compare every point with.")
@click.option("--grid", type=FOLDER, required=True, help="The grid of points, a TOML file.")
@click.option("--data", type=FOLDER, required=True, help="The questions: JSONL, VLMEvalKit TSV or RefCOCO.")
@click.option("--calib", type=FOLDER, help="Calibration data; `quantize` lists the kinds.")
@click.option("--out", type=FOLDER, required=True, help="The folder of the sweep; an interrupted sweep continues.")
@click.option("--samples", type=click.IntRange(min=1), default=512, help="At most this many calibration samples.")
@click.option("--tokens", type=click.IntRange(min=1), help="Calibration tokens wanted per expert; see `quantize`.")
@click.option("--ray", help='Run points on a Ray cluster: an address, "auto", or "local" for one on this machine.')
@click.option("--cpus", type=click.IntRange(min=1), help="CPUs per point on the cluster.  [default: a whole machine]")
@click.option("--title", help="Title of the report.")
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
    from vlmdeploy.calib.request import use_threads
    from vlmdeploy.report.overview import terminal_table
    from vlmdeploy.sweep.run import SweepOptions, run_sweep, sweep_json
    from vlmdeploy.sweep.task import Calibration

    use_threads(options["threads"])
    asked = report_options({"bundles": (), "ref": ckpt, "out": out, **options})
    calibration = Calibration(samples, tokens, options["tokenizer"])
    chosen = SweepOptions(ckpt, grid, out, asked, calib, calibration, options["threads"], ray, cpus)
    with progress_bar() as progress:
        result = run_sweep(chosen, progress)
    for failure in result.failures:
        warn(f"{failure.name} failed: {failure.error}")
    if as_json:
        print_json({"report": str(out / "report"), **sweep_json(result)})
    else:
        title = f"{out / 'report' / 'report.html'}: {len(result.points)} points, {len(result.failures)} failed"
        print_rows(title, *terminal_table(result.report))

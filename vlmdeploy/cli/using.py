"""Commands that plan for a device, ask a bundle, and describe a folder: plan, run, inspect."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import vlmdeploy
from vlmdeploy.cli.console import print_answer, print_headline, print_json, print_rows, warn
from vlmdeploy.cli.group import main
from vlmdeploy.cli.options import (
    FOLDER,
    PROVIDER,
    RESIDENCY,
    TARGET,
    follow_links_option,
    json_option,
    kv_option,
    max_megapixels_option,
    picture_file,
    precision_options,
    provider_option,
    taken_precisions,
    threads_option,
)
from vlmdeploy.errors import DataError, PromptError

if TYPE_CHECKING:
    from vlmdeploy.runtime.boxes import Box

CONTEXT = "Longest prompt and answer.  [default: the model's]"


@main.command()
@click.option("--ckpt", type=FOLDER, help="A checkpoint folder; its weights may be missing.")
@follow_links_option
@click.option("--family", help="A family's released checkpoint; with --ckpt: what the folder holds.")
@click.option("--device", required=True, help='A device such as orin-nx-16, a profile file.toml, or "host".')
@click.option(
    "--power-mode", help="A Jetson's mode, as nvpmodel names it.  [default: the fastest of its standard flash]"
)
@click.option("--target", type=TARGET, help="[default: the one for the device]")
@click.option("--provider", type=PROVIDER, help="ONNX Runtime's execution provider, for ort targets.  [default: cpu]")
@precision_options("vision connector lm-head embedding", "the target's")
@kv_option
@click.option(
    "--bits",
    type=click.Choice(["3", "4", "8"]),
    callback=lambda context, option, bits: bits and int(bits),
    help="Bits of the decoder's codes.  [default: the target's]",
)
@click.option("--group", type=int, help="Weights that share a scale.  [default: 128]")
@click.option("--context", "context_tokens", type=click.IntRange(min=1), help=CONTEXT)
@click.option("--images", type=click.IntRange(min=0), default=1, help="Pictures per prompt.")
@click.option("--text-tokens", type=click.IntRange(min=1), default=64, help="Text tokens per prompt.")
@click.option("--residency", type=RESIDENCY, default="phase", help="phase: load only what a phase needs.")
@click.option("--chunk-rows", type=click.IntRange(min=1), help="Most prompt rows per engine call.  [default: 512]")
@click.option("--swap", help="Swap for building engines on the device, such as 16GB.")
@click.option("--html", type=FOLDER, help="Also write the plan as a page.")
@json_option
def plan(
    ckpt: Path | None,
    follow_links: bool,
    family: str | None,
    device: str,
    power_mode: str | None,
    html: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Will it fit, and how fast could it be? Without weights, a device or a build."""
    from vlmdeploy.artifact import check_file, check_not_read
    from vlmdeploy.plan.device import plan_device
    from vlmdeploy.plan.options import PlanOptions
    from vlmdeploy.plan.planned_model import planned_model
    from vlmdeploy.plan.planner import make_plan, plan_json
    from vlmdeploy.plan.table import headline, plan_tables, write_page

    if ckpt is None and family is None:
        raise click.UsageError("give --ckpt or --family")
    chosen = PlanOptions(precisions=taken_precisions(options), **options)
    if html is not None:
        check_file(html)
        check_not_read(html, (ckpt, Path(device)))
    made = make_plan(planned_model(ckpt, family, follow_links), plan_device(device, power_mode), chosen)
    for message in made.warnings:
        warn(message)
    if html is not None:
        write_page(made, html)
    if as_json:
        print_json(plan_json(made))
        return
    print_headline(headline(made))
    for table in plan_tables(made):
        print_rows(table.title, table.columns, table.rows)
    print_rows("what this rests on", [""], [[line] for line in made.assumptions])


@main.command()
@click.argument("bundle", type=FOLDER)
@click.option("--image", multiple=True, help="A picture: a path or a data URL.")
@click.option("--prompt", required=True, help="The question.")
@click.option("--template", help="The prompt template.  [default: the bundle's]")
@click.option("--max-new-tokens", type=int, default=256, help="Most tokens of an answer.")
@click.option("--temperature", type=float, default=0.0, help="0 always takes the best token.")
@click.option("--top-k", type=int, default=0, help="Draw from the k best tokens; 0 is off.")
@click.option("--top-p", type=float, default=1.0, help="Draw from the tokens that hold this much probability.")
@click.option("--repetition-penalty", type=float, default=1.0, help="Above 1: repeat less; 1 is off.")
@click.option("--seed", type=int, help="Seed that makes a drawn answer repeatable.")
@click.option("--stop", multiple=True, help="Stop the answer before this text.")
@click.option("--draw", type=FOLDER, help="Write the picture with the answer's boxes painted on it.")
@click.option("--residency", type=RESIDENCY, default="all", help="phase: free what only the prompt needed.")
@max_megapixels_option
@provider_option
@threads_option
@json_option
def run(
    bundle: Path,
    image: tuple[str, ...],
    prompt: str,
    template: str | None,
    draw: Path | None,
    residency: str,
    max_megapixels: float,
    provider: str | None,
    threads: int | None,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Ask a bundle one question, with or without a picture."""
    from vlmdeploy.runtime.sampling import SamplingOptions

    options, limits = SamplingOptions(**sampling), vlmdeploy.ImageLimits.for_megapixels(max_megapixels)
    if draw is not None:
        _check_drawing(draw, bundle, image)
    with vlmdeploy.open(
        bundle, provider=provider, threads=threads, residency=residency, image_limits=limits
    ) as session:
        content = [*({"type": "image", "image": each} for each in image), {"type": "text", "text": prompt}]
        running = session.start([{"role": "user", "content": content}], options, template)
        pieces = []
        for piece in running.pieces():
            pieces.append(piece)
            if not as_json:
                print_answer(piece)
        answer = running.finish("".join(pieces))
    if draw is not None:
        _draw(image[0], limits, answer.boxes, draw)
    if as_json:
        print_json(answer.as_json())
    else:
        print_answer("\n")


def _check_drawing(path: Path, bundle: Path, images: tuple[str, ...]) -> None:
    """Raise PromptError, DataError or ExportError, before anything runs, if boxes cannot be painted into this file."""
    from vlmdeploy.artifact import check_file, check_not_read
    from vlmdeploy.runtime.boxes import names_a_picture

    if not images:
        raise PromptError("--draw paints boxes on the picture: give --image too")
    if not names_a_picture(path):
        raise DataError(f"{path}: the picture cannot be written (its name ends in {path.suffix!r}, unlike a picture)")
    check_file(path)
    check_not_read(path, (bundle, *map(picture_file, images)))


def _draw(image: str, limits: "vlmdeploy.ImageLimits", boxes: "Sequence[Box]", path: Path) -> None:
    """Write the picture with the boxes painted on it. Raises DataError."""
    from vlmdeploy.artifact import written_aside
    from vlmdeploy.runtime.boxes import draw_boxes
    from vlmdeploy.runtime.image import load_image

    try:
        with written_aside(path) as aside:
            draw_boxes(load_image(image, limits), boxes).save(aside)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: the picture cannot be written ({error})") from error


@main.command()
@click.argument("bundle", type=FOLDER)
@click.option("--revoke", is_flag=True, help="Trust it no longer.")
@json_option
def trust(bundle: Path, revoke: bool, as_json: bool) -> None:
    """Let this machine run the native code of a bundle: its engines and its plugin library."""
    from vlmdeploy.runtime.trust import revoke_bundle, trust_bundle

    digest = revoke_bundle(bundle) if revoke else trust_bundle(bundle)
    if as_json:
        print_json({"bundle": str(bundle), "manifest_sha256": digest, "trusted": not revoke})
    else:
        print_headline(
            f"{bundle}: {'no longer trusted' if revoke else 'trusted'} here, SHA-256 of its manifest {digest}"
        )


@main.command()
@click.argument("folder", type=FOLDER)
@follow_links_option
@json_option
def inspect(folder: Path, follow_links: bool, as_json: bool) -> None:
    """Describe a checkpoint or a bundle."""
    from vlmdeploy.bundle import has_manifest, read_manifest

    if has_manifest(folder):
        from vlmdeploy.runtime.summary import bundle_rows

        manifest = read_manifest(folder)
        rows, content = bundle_rows(manifest), asdict(manifest)
    else:
        from vlmdeploy.model.summary import checkpoint_rows, checkpoint_summary

        content = checkpoint_summary(folder, follow_links)
        rows = checkpoint_rows(content)
    if as_json:
        print_json(content)
        return
    print_rows(str(folder), ["", ""], rows)
    if content.get("engines"):
        from vlmdeploy.runtime.summary import ENGINE_COLUMNS, engine_rows

        print_rows("engines", ENGINE_COLUMNS, engine_rows(manifest))
    if "quantization_report" in content:
        from vlmdeploy.quant.quantization_table import COVERAGE_COLUMNS, ERROR_COLUMNS, coverage_rows, error_rows

        report = content["quantization_report"]
        print_rows("calibration", COVERAGE_COLUMNS, coverage_rows(report))
        print_rows("errors, relative to the outputs", ERROR_COLUMNS, error_rows(report, each=True))

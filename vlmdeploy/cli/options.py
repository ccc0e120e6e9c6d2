"""Options that several commands share, and their types.

A command's parameters are named like the fields of its option dataclasses, which `taken` fills.
"""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from vlmdeploy.report.run import ReportOptions

Kind = TypeVar("Kind")
Command = TypeVar("Command", bound=Callable[..., Any])
PRECISION = click.Choice(["fp32", "fp16", "int8", "int4"])
TARGET = click.Choice(["ort-fp32", "ort-fp16", "ort-int8", "ort-int4", "rtx-int4", "trt-int4", "trt-fp16"])
HESSIAN = click.Choice(["routed", "pooled", "text-only"])
PROVIDER = click.Choice(["cpu", "cuda"])
RESIDENCY = click.Choice(["all", "phase"])
RULES = ("yes_no", "multiple_choice", "vqa_accuracy", "anls", "relaxed_accuracy", "ocrbench", "exact_match")
PROMPT = click.Choice(["vlmevalkit", "cogvlm", "bare"])
FOLDER = click.Path(path_type=Path)
THREADS = click.IntRange(1, 1024)


def taken(kind: type[Kind], options: dict[str, Any]) -> Kind:
    """Build a dataclass from the options named like its fields, removing them; None means the field's default."""
    given = {field.name: options.pop(field.name) for field in fields(kind) if field.name in options}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in given.items() if value is not None})


def taken_precisions(options: dict[str, Any]) -> dict[str, str]:
    """Collect --vision, --connector, --lm-head and --embedding in one dictionary, removing them."""
    parts = {part: options.pop(part) for part in ("vision", "connector", "lm_head", "embedding")}
    return {part: precision for part, precision in parts.items() if precision}


def in_order(command: Command, *options: Callable[[Command], Command]) -> Command:
    """Add these options to a command, the first on top in its help."""
    for option in reversed(options):
        command = option(command)
    return command


def json_option(command: Command) -> Command:
    """--json, the same for every command."""
    return click.option("as_json", "--json", is_flag=True, help="Print one JSON document on stdout.")(command)


def force_option(command: Command) -> Command:
    """--force, the same for every command that writes a folder."""
    return click.option("--force", is_flag=True, help="Replace an output folder that vlmdeploy made.")(command)


def follow_links_option(command: Command) -> Command:
    """--follow-links, the same for every command that takes a checkpoint."""
    text = "Read what links in a checkpoint's folder name outside it; those of Hugging Face's cache need no option."
    return click.option("--follow-links", is_flag=True, help=text)(command)


def provider_option(command: Command) -> Command:
    """--provider, the same for every command that runs a bundle."""
    text = "Run with this provider of ONNX Runtime.  [default: what the bundle was made for]"
    return click.option("--provider", type=PROVIDER, help=text)(command)


def max_megapixels_option(command: Command) -> Command:
    """--max-megapixels, the same for every command that takes it."""
    text = "Read pictures of up to this size; above 100, with memory in proportion (512 MB for 100)."
    kind = click.FloatRange(min=0, min_open=True)
    return click.option("--max-megapixels", type=kind, default=100, help=text)(command)


def kv_option(command: Command) -> Command:
    """--kv, the same for every command that chooses a cache."""
    text = "Precision of the KV cache.  [default: the target's]"
    return click.option("--kv", type=click.Choice(["fp32", "fp16", "int8"]), help=text)(command)


def threads_option(command: Command) -> Command:
    """--threads, the same for every command that runs a bundle."""
    text = "Threads of the inference engine.  [default: one per core]"
    return click.option("--threads", type=THREADS, help=text)(command)


def precision_options(parts: str, default: str) -> Callable[[Command], Command]:
    """A decorator that gives a command --vision, --connector and so on."""
    words = {"vision": "vision encoder", "connector": "connector", "lm-head": "head", "embedding": "embedding table"}
    options = [
        click.option(f"--{part}", type=PRECISION, help=f"Precision of the {words[part]}.  [default: {default}]")
        for part in parts.split()
    ]
    return lambda command: in_order(command, *options)


def question_options(command: Command) -> Command:
    """How to ask and score questions of VLMEvalKit tables and RefCOCO files."""
    from_set = "Scoring rule of a VLMEvalKit TSV.  [default: by the data set's name, else by its columns]"
    return in_order(
        command,
        click.option("--rule", type=click.Choice(RULES), help=from_set),
        click.option("--split", help="Only the rows of this split.  [default: all]"),
        click.option(
            "--prompt", type=PROMPT, default="vlmevalkit", help="Wording of a TSV's questions; see docs/evaluation.md."
        ),
        click.option("--first-picture", is_flag=True, help="Show only the first of a question's pictures."),
        click.option("--images", type=FOLDER, help="The folder of pictures named by path.  [default: beside the data]"),
        click.option("--grounding-prompt", help="The question for a RefCOCO phrase, which replaces <expr>."),
    )


def asking_options(command: Command) -> Command:
    """Options of `report` and `sweep`: what to ask, and how to measure."""
    return in_order(
        command,
        question_options,
        click.option("--per-task", type=click.IntRange(min=1), help="Ask at most this many questions of each task."),
        click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed for drawing the questions."),
        click.option("--template", help="The prompt template for rows that name none.  [default: the model's]"),
        click.option("--tokenizer", type=FOLDER, help="The checkpoint's tokenizer.  [default: the one in its folder]"),
        follow_links_option,
        click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, help="Most tokens of an answer."),
        click.option("--new-tokens", type=click.IntRange(min=1), default=32, help="Tokens per measured answer."),
        click.option("--repeat", "repeats", type=click.IntRange(min=1), default=5, help="Answers to measure."),
        click.option(
            "--residency", type=RESIDENCY, default="all", help="Residency of the measured bundles; see `run`."
        ),
    )


def picture_file(image: str | None) -> Path | None:
    """The file that --image names, if it does not hold the picture itself."""
    from vlmdeploy.runtime.image import is_url

    return None if image is None or is_url(image) else Path(image)


def report_options(given: dict[str, Any]) -> "ReportOptions":
    """The options of `report` and `sweep` as one object."""
    from vlmdeploy.data.questions import QuestionOptions
    from vlmdeploy.report.evaluator import Measured
    from vlmdeploy.report.opened_models import OpenOptions
    from vlmdeploy.report.run import ReportOptions

    questions, asked, measured = taken(QuestionOptions, given), taken(OpenOptions, given), taken(Measured, given)
    return ReportOptions(questions=questions, asked=asked, measured=measured, **given)


def calibration_options(command: Command) -> Command:
    """Options that `quantize` and `export` share."""
    quality = (
        "high: a second stream of float activations corrects for layers quantized before; best: a backward pass, too, "
        "tells which tokens matter. What it takes: docs/quantization.md."
    )
    return in_order(
        command,
        click.option("--calib-prompt", help="The question for each picture if --calib is a folder of pictures."),
        click.option("--samples", type=click.IntRange(min=1), default=512, help="At most this many samples."),
        click.option(
            "--tokens", type=click.IntRange(min=1), help="Tokens wanted per expert.  [default: 4 x its widest input]"
        ),
        click.option("--skip-broken", is_flag=True, help="Leave out and count samples that cannot be used."),
        click.option("--quality", type=click.Choice(["default", "high", "best"]), default="default", help=quality),
    )


def routed_option(command: Command) -> Command:
    """`--routed-plugin`, of `export` and `build`."""
    text = "One decoder engine that routes its rows, for batches; auto: one engine per expert. See docs/plugin.md."
    kind = click.Choice(["on", "off", "auto"])
    return click.option("--routed-plugin", type=kind, default="auto", show_default=True, help=text)(command)


def build_options(command: Command) -> Command:
    """Options that `export` and `build` share: how to compile engines."""
    capability = 'Compute capability of an engine, "8.6"; none: a portable RTX plan.'
    device = "The device that will run the engines, such as rtx-4060-ti-16 or agx-orin-64."
    return in_order(
        command,
        click.option("--sm", "capabilities", multiple=True, help=capability),
        click.option("--device", "device_name", help=device),
        click.option("--chunk-rows", type=click.IntRange(min=1), default=512, help="Most prompt rows per call."),
        click.option("--max-memory", help="Memory for building an engine, such as 12GB.  [default: what is free]"),
    )

"""Commands that judge models and bundles: validate, report, verify, diff, bench."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from vlmdeploy.cli.console import print_headline, print_json, print_rows, progress_bar
from vlmdeploy.cli.group import main
from vlmdeploy.cli.options import (
    FOLDER,
    RESIDENCY,
    asking_options,
    follow_links_option,
    force_option,
    json_option,
    picture_file,
    provider_option,
    question_options,
    report_options,
    taken,
    threads_option,
)


@main.command()
@click.option("--ckpt", type=FOLDER, help="A checkpoint, run in PyTorch.")
@click.option("--bundle", type=FOLDER, help="A bundle, run in its runtime.")
@click.option("--from-predictions", type=FOLDER, help="Score this file of answers; run no model.")
@click.option("--data", type=FOLDER, required=True, help="JSONL, folder with data.jsonl, VLMEvalKit TSV, or RefCOCO.")
@click.option("--per-task", type=click.IntRange(min=1), help="At most this many questions of each task.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed that picks the questions of --per-task.")
@click.option("--compare", type=FOLDER, multiple=True, help="Another checkpoint or bundle: count equal answers.")
@question_options
@click.option("--predictions", type=FOLDER, help="Also write the answers here: .tsv, .xlsx or .jsonl.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, help="Most tokens of an answer.")
@click.option("--template", help="The prompt template for rows that name none.  [default: the model's]")
@click.option("--tokenizer", type=FOLDER, help="tokenizer.json, tokenizer.model, or a folder.  [default: --ckpt]")
@follow_links_option
@provider_option
@threads_option
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where checkpoints run. cuda: in 16 bits, quantized decoder linears as int4 codes.",
)
@click.option("--force", is_flag=True, help="Replace an existing file of answers.")
@json_option
def validate(
    ckpt: Path | None,
    bundle: Path | None,
    from_predictions: Path | None,
    compare: tuple[Path, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Score a checkpoint, a bundle or a file of answers on a data set, with 95 % intervals."""
    from vlmdeploy.data.questions import QuestionOptions
    from vlmdeploy.score.scorecard import ScoreOptions, score_models

    given = tuple(model for model in (ckpt, bundle, from_predictions) if model is not None)
    if len(given) != 1:
        raise click.UsageError("give one of --ckpt and --bundle, or --from-predictions")
    if options["device"] != "cpu" and ckpt is None:
        raise click.UsageError("--device is for --ckpt; a bundle runs where its --provider says")
    chosen = ScoreOptions(questions=taken(QuestionOptions, options), **options)
    with progress_bar() as progress:
        card = score_models((*given, *compare), chosen, progress)
    if as_json:
        print_json(card.as_json())
    else:
        print_rows(card.source, card.columns(), card.rows())


@main.command()
@click.argument("bundles", type=FOLDER, nargs=-1, required=True)
@click.option("--data", type=FOLDER, required=True, help="The questions: JSONL, VLMEvalKit TSV or RefCOCO.")
@click.option("--ref", type=FOLDER, help="The float checkpoint to compare with.  [default: the first bundle]")
@click.option("--out", type=FOLDER, required=True, help="The folder to write: report.html, JSON, CSV, PNG, Markdown.")
@click.option("--title", help="Title of the page.")
@asking_options
@provider_option
@threads_option
@force_option
@json_option
def report(out: Path, as_json: bool, **options: Any) -> None:
    """What compression cost and what it bought: bundles beside each other, as a page, tables and plots."""
    from vlmdeploy.calib.request import use_threads
    from vlmdeploy.report.overview import terminal_table
    from vlmdeploy.report.run import make_report

    use_threads(options["threads"])
    with progress_bar() as progress:
        made = make_report(report_options({"out": out, **options}), progress)
    if as_json:
        print_json({"report": str(out), **asdict(made)})
    else:
        print_rows(f"{out / 'report.html'}: {made.title}", *terminal_table(made))


@main.command()
@click.argument("bundle", type=FOLDER)
@click.option("--ckpt", type=FOLDER, help="Compare every stage with this checkpoint in PyTorch.")
@follow_links_option
@provider_option
@threads_option
@json_option
def verify(
    bundle: Path, ckpt: Path | None, follow_links: bool, provider: str | None, threads: int | None, as_json: bool
) -> None:
    """Check a bundle on this machine: every hash, then every stage against --ckpt, or else the recorded run."""
    if ckpt is None:
        from vlmdeploy.runtime.replay import replay

        verdicts = replay(bundle, threads, provider)
    else:
        from vlmdeploy.export.gate.verify import verify_bundle

        with progress_bar() as progress:
            verdicts = verify_bundle(bundle, ckpt, threads, progress, follow_links)
    if as_json:
        print_json({"passed": True, "stages": [asdict(verdict) for verdict in verdicts]})
        return
    columns = ["stage", "check", "error", "allowed", "largest at"]
    rows = [[v.stage, v.check, f"{v.max_error:.2e}", f"{v.tolerance:.0e}", v.tensor] for v in verdicts]
    print_rows(f"{bundle}: agrees in all {len(rows)} comparisons", columns, rows)


@main.command()
@click.argument("a", type=FOLDER)
@click.argument("b", type=FOLDER)
@follow_links_option
@click.option("--image", help="A picture: a path or a data URL.  [default: a drawn one, or none beside --prompt]")
@click.option("--prompt", "text", help="A question.  [default: drawn ids]")
@click.option("--isolate", is_flag=True, help="Also feed each stage of B with A's values: finds the stages at fault.")
@click.option("--tolerance", type=float, help="Relative error that passes.  [default: the gate's for these precisions]")
@click.option("--plot", type=FOLDER, help="Draw the errors of all stages into this file (png, svg, pdf).")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of the drawn picture and ids.")
@click.option("--fail", is_flag=True, help="Exit with status 1 if a stage is beyond the tolerance.")
@threads_option
@json_option
def diff(a: Path, b: Path, plot: Path | None, fail: bool, as_json: bool, **options: Any) -> None:
    """Compare two models, checkpoints or bundles, stage by stage on the same input: where does B leave A?"""
    from vlmdeploy.artifact import check_not_read
    from vlmdeploy.diff.plot import check_plot, write_plot
    from vlmdeploy.diff.side_by_side import DiffOptions, diff_models

    if plot is not None:
        check_plot(plot)
        check_not_read(plot, (a, b, picture_file(options["image"])))
    with progress_bar() as progress:
        found = diff_models(a, b, DiffOptions(**options), progress)
    if plot is not None:
        write_plot(found, plot)
    if as_json:
        print_json(found.as_json())
    else:
        print_rows(f"A: {a}, B: {b}", found.columns(), found.rows())
        for line in found.verdict():
            print_headline(line)
    if fail and not found.agrees:
        raise click.exceptions.Exit(1)


@main.command()
@click.argument("bundle", type=FOLDER)
@click.option("--image", help="A picture: a path or a data URL.  [default: a random one]")
@click.option("--text-only", is_flag=True, help="Ask without a picture.")
@click.option("--prompt", help="The question.  [default: a fixed one; random ids where there is no tokenizer]")
@click.option("--template", help="The prompt template.  [default: the bundle's]")
@click.option("--new-tokens", type=click.IntRange(min=1), default=64, help="Tokens to decode per answer.")
@click.option("--repeat", "repeats", type=click.IntRange(min=1), default=5, help="Answers to time.")
@click.option("--warmup", type=click.IntRange(min=0), default=1, help="Untimed answers before those.")
@click.option("--residency", type=RESIDENCY, default="all", help="phase: free what only the prompt needed.")
@provider_option
@threads_option
@json_option
def bench(bundle: Path, as_json: bool, **options: Any) -> None:
    """Measure a bundle on this machine: time to first token, decode rate, memory, energy."""
    from vlmdeploy.bench.measure import measure_in_process
    from vlmdeploy.bench.measurement import MeasureOptions
    from vlmdeploy.bench.table import COLUMNS, measurement_rows, measurement_titles

    if options["text_only"] and options["image"] is not None:
        raise click.UsageError("--text-only and --image exclude each other: give one of them")
    found = measure_in_process(bundle, MeasureOptions(**options))
    if as_json:
        print_json(asdict(found))
    else:
        subject, engine = measurement_titles(found)
        print_headline(subject)
        print_rows(engine, COLUMNS, measurement_rows(found))

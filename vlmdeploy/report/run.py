"""`vlmdeploy report`: asks every model the same questions, measures each in its own process, and compares them with the
first one. Partial results are stored in OUT.partial until the report is complete."""

import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import vlmdeploy
from vlmdeploy.artifact import (
    DISCARDED,
    LOCK,
    check_not_read,
    check_output,
    is_aside,
    locked,
    partial_folder,
    remove_partial,
    staged_folder,
)
from vlmdeploy.bench.machine import machine
from vlmdeploy.bundle import has_manifest
from vlmdeploy.data.questions import QuestionOptions
from vlmdeploy.data.samples import Sample, choose
from vlmdeploy.data.source import DataSource, open_source
from vlmdeploy.errors import ConfigError, DataError, ExportError
from vlmdeploy.progress import Progress, no_progress
from vlmdeploy.report.collect import frontier, layer_errors, model_result, questions_by_task
from vlmdeploy.report.document import JSON_NAME, DataUsed, Failure, Report
from vlmdeploy.report.evaluation import Store
from vlmdeploy.report.evaluator import ALL, DISTRIBUTIONS, MARK, PICTURED, TEXTS, Asked, Evaluator, Measured, Reference
from vlmdeploy.report.files import write_report
from vlmdeploy.report.opened_models import OpenOptions, check_same_model, identity_of, subject_of
from vlmdeploy.report.pictures import PictureFolder
from vlmdeploy.score.metrics import check_scorable

EVALUATIONS = "evaluations"
PACKAGES = ("numpy", "onnxruntime", "torch", "tokenizers", "pillow", "matplotlib", "jinja2")


@dataclass(frozen=True)
class ReportOptions:
    """Options of a report. ref: the reference checkpoint; None: the first bundle is the reference.

    per_task: limit of questions per task. agreement_questions, text_questions: how many questions with and without
    pictures to compare token distributions on.
    """

    bundles: tuple[Path, ...]
    data: Path
    out: Path
    ref: Path | None = None
    per_task: int | None = None
    seed: int = 0
    questions: QuestionOptions | None = None
    asked: OpenOptions = field(default_factory=OpenOptions)
    agreement_questions: int = 200
    text_questions: int = 50
    measured: Measured = field(default_factory=Measured)
    title: str | None = None
    force: bool = False


def make_report(
    options: ReportOptions,
    progress: Progress = no_progress,
    failures: tuple[Failure, ...] = (),
    store: Store | None = None,
) -> Report:
    """Make the report at options.out. failures: models that could not be made. store: keeps evaluations beyond this
    report.

    Raises DataError for bad questions, ConfigError unless all are versions of one model, and what opening them raises.
    After an error nothing is left at options.out, and finished evaluations are kept for the next try.
    """
    check_output(options.out, options.force, is_report)
    models = ((options.ref,) if options.ref is not None else ()) + options.bundles
    names = model_names(models)
    source, samples = _questions(options)
    check_not_read(options.out, (*models, *_read_to_ask(options, source, samples)))
    _check_models(models, options)
    follow_links = options.asked.follow_links
    subjects = [subject_of(path, name, follow_links) for path, name in zip(models, names, strict=True)]
    partial = partial_folder(options.out)
    _check_partial(partial)
    with locked(partial), _removed_if_empty(partial):
        kept = store or Store(partial / EVALUATIONS)
        asked = _asked(samples, options)
        runner = Evaluator(asked, options.asked, options.measured, kept, partial, progress)
        evaluations = runner.evaluate(models, subjects)
        with staged_folder(options.out, options.force, is_report) as folder:
            pictures, reference = PictureFolder(folder), next(evaluations)
            results = (
                model_result(subjects[0], samples, reference, None, pictures, follow_links),
                *(
                    model_result(subject, samples, evaluation, reference, pictures)
                    for subject, evaluation in zip(subjects[1:], evaluations, strict=True)
                ),
            )
            report = Report(
                title=options.title or f"{subjects[0].family}: what compression cost",
                created=datetime.now(UTC).astimezone().isoformat(timespec="seconds"),
                command=shlex.join(["vlmdeploy", *sys.argv[1:]]),
                versions=_versions(),
                host=_host(),
                data=_data_used(source, asked, options),
                reference=names[0],
                models=results,
                frontier=frontier(results),
                failures=failures,
            )
            write_report(report, folder)
        remove_partial(partial, MARK)
    return report


@contextmanager
def _removed_if_empty(partial: Path) -> Iterator[None]:
    """After an error, remove OUT.partial if it holds no results."""
    try:
        yield
    except BaseException:
        if all(path.name == LOCK for path in partial.iterdir()):
            remove_partial(partial, MARK)
        raise


def prepare_reference(options: ReportOptions, folder: Path, progress: Progress = no_progress) -> str:
    """Evaluate a sweep's reference and store its distributions in `folder`; returns the key for `evaluate_one`."""
    assert options.ref is not None, "a sweep compares with its checkpoint"
    runner = _runner_in(folder, options, progress)
    subject = subject_of(options.ref, options.ref.name, options.asked.follow_links)
    return runner.reference(options.ref, subject).key


def evaluate_one(options: ReportOptions, bundle: Path, folder: Path, reference_key: str) -> None:
    """Evaluate one bundle of a sweep and store the result in `folder`, where the reference was prepared."""
    assert options.ref is not None, "a sweep compares with its checkpoint"
    runner = _runner_in(folder, options, no_progress)
    reference = Reference(runner, options.ref, reference_key)
    reference.prepare()
    runner.evaluation(bundle, subject_of(bundle, bundle.name), reference)


def _runner_in(folder: Path, options: ReportOptions, progress: Progress) -> Evaluator:
    _, samples = _questions(options)
    store = Store(folder / EVALUATIONS)
    return Evaluator(_asked(samples, options), options.asked, options.measured, store, folder, progress)


def is_report(folder: Path) -> bool:
    """Whether vlmdeploy wrote this folder as a report."""
    path = folder / JSON_NAME
    return path.is_file() and (folder / "report.html").is_file()


def _check_partial(partial: Path) -> None:
    """Raise ExportError if the folder holds other files: the last step deletes it."""
    for path in partial.iterdir() if partial.is_dir() else ():
        is_ours = path.name in (EVALUATIONS, TEXTS, LOCK, DISCARDED) or path.name.startswith(DISTRIBUTIONS)
        if not (is_ours or is_aside(path)):
            raise ExportError(f"{partial}: holds {path.name}, which is not from a report; choose another --out")


def model_names(models: Sequence[Path]) -> list[str]:
    """A short name of each: the shortest path suffixes that differ. Raises ConfigError if one is given twice."""
    absolute, resolved = [model.absolute() for model in models], [model.resolve() for model in models]
    for place, path in enumerate(resolved):
        if path in resolved[:place]:
            raise ConfigError(f"{models[place]}: is given twice")
    for depth in range(1, max(len(path.parts) for path in absolute) + 1):
        names = [str(Path(*path.parts[-depth:])) for path in absolute]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("different paths differ somewhere")


def _questions(options: ReportOptions) -> tuple[DataSource, list[Sample]]:
    source = open_source(options.data, options=options.questions, to_score=True)
    unscored = None if source.questions is None else source.questions.unscored
    if unscored is not None:
        raise DataError(f"{source.path}: {unscored}: a report needs answers to score")
    samples = choose(source.samples(), options.per_task, options.seed)
    if not samples:
        raise DataError(f"{source.path}: holds no questions")
    check_scorable(samples, source.path)
    return source, samples


def _read_to_ask(options: ReportOptions, source: DataSource, samples: list[Sample]) -> list[Path | None]:
    """The files and folders that the questions come from."""
    pictures = [sample.image for sample in samples if isinstance(sample.image, Path)]
    images = None if options.questions is None else options.questions.images
    return [source.path, images, options.asked.tokenizer, *pictures]


def _check_models(models: Sequence[Path], options: ReportOptions) -> None:
    for path in options.bundles:
        if not path.is_dir():
            raise ConfigError(f"{path}: no such folder, expected a bundle")
        if not has_manifest(path):
            raise ConfigError(
                f"{path}: is not a bundle, expected one made by `vlmdeploy export`; --ref takes a checkpoint"
            )
    if options.ref is not None and has_manifest(options.ref):
        raise ConfigError(
            f"--ref {options.ref}: is a bundle, expected a checkpoint; without --ref the first bundle is the reference"
        )
    for path in models:
        layer_errors(path, options.asked.follow_links)  # report a damaged one before asking all questions, not after
    first = identity_of(models[0], options.asked)
    for path in models[1:]:
        check_same_model(models[0], first, path, identity_of(path, options.asked))


def _asked(samples: list[Sample], options: ReportOptions) -> Asked:
    pictured = [sample for sample in samples if sample.image is not None]
    texts = [sample for sample in samples if sample.image is None]
    source = "questions without a picture"
    if not texts:
        source = "questions whose pictures were left out"
        spread = _spread(pictured, options.text_questions)
        texts = [replace(sample, image=None, boxes=(), answer=None, answers=()) for sample in spread]
    compared = {
        PICTURED: _spread(pictured, options.agreement_questions),
        TEXTS: _spread(texts, options.text_questions),
    }
    words = {PICTURED: "questions with pictures", TEXTS: source}
    found = {name: each for name, each in compared.items() if each}
    return Asked(samples, found, {name: f"{words[name]}; {_answers_from(each)}" for name, each in found.items()})


def _answers_from(samples: list[Sample]) -> str:
    given = sum(bool(sample.references) for sample in samples)
    if given == len(samples):
        return "answers as the data gives them"
    return "answers as the reference gives them" if given == 0 else "answers of the data, or else of the reference"


def _spread(samples: list[Sample], count: int) -> list[Sample]:
    """At most `count` samples, evenly spread over the list."""
    step = max(1.0, len(samples) / max(1, count))
    return [samples[int(place * step)] for place in range(min(count, len(samples)))]


def _data_used(source: DataSource, asked: Asked, options: ReportOptions) -> DataUsed:
    pictures = {sample.image for sample in asked.samples if sample.image is not None}
    here = f"{Path.cwd()}/"  # show paths below it as relative
    return DataUsed(
        str(source.path).removeprefix(here), source.description.replace(here, ""), asked.hashes[ALL],
        questions_by_task(asked.samples), len(pictures), options.seed, options.asked.template,
    )  # fmt: skip


def _versions() -> dict[str, str]:
    found = {"vlmdeploy": vlmdeploy.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _host() -> dict[str, str]:
    here = machine(None)
    return {
        "processor": here.cpu, "cores": str(here.logical_cores), "memory": f"{here.memory_bytes / 1e9:.1f} GB",
        "system": here.kernel, **({"board": here.board} if here.board else {}),
    }  # fmt: skip

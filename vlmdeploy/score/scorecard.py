"""What `vlmdeploy validate` shows: the scores of one model, and how others differ on the same questions."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import vlmdeploy
from vlmdeploy.artifact import check_not_read
from vlmdeploy.bundle import has_manifest
from vlmdeploy.data.jsonl import ROWS_NAME
from vlmdeploy.data.questions import QuestionOptions
from vlmdeploy.data.samples import Sample, choose
from vlmdeploy.data.source import DataSource, open_source
from vlmdeploy.errors import BackendError, DataError
from vlmdeploy.progress import Progress
from vlmdeploy.score.answerers import (
    MAX_NEW_TOKENS,
    Answerer,
    BundleAnswerer,
    Validation,
    agreement,
    answer_all,
    validate,
)
from vlmdeploy.score.metrics import Score, Scores, as_json, check_scorable, paired_differences
from vlmdeploy.score.predictions import (
    PredictionsAnswerer,
    check_output,
    is_predictions,
    output_paths,
    write_predictions,
)

if TYPE_CHECKING:
    from vlmdeploy.model.vlm import VisionLanguageModel


@dataclass(frozen=True)
class ScoreOptions:
    """Which rows of `data` to ask: at most `per_task` of each task (None: all), drawn with `seed`.

    predictions: the file to write answers to; None: none.
    """

    data: Path
    per_task: int | None = None
    seed: int = 0
    template: str | None = None
    tokenizer: Path | None = None
    threads: int | None = None
    provider: str | None = None  # of bundles; None: each bundle's own
    device: str = "cpu"  # of checkpoints
    questions: QuestionOptions | None = None
    max_new_tokens: int = MAX_NEW_TOKENS
    predictions: Path | None = None
    force: bool = False
    follow_links: bool = False  # of checkpoints


@dataclass(frozen=True)
class Scorecard:
    """The scores of models on the same questions; the others are compared with the first.

    source: the format and scoring rule of the data. written: one answer file per model.
    """

    data: str
    models: tuple[str, ...]
    validations: tuple[Validation, ...]
    source: str = ""
    written: tuple[str, ...] = ()

    def equal_answers(self) -> tuple[Score, ...]:
        """For each other model, the share of questions with the same token ids as the first."""
        return tuple(agreement(self.validations[0], other) for other in self.validations[1:])

    def differences(self) -> tuple[Scores, ...]:
        """For each other model, its paired differences from the first."""
        first = self.validations[0].predictions
        return tuple(paired_differences(first, other.predictions) for other in self.validations[1:])

    def as_json(self) -> dict[str, Any]:
        """The document that `validate --json` prints."""
        document: dict[str, Any] = {"model": self.models[0], "data": self.data, "source": self.source}
        document |= as_json(self.validations[0].scores)
        if self.written:
            document["predictions"] = list(self.written)
        others = zip(self.models[1:], self.validations[1:], self.equal_answers(), self.differences(), strict=True)
        compared = [
            {
                "model": name,
                **as_json(validation.scores),
                "equal_answers": asdict(equal),
                "differences": as_json(difference)["tasks"],
            }
            for name, validation, equal, difference in others
        ]
        return {**document, "compared": compared} if compared else document

    def rows(self) -> list[list[str]]:
        """One row per metric: its name, the count, and each model's value with its interval."""
        rows = []
        for task, metrics in self.validations[0].scores.items():
            for name, score in metrics.items():
                values = [_interval(validation.scores[task][name]) for validation in self.validations]
                rows.append([f"{task} {name}", str(score.count), *values])
        rows += self._difference_rows()
        if equal := self.equal_answers():
            rows.append(["equal answers", str(equal[0].count), "", *map(_interval, equal)])
        if self.written:
            rows.append(["answers written to", str(len(self.validations[0].predictions)), *self.written])
        return rows

    def _difference_rows(self) -> list[list[str]]:
        rows, differences = [], self.differences()
        for task, metrics in differences[0].items() if differences else ():
            for name, score in metrics.items():
                found = [_points(difference[task][name]) for difference in differences]
                rows.append([f"{task} {name}, paired difference", str(score.count), "", *found])
        return rows

    def columns(self) -> list[str]:
        """Column titles."""
        return ["task metric", "questions", *self.models]


def _interval(score: Score) -> str:
    return f"{100 * score.value:.2f} % ({100 * score.low:.2f} to {100 * score.high:.2f})"


def _points(score: Score) -> str:
    return f"{100 * score.value:+.2f} points ({100 * score.low:+.2f} to {100 * score.high:+.2f})"


def score_models(models: tuple[Path, ...], options: ScoreOptions, progress: Progress) -> Scorecard:
    """Ask models (checkpoints, bundles or answer files) the same questions.

    Raises DataError, also if the questions cannot be scored and no answers are to be written, ExportError if answers
    cannot be written, and what opening the models raises.
    """
    outputs = [] if options.predictions is None else output_paths(options.predictions, models)
    for path in outputs:
        check_output(path, options.force)
    source = open_source(options.data, options=options.questions, to_score=True)
    samples = choose(source.samples(), options.per_task, options.seed)
    for path in outputs:
        check_not_read(path, (*models, *_read_to_ask(options, source, samples)))
    unscored = None if source.questions is None else source.questions.unscored
    if unscored is not None and not outputs:
        raise DataError(f"{source.path}: {unscored}: --predictions FILE writes the answers without scoring them")
    if unscored is None:
        check_scorable(samples, source.path)  # before a model is loaded, which may take minutes
    validations = []
    for place, model in enumerate(models):
        report = _reporter(progress, str(model), len(samples))
        answerer = open_answerer(model, options)
        validations.append(_ask(answerer, samples, report, is_scored=unscored is None))
        if isinstance(answerer, BundleAnswerer):
            answerer.close()  # the next model may need the memory
        if outputs:
            write_predictions(outputs[place], source, validations[-1].predictions)
    names, written = tuple(map(str, models)), tuple(map(str, outputs))
    return Scorecard(str(source.path), names, tuple(validations), source.description, written)


def _read_to_ask(options: ScoreOptions, source: DataSource, samples: list[Sample]) -> list[Path | None]:
    """The files that the questions come from; a folder of data also holds other things."""
    data = source.path / ROWS_NAME if source.path.is_dir() else source.path
    return [data, options.tokenizer, *(sample.image for sample in samples if isinstance(sample.image, Path))]


def _ask(answerer: Answerer, samples: list[Sample], report: Callable[[int], None], is_scored: bool) -> Validation:
    return validate(answerer, samples, report) if is_scored else Validation({}, answer_all(answerer, samples, report))


def _reporter(progress: Progress, stage: str, total: int) -> Callable[[int], None]:
    return lambda done: progress(stage, done, total)


def open_answerer(model: Path, options: ScoreOptions) -> Answerer:
    """Open a bundle in the runtime, a checkpoint in PyTorch, or an answer file, depending on the path."""
    if is_predictions(model):
        return PredictionsAnswerer(model)
    if has_manifest(model):
        session = vlmdeploy.open(model, provider=options.provider, threads=options.threads)
        return BundleAnswerer(session, options.max_new_tokens, options.template)
    from vlmdeploy.model.tokenizer import checkpoint_tokenizer, import_tokenizer
    from vlmdeploy.runtime.chat import Tokenizer
    from vlmdeploy.score.torch_answerer import TorchAnswerer

    tokenizer = Tokenizer(import_tokenizer(checkpoint_tokenizer(model, options.tokenizer, options.follow_links)))
    checkpoint = load_on(model, options.device, options.follow_links)
    return TorchAnswerer(checkpoint, tokenizer, max_new_tokens=options.max_new_tokens, template=options.template)


def load_on(checkpoint: Path, device: str, follow_links: bool = False) -> "VisionLanguageModel":
    """Load a checkpoint in PyTorch: float32 on a CPU; on a CUDA device the checkpoint's 16-bit type (default float16),
    with quantized decoder linears as codes. Raises BackendError without such a device."""
    if device == "cpu":
        return vlmdeploy.load_model(checkpoint, follow_links=follow_links)
    import torch

    from vlmdeploy.model.checkpoint import Checkpoint

    if not torch.cuda.is_available():
        raise BackendError(f"--device {device}: PyTorch finds no CUDA device")
    opened = Checkpoint(checkpoint, follow_links)
    named = opened.config.get("torch_dtype")
    dtype = named if named in ("float16", "bfloat16") else "float16"
    quantized: Literal["dequantize", "kernel"] = "kernel" if opened.is_quantized else "dequantize"
    return vlmdeploy.load_model(checkpoint, dtype, device, quantized, follow_links=follow_links)

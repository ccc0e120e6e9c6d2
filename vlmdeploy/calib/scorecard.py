"""What `vlmdeploy validate` shows: the scores of one model, and how another one that was asked the same differs."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import vlmdeploy
from vlmdeploy.calib.scoring import Score, as_json
from vlmdeploy.calib.validate import Answerer, BundleAnswerer, Validation, agreement, validate
from vlmdeploy.data.jsonl import find_rows, read_samples
from vlmdeploy.data.samples import choose
from vlmdeploy.errors import ConfigError

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ScoreOptions:
    """What is asked: rows of `data`, at most `per_task` of each task (None: all), drawn with `seed`."""

    data: Path
    per_task: int | None = None
    seed: int = 0
    template: str | None = None
    tokenizer: Path | None = None
    threads: int | None = None


@dataclass(frozen=True)
class Scorecard:
    """One model's scores; with a second one asked the same questions, its scores and the share of equal answers."""

    model: str
    data: str
    validation: Validation
    other_model: str | None = None
    other: Validation | None = None

    def equal_answers(self) -> Score | None:
        """Share of questions that both answered with the same token ids."""
        return None if self.other is None else agreement(self.validation, self.other)

    def as_json(self) -> dict[str, Any]:
        """The document that `validate --json` prints."""
        document: dict[str, Any] = {"model": self.model, "data": self.data, **as_json(self.validation.scores)}
        if self.other is not None:
            equal = self.equal_answers()
            assert equal is not None, "there is another validation to compare with"
            compared = {"model": self.other_model, **as_json(self.other.scores), "equal_answers": asdict(equal)}
            document["compared"] = compared
        return document

    def rows(self) -> list[list[str]]:
        """A line per metric: its name, the value with its interval, the count, and the other model's value."""
        rows = []
        for task, metrics in self.validation.scores.items():
            for name, score in metrics.items():
                beside = [] if self.other is None else [_interval(self.other.scores[task][name])]
                rows.append([f"{task} {name}", _interval(score), str(score.count), *beside])
        equal = self.equal_answers()
        return rows if equal is None else [*rows, ["equal answers", _interval(equal), str(equal.count), ""]]

    def columns(self) -> list[str]:
        """Titles of the rows' cells."""
        return ["task metric", self.model, "questions", *([] if self.other_model is None else [self.other_model])]


def _interval(score: Score) -> str:
    return f"{100 * score.value:.2f} % ({100 * score.low:.2f} to {100 * score.high:.2f})"


def score_models(models: tuple[Path, ...], options: ScoreOptions, progress: Progress) -> Scorecard:
    """Ask one or two models (checkpoints or bundles) the same questions. Raises DataError and what opening raises."""
    rows = find_rows(options.data)
    samples = list(read_samples(options.data))
    if options.per_task is not None:
        samples = choose(samples, options.per_task, options.seed)
    validations = []
    for model in models:
        report = _reporter(progress, str(model), len(samples))
        validations.append(validate(open_answerer(model, options), samples, report))
    second = (str(models[1]), validations[1]) if len(models) > 1 else (None, None)
    return Scorecard(str(models[0]), str(rows), validations[0], *second)


def _reporter(progress: Progress, stage: str, total: int) -> Callable[[int], None]:
    return lambda done: progress(stage, done, total)


def open_answerer(model: Path, options: ScoreOptions) -> Answerer:
    """A bundle's runtime, or a checkpoint in PyTorch; which one, its files tell."""
    if (model / "manifest.json").is_file():
        return BundleAnswerer(vlmdeploy.open(model, threads=options.threads), template=options.template)
    from vlmdeploy.calib.torch_answerer import TorchAnswerer
    from vlmdeploy.export.tokenizer import find_tokenizer, import_tokenizer
    from vlmdeploy.runtime.chat import Tokenizer

    source = find_tokenizer(options.tokenizer or model)
    if source is None:
        raise ConfigError(f"{model}: holds no tokenizer.json and no tokenizer.model: give --tokenizer FILE")
    tokenizer = Tokenizer(import_tokenizer(source))
    return TorchAnswerer(vlmdeploy.load_model(model), tokenizer, template=options.template)

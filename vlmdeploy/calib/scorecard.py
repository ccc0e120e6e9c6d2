"""What `vlmdeploy validate` shows: the scores of one model, and how others that were asked the same differ."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import vlmdeploy
from vlmdeploy.bundle import MANIFEST_NAME
from vlmdeploy.calib.scoring import Score, Scores, as_json, paired_differences
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
    provider: str | None = None  # of bundles; None: what each was made for


@dataclass(frozen=True)
class Scorecard:
    """The scores of models that were asked the same questions; the others are compared with the first."""

    data: str
    models: tuple[str, ...]
    validations: tuple[Validation, ...]

    def equal_answers(self) -> tuple[Score, ...]:
        """For each other model, the share of questions that it answered with the first one's token ids."""
        return tuple(agreement(self.validations[0], other) for other in self.validations[1:])

    def differences(self) -> tuple[Scores, ...]:
        """For each other model, how much better than the first it is, with intervals of the paired difference."""
        first = self.validations[0].predictions
        return tuple(paired_differences(first, other.predictions) for other in self.validations[1:])

    def as_json(self) -> dict[str, Any]:
        """The document that `validate --json` prints."""
        document: dict[str, Any] = {"model": self.models[0], "data": self.data, **as_json(self.validations[0].scores)}
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
        """A line per metric: its name, the count, and each model's value with its interval."""
        rows = []
        for task, metrics in self.validations[0].scores.items():
            for name, score in metrics.items():
                values = [_interval(validation.scores[task][name]) for validation in self.validations]
                rows.append([f"{task} {name}", str(score.count), *values])
        rows += self._difference_rows()
        if equal := self.equal_answers():
            rows.append(["equal answers", str(equal[0].count), "", *map(_interval, equal)])
        return rows

    def _difference_rows(self) -> list[list[str]]:
        rows, differences = [], self.differences()
        for task, metrics in differences[0].items() if differences else ():
            for name, score in metrics.items():
                found = [_points(difference[task][name]) for difference in differences]
                rows.append([f"{task} {name}, paired difference", str(score.count), "", *found])
        return rows

    def columns(self) -> list[str]:
        """Titles of the rows' cells."""
        return ["task metric", "questions", *self.models]


def _interval(score: Score) -> str:
    return f"{100 * score.value:.2f} % ({100 * score.low:.2f} to {100 * score.high:.2f})"


def _points(score: Score) -> str:
    return f"{100 * score.value:+.2f} points ({100 * score.low:+.2f} to {100 * score.high:+.2f})"


def score_models(models: tuple[Path, ...], options: ScoreOptions, progress: Progress) -> Scorecard:
    """Ask models (checkpoints or bundles) the same questions. Raises DataError and what opening them raises."""
    rows = find_rows(options.data)
    samples = list(read_samples(options.data))
    if options.per_task is not None:
        samples = choose(samples, options.per_task, options.seed)
    validations = []
    for model in models:
        report = _reporter(progress, str(model), len(samples))
        answerer = open_answerer(model, options)
        validations.append(validate(answerer, samples, report))
        if isinstance(answerer, BundleAnswerer):
            answerer.close()  # the next one may need the memory
    return Scorecard(str(rows), tuple(map(str, models)), tuple(validations))


def _reporter(progress: Progress, stage: str, total: int) -> Callable[[int], None]:
    return lambda done: progress(stage, done, total)


def open_answerer(model: Path, options: ScoreOptions) -> Answerer:
    """A bundle's runtime, or a checkpoint in PyTorch; which one, its files tell."""
    if (model / MANIFEST_NAME).is_file():
        return BundleAnswerer(
            vlmdeploy.open(model, provider=options.provider, threads=options.threads), template=options.template
        )
    from vlmdeploy.calib.torch_answerer import TorchAnswerer
    from vlmdeploy.export.tokenizer import find_tokenizer, import_tokenizer
    from vlmdeploy.runtime.chat import Tokenizer

    source = find_tokenizer(options.tokenizer or model)
    if source is None:
        raise ConfigError(f"{model}: holds no tokenizer.json and no tokenizer.model: give --tokenizer FILE")
    tokenizer = Tokenizer(import_tokenizer(source))
    return TorchAnswerer(vlmdeploy.load_model(model), tokenizer, template=options.template)

"""Evaluates the models of a report, one at a time: answers, agreement with the reference, measurements.

Each evaluation is stored as soon as it is complete. The reference's distributions are stored beside them, since every
other model is compared with them.
"""

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import vlmdeploy
from vlmdeploy.artifact import write_file
from vlmdeploy.bench.measure import measure_in_process
from vlmdeploy.bench.measurement import Measurement, MeasureOptions
from vlmdeploy.bundle import has_manifest, hash_file, read_hashed_manifest
from vlmdeploy.data.samples import Picture, Sample
from vlmdeploy.errors import DataError
from vlmdeploy.progress import Progress
from vlmdeploy.report.distributions import GivenAnswer, ReferenceFile, agreement_of, compare, given_answers
from vlmdeploy.report.document import Agreement, ReportedModel
from vlmdeploy.report.evaluation import Evaluation, KeptAnswer, Store, key_of, samples_hash
from vlmdeploy.report.opened_models import OpenedModel, OpenOptions, open_model
from vlmdeploy.runtime.image import load_image
from vlmdeploy.score.answerers import answer_all

ALL, PICTURED, TEXTS = "all", "pictured", "texts"
DISTRIBUTIONS = "distributions."
MARK = f"{DISTRIBUTIONS}of"


@dataclass(frozen=True)
class Asked:
    """The questions. compared: those whose distributions are compared, under PICTURED and TEXTS if there are any;
    sources: a description of each."""

    samples: list[Sample]
    compared: dict[str, list[Sample]]
    sources: dict[str, str]

    @cached_property
    def hashes(self) -> dict[str, str]:
        """Hashes of the questions under ALL, PICTURED and TEXTS."""
        return {ALL: samples_hash(self.samples)} | {name: samples_hash(each) for name, each in self.compared.items()}


@dataclass(frozen=True)
class Measured:
    """How bundles are measured."""

    new_tokens: int = 32
    repeats: int = 5
    residency: str = "all"


@dataclass(frozen=True)
class Evaluator:
    """Evaluates models; `folder` holds intermediate files, `store` the results."""

    asked: Asked
    options: OpenOptions
    measured: Measured
    store: Store
    folder: Path
    progress: Progress

    def evaluate(self, models: Sequence[Path], subjects: Sequence[ReportedModel]) -> Iterator[Evaluation]:
        """Yield every model's evaluation, the reference's first, one at a time in memory; all models are evaluated
        before the first is yielded. Raises what opening and asking raise."""
        reference = Reference(self, models[0], self._key(models[0], subjects[0]))
        others = list(zip(models[1:], subjects[1:], strict=True))
        keys = [reference.key, *(self._key(path, subject, reference) for path, subject in others)]
        if not all(self._kept(key) for key in keys):
            reference.prepare()
            for path, subject in others:
                self.evaluation(path, subject, reference)
        return (self._read(key) for key in keys)

    def _kept(self, key: str) -> Evaluation | None:
        return self.store.get(key, len(self.asked.samples))

    def _read(self, key: str) -> Evaluation:
        kept = self._kept(key)
        if kept is None:
            raise DataError(f"{self.store.path(key)}: was changed while it was in use; start again")
        return kept

    def reference(self, path: Path, subject: ReportedModel) -> "Reference":
        """The reference, evaluated and its distributions written."""
        reference = Reference(self, path, self._key(path, subject))
        reference.prepare()
        return reference

    def evaluation(self, path: Path, subject: ReportedModel, reference: "Reference") -> Evaluation:
        """A model's evaluation, from the store if it is there."""
        key = self._key(path, subject, reference)
        return self._kept(key) or self.store.put(key, reference.compared(path))

    def _key(self, path: Path, subject: ReportedModel, reference: "Reference | None" = None) -> str:
        content = _content_of(path, subject, self.options)
        return key_of(model=content, reference=reference and reference.key, **self._decided_by())

    def _decided_by(self) -> dict[str, object]:
        """What an evaluation depends on besides the models."""
        options = self.options
        return {
            "samples": self.asked.hashes,
            "options": (options.template, options.threads, options.provider, options.max_new_tokens),
            "measured": (self.measured.new_tokens, self.measured.repeats, self.measured.residency),
            "vlmdeploy": vlmdeploy.__version__,
        }

    def answered(
        self, model: OpenedModel, path: Path, agreement: Agreement | None = None, text_only: Agreement | None = None
    ) -> Evaluation:
        """The model's answers and measurements."""

        def report(done: int) -> None:
            self.progress(f"{path.name}: answers", done, len(self.asked.samples))

        answers = tuple(KeptAnswer.of(each) for each in answer_all(model, self.asked.samples, report))
        self.progress(f"{path.name}: latency and memory", 0, 1)
        if has_manifest(path):
            return Evaluation(answers, agreement, text_only, self._measure(model, path), None)
        return Evaluation(answers, agreement, text_only, None, "a checkpoint in PyTorch, which is no deployment")

    def _measure(self, model: OpenedModel, path: Path) -> Measurement:
        """Measure the bundle in its own process, on a question of median length."""
        samples = self.asked.compared.get(PICTURED) or self.asked.samples
        sample = sorted(samples, key=lambda each: len(each.turns[-1].user))[len(samples) // 2]
        room = model.context_tokens - len(model.maker.question(sample).ids) - 1
        chosen = MeasureOptions(
            image=None if sample.image is None else _picture_argument(sample.image),
            text_only=sample.image is None,
            prompt=sample.turns[-1].user,
            new_tokens=max(1, min(self.measured.new_tokens, room)),
            repeats=self.measured.repeats,
            provider=self.options.provider,
            threads=self.options.threads,
            residency=self.measured.residency,
            template=sample.template or self.options.template,
        )
        return measure_in_process(path, chosen)


@dataclass(frozen=True)
class Reference:
    """The model that the others are compared with; `key` is the key of its evaluation."""

    evaluator: Evaluator
    path: Path
    key: str

    def prepare(self) -> Evaluation:
        """Evaluate it and write its distributions. Does not open the model if both are stored."""
        evaluator, asked = self.evaluator, self.evaluator.asked
        kept = evaluator.store.get(self.key, len(asked.samples))
        if kept is not None and self._is_written():
            return kept
        model = open_model(self.path, evaluator.options)
        try:
            self._mark().unlink(missing_ok=True)  # the files belong to no reference until all are rewritten
            evaluation = kept or evaluator.store.put(self.key, evaluator.answered(model, self.path))
            for name, samples in asked.compared.items():
                texts = self._texts(name, samples, model)
                evaluator.progress(f"{self.path.name}: distributions, {name}", 0, len(samples))
                self._file(name, model.vocab_size).write(model, _givens(model, samples, texts))
            write_file(self._mark(), lambda file: file.write(self.key.encode()))
        finally:
            model.close()
        return evaluation

    def _mark(self) -> Path:
        """The file that names the reference whose distributions are complete here."""
        return self.evaluator.folder / MARK

    def _is_written(self) -> bool:
        """Whether this reference's distributions and their answers are stored."""
        is_own = self._mark().is_file() and self._mark().read_text(errors="replace") == self.key
        return is_own and all(
            (self.evaluator.folder / f"{DISTRIBUTIONS}{name}").is_file()
            and (not _unanswered(samples) or self._kept_texts(name, samples) is not None)
            for name, samples in self.evaluator.asked.compared.items()
        )

    def compared(self, path: Path) -> Evaluation:
        """Evaluate another model."""
        evaluator, model, agreements = self.evaluator, open_model(path, self.evaluator.options), {}
        try:
            for name, samples in evaluator.asked.compared.items():
                evaluator.progress(f"{path.name}: distributions, {name}", 0, len(samples))
                givens = _givens(model, samples, self._texts(name, samples))
                record = compare(model, self._file(name, model.vocab_size), givens)
                agreements[name] = agreement_of(record, evaluator.asked.sources[name])
            return evaluator.answered(model, path, agreements.get(PICTURED), agreements.get(TEXTS))
        finally:
            model.close()

    def _file(self, name: str, vocab_size: int) -> ReferenceFile:
        return ReferenceFile(self.evaluator.folder / f"{DISTRIBUTIONS}{name}", vocab_size)

    def _texts(self, name: str, samples: list[Sample], model: OpenedModel | None = None) -> list[str]:
        """The answers that all models are compared on: the data's, else the reference's own, for which `model`, the
        opened reference, is needed the first time."""
        unanswered, kept = _unanswered(samples), self._kept_texts(name, samples)
        if unanswered and kept is None:
            assert model is not None, "the reference answers before others are compared with it"
            own = answer_all(model, unanswered)
            kept = Evaluation(tuple(KeptAnswer.of(each) for each in own), None, None, None, None)
            self._text_store().put(f"{name}.{self.key}", kept)
        own_texts = iter([answer.text for answer in kept.answers] if kept else [])
        return [sample.references[0] if sample.references else next(own_texts) for sample in samples]

    def _kept_texts(self, name: str, samples: list[Sample]) -> Evaluation | None:
        count = len(_unanswered(samples))
        return self._text_store().get(f"{name}.{self.key}", count) if count else None

    def _text_store(self) -> Store:
        return Store(self.evaluator.folder / TEXTS)


def _unanswered(samples: list[Sample]) -> list[Sample]:
    return [sample for sample in samples if not sample.references]


def _givens(model: OpenedModel, samples: list[Sample], texts: list[str]) -> Iterator[GivenAnswer]:
    return given_answers(samples, texts, model.maker, model.context_tokens)


def _picture_argument(picture: Picture) -> str:
    """A picture as the measuring process takes it: a path or a data URL."""
    if isinstance(picture, Path):
        return str(picture.absolute())
    content = io.BytesIO()
    load_image(picture).save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def _content_of(path: Path, subject: ReportedModel, options: OpenOptions) -> str:
    """A hash of everything that a model's answers depend on."""
    from vlmdeploy.model.tokenizer import find_tokenizer

    if has_manifest(path):
        return read_hashed_manifest(path)[1]
    source = find_tokenizer(options.tokenizer or path, options.follow_links)
    return subject.sha256 if source is None else f"{subject.sha256} {hash_file(source).sha256}"

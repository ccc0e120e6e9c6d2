"""Contract tests of `vlmdeploy report`, up to the numbers that its page shows: what is asked and compared, what is kept
for another try and what is never taken for it, and every input that is refused.

Models are tiny and random; measurements are made up, but for the one test that measures.
"""

import base64
import errno
import gc
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import normalizers

from tests.benchmark_files import picture_cell, write_tsv
from tests.calibration_data import (
    messages,
    overflow_for_pictures,
    write_calibration_checkpoint,
    write_changed_checkpoint,
    write_rows,
)
from tests.report_example import model_result as example_result
from tests.tiny_bundle import (
    byte_tokenizer,
    export,
    only_error_line,
    only_json_document,
    picture,
    run_cli,
    write_text_checkpoint,
)
from vlmdeploy.artifact import locked, partial_folder
from vlmdeploy.bench.measurement import Measurement, MeasureOptions
from vlmdeploy.cli.options import report_options
from vlmdeploy.data.samples import Sample
from vlmdeploy.data.source import open_source
from vlmdeploy.errors import BackendError, ConfigError, ExportError
from vlmdeploy.report import evaluator, opened_models, run
from vlmdeploy.report.collect import frontier, model_result
from vlmdeploy.report.distributions import Floats, GivenAnswer, ReferenceFile
from vlmdeploy.report.document import ModelResult, Report, read_report_json
from vlmdeploy.report.evaluation import Evaluation, KeptAnswer, Store, samples_hash
from vlmdeploy.report.opened_models import OpenedModel, OpenOptions, subject_of
from vlmdeploy.report.pictures import PictureFolder
from vlmdeploy.report.run import ReportOptions, make_report, model_names
from vlmdeploy.runtime.chat import Turn
from vlmdeploy.score import intervals

ROOMY: dict[str, Any] = {"context_tokens": 512}  # prompts of benchmarks are long where tokens are bytes
Row = dict[str, Any]
ROWS: list[Row | str] = [
    *({"image": f"{n % 3}.png", "messages": messages(f"What is {n}?", f"a {n}"), "task": "vqa"} for n in range(4)),
    *({"image": f"{n}.png", "messages": messages("Where is it?", "")[:1], "task": "rec", "boxes": [[1, 1, 5, 6]]}
      for n in range(2)),
    {"image": "2.png", "messages": messages("Describe it.", "two cats"), "task": "caption"},
    {"messages": messages("Is a cup blue?", "yes"), "task": "yes_no"},
    {"messages": messages("Is a tree red?", "no"), "task": "yes_no"},
]  # fmt: skip
MEASUREMENT = example_result(1, "made up").measurement


@dataclass(frozen=True)
class Models:
    """A tiny checkpoint and two bundles of it."""

    ckpt: Path
    fp32: Path
    int4: Path


@dataclass
class Counts:
    """What was opened and measured, in order."""

    opened: list[str] = field(default_factory=list)
    measured: list[MeasureOptions] = field(default_factory=list)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    ckpt = write_text_checkpoint(folder / "ckpt", **ROOMY)
    return Models(ckpt, export(ckpt, folder / "fp32"), export(ckpt, folder / "int4", "ort-int4", group=16))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "data", ROWS)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    """Counts what is opened; measurements are made up."""
    counts = Counts()

    def counted(path: Path, options: OpenOptions) -> OpenedModel:
        counts.opened.append(path.name)
        return opened_models.open_model(path, options)

    def measured(folder: Path, options: MeasureOptions) -> Measurement:
        assert MEASUREMENT is not None
        counts.measured.append(options)
        return MEASUREMENT

    monkeypatch.setattr(evaluator, "open_model", counted)
    monkeypatch.setattr(evaluator, "measure_in_process", measured)
    return counts


@pytest.fixture
def unwritten(counts: Counts, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counts]:
    """Leaves out drawing and writing, and most resamples: they are tested elsewhere and take most of the time."""
    monkeypatch.setattr(intervals, "NUM_RESAMPLES", 100)
    monkeypatch.setattr(run, "write_report", lambda report, folder: [])
    yield counts


def options_for(bundles: tuple[Path, ...], data: Path, **options: Any) -> ReportOptions:
    """Short answers, one thread, and an output beside the data."""
    defaults = {"out": data.parent / "out", "max_new_tokens": 4, "new_tokens": 2, "repeats": 1, "threads": 1}
    return report_options({"bundles": bundles, "data": data, **defaults, **options})


def report_of(models: Models, data: Path, **options: Any) -> Report:
    """Both bundles beside the checkpoint."""
    return make_report(options_for((models.fp32, models.int4), data, **{"ref": models.ckpt} | options))


@contextmanager
def stopped(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Iterator[None]:
    """The report inside ends with an error after all models have been asked."""

    def stop(report: Report, folder: Path) -> list[Path]:
        raise error

    with monkeypatch.context() as patched, pytest.raises(type(error)):
        patched.setattr(run, "write_report", stop)
        yield


def refuse(monkeypatch: pytest.MonkeyPatch, is_refused: Callable[[Path], bool]) -> None:
    """Some models cannot be opened."""

    def open_others(path: Path, options: OpenOptions) -> OpenedModel:
        if is_refused(path):
            raise BackendError("no memory")
        return opened_models.open_model(path, options)

    monkeypatch.setattr(evaluator, "open_model", open_others)


# What a report says


def test_a_bundle_in_fp32_is_the_checkpoint(models: Models, data: Path, unwritten: Counts) -> None:
    reference, same, _ = report_of(models, data).models
    assert same.equal_answers is not None and same.equal_answers.value == 1.0
    assert same.tasks == reference.tasks
    for agreement in (same.agreement, same.text_only):
        assert agreement is not None
        assert agreement.kl.value < 1e-8 and agreement.top1.value == 1.0, agreement
        assert agreement.perplexity.value == pytest.approx(agreement.reference_perplexity, rel=1e-4)
    assert same.differences is not None
    assert {s.value for metrics in same.differences.values() for s in metrics.values()} == {0.0}
    assert (same.num_regressions, same.num_improvements, same.regressions) == (0, 0, ())
    assert same.grounding is not None and same.grounding.counts[0] == same.grounding.both


def test_data_below_the_working_folder_is_shown_from_there(
    models: Models, data: Path, unwritten: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page that is shown to others told where its maker keeps things."""
    monkeypatch.chdir(data.parent)
    used = report_of(models, data).data
    assert (used.path, used.description) == (f"{data.name}/data.jsonl", f"JSONL file {data.name}/data.jsonl")


def test_error_before_anything_is_kept_leaves_nothing(models: Models, data: Path, tmp_path: Path) -> None:
    arguments = ["report", models.fp32, "--data", data, "--out", tmp_path / "out", "--template", "none"]
    assert 'template "none" is not one of this' in only_error_line(run_cli(*arguments))
    assert list(tmp_path.iterdir()) == [data]


def test_int4_leaves_the_reference(models: Models, data: Path, unwritten: Counts) -> None:
    result = report_of(models, data).models[2]
    assert result.agreement is not None and result.text_only is not None
    assert 1e-4 < result.agreement.kl.value < 1 and 1e-4 < result.text_only.kl.value < 1
    assert result.agreement.kl.low <= result.agreement.kl.value <= result.agreement.kl.high <= result.agreement.kl_max
    assert result.agreement.top1.value < 1.0


def test_the_reference_is_compared_with_nothing(models: Models, data: Path, unwritten: Counts) -> None:
    report = report_of(models, data)
    reference = report.models[0]
    assert (report.reference, reference.subject.kind, reference.subject.name) == ("ckpt", "checkpoint", "ckpt")
    assert (reference.differences, reference.flips, reference.equal_answers, reference.agreement) == (None,) * 4
    assert reference.measurement is None and reference.unmeasured == "a checkpoint in PyTorch, which is no deployment"
    assert [result.subject.name for result in report.models] == ["ckpt", "fp32", "int4"]


def test_first_bundle_is_the_reference_where_no_checkpoint_is_given(
    models: Models, data: Path, unwritten: Counts
) -> None:
    first, second = make_report(options_for((models.int4, models.fp32), data)).models
    assert first.measurement is not None and first.agreement is None
    assert second.agreement is not None and second.agreement.kl.value > 1e-4


def test_what_was_asked_is_counted(models: Models, data: Path, unwritten: Counts) -> None:
    used = report_of(models, data, seed=3).data
    assert used.questions == {"vqa": 4, "rec": 2, "caption": 1, "yes_no": 2}
    assert (used.path, used.pictures, used.seed) == (str(data / "data.jsonl"), 3, 3)


def test_per_task_asks_fewer(models: Models, data: Path, unwritten: Counts) -> None:
    used = make_report(options_for((models.fp32,), data, per_task=1)).data
    assert used.questions == {"vqa": 1, "rec": 1, "caption": 1, "yes_no": 1}


def test_report_read_back_equals_the_one_made(models: Models, data: Path, counts: Counts) -> None:
    report = report_of(models, data)
    out = data.parent / "out"
    assert read_report_json(out / "report.json") == report
    assert (out / "report.html").stat().st_size > 10_000
    assert {path.name for path in data.parent.iterdir()} == {"data", "out"}, "something was left aside"


@pytest.mark.parametrize(
    ("rows", "pictured", "texts"),
    [
        (ROWS, "questions with pictures; answers of the data, or else of the reference",
         "questions without a picture; answers as the data gives them"),
        (ROWS[4:6], "questions with pictures; answers as the reference gives them",
         "questions whose pictures were left out; answers as the reference gives them"),
        (ROWS[:4], "questions with pictures; answers as the data gives them",
         "questions whose pictures were left out; answers as the reference gives them"),
        (ROWS[-2:], None, "questions without a picture; answers as the data gives them"),
    ],
)  # fmt: skip
def test_sources_of_the_compared_answers_are_told(
    models: Models, tmp_path: Path, unwritten: Counts, rows: list[Row | str], pictured: str | None, texts: str
) -> None:
    options = options_for((models.fp32, models.int4), write_rows(tmp_path / "data", rows))
    result = make_report(options).models[1]
    assert (None if result.agreement is None else result.agreement.source) == pictured
    assert result.text_only is not None and result.text_only.source == texts


def test_data_without_pictures_is_measured_without_one(models: Models, tmp_path: Path, unwritten: Counts) -> None:
    report = make_report(options_for((models.fp32, models.int4), write_rows(tmp_path / "data", ROWS[-2:])))
    assert report.data.pictures == 0 and report.models[1].grounding is None
    assert [(one.image, one.text_only) for one in unwritten.measured] == [(None, True)] * 2


def test_the_measured_question_is_one_about_a_picture(models: Models, data: Path, unwritten: Counts) -> None:
    report_of(models, data, residency="phase")
    asked = unwritten.measured[0]
    assert asked.image in {str(data / f"{n}.png") for n in range(3)} and not asked.text_only
    assert asked.prompt in {row["messages"][0]["content"] for row in ROWS if isinstance(row, dict)}
    assert (asked.new_tokens, asked.repeats, asked.threads, asked.residency) == (2, 1, 1, "phase")


def test_measured_tokens_end_with_the_context(models: Models, data: Path, unwritten: Counts) -> None:
    make_report(options_for((models.fp32,), data, new_tokens=100_000))
    assert 1 < unwritten.measured[0].new_tokens < ROOMY["context_tokens"]


def test_pictures_in_a_table_are_measured_by_their_content(models: Models, tmp_path: Path, unwritten: Counts) -> None:
    colours = {"red": "yes", "green": "no", "blue": "yes"}
    rows = [{"image": picture_cell(name), "question": f"Is it {name}?", "answer": colours[name]} for name in colours]
    table = write_tsv(tmp_path / "set.tsv", *({"index": number, **row} for number, row in enumerate(rows)))
    report = make_report(options_for((models.fp32,), table, rule="yes_no", prompt="bare"))
    assert (report.data.questions, report.data.pictures) == ({"yes_no": 3}, 3)
    asked = unwritten.measured[0]
    assert asked.image is not None and asked.prompt == "Is it blue?"
    shown = Image.open(io.BytesIO(base64.b64decode(asked.image.removeprefix("data:image/png;base64,"))))
    assert (shown.size, shown.getpixel((0, 0))) == ((40, 20), (0, 0, 255))


# Numbers of the page from answers


BOXED = Sample(Path("wide.png"), (Turn("Where?"),), "rec", "rec", None, ((320.0, 160.0, 640.0, 320.0),))
ASKED = [Sample(None, (Turn(f"What is {n}?"),), "vqa", "vqa", str(n)) for n in range(4)]


def evaluation_of(*texts: str, size_px: tuple[int, int] | None = None) -> Evaluation:
    return Evaluation(tuple(KeptAnswer(text, (), size_px) for text in texts), None, None, None, "made up")


def result_of(
    models: Models, samples: list[Sample], before: Evaluation, after: Evaluation, folder: Path
) -> ModelResult:
    return model_result(subject_of(models.fp32, "fp32"), samples, after, before, PictureFolder(folder))


def test_regression_shows_question_and_both_answers(models: Models, tmp_path: Path) -> None:
    before, after = evaluation_of("0", "1", "no", "3"), evaluation_of("0", "7", "2", "3")
    result = result_of(models, ASKED, before, after, tmp_path)
    shown = result.regressions[0]
    assert (result.num_regressions, result.num_improvements, len(result.regressions)) == (1, 1, 1)
    assert (shown.question, shown.expected, shown.reference_answer, shown.answer) == ("What is 1?", "1", "1", "7")
    assert (shown.metric, shown.before, shown.after, shown.picture) == ("exact_match", 1.0, 0.0, None)
    assert result.equal_answers is not None and result.equal_answers.value == 0.5


def test_boxes_shrink_with_pictures_wider_than_the_page(models: Models, tmp_path: Path) -> None:
    """1280 x 640 is shown half as large; the answers are thousandths of the sides."""
    picture(0, (1280, 640)).save(tmp_path / "wide.png")
    sample = replace(BOXED, image=tmp_path / "wide.png")
    before = evaluation_of("[[250,250,500,500]]", size_px=(1280, 640))
    after = evaluation_of("[[250,250,500,750]]", size_px=(1280, 640))
    result = result_of(models, [sample], before, after, tmp_path)
    assert result.grounding is not None
    example = result.grounding.examples[0]
    assert (example.expected, example.drift) == ((160, 80, 320, 160), 250.0)
    assert example.iou == pytest.approx(0.5, abs=0.01)
    assert example.reference == pytest.approx((160, 80, 320, 160), abs=1) and example.model is not None
    assert example.model == pytest.approx((160, 80, 320, 240), abs=1)
    with Image.open(tmp_path / example.picture) as shown:
        assert shown.size == (640, 320)


def test_answer_without_a_box_is_shown_without_one(models: Models, tmp_path: Path) -> None:
    picture(0, (64, 64)).save(tmp_path / "wide.png")
    sample = replace(BOXED, image=tmp_path / "wide.png", boxes=((0.0, 0.0, 32.0, 32.0),))
    before = evaluation_of("[[000,000,500,500]]", size_px=(64, 64))
    result = result_of(models, [sample], before, evaluation_of("nowhere", size_px=(64, 64)), tmp_path)
    assert result.grounding is not None
    example = result.grounding.examples[0]
    assert (result.grounding.both, example.model, example.drift, example.iou) == (0, None, None, 0.0)
    assert result.regressions[0].metric == "acc@0.5" and result.regressions[0].expected == "0, 0, 32, 32"


def test_frontier_marks_what_is_worse_in_everything(models: Models, tmp_path: Path) -> None:
    assert MEASUREMENT is not None
    slower = replace(MEASUREMENT, first_token=replace(MEASUREMENT.first_token, p50=MEASUREMENT.first_token.p50 + 5))
    alone = result_of(models, ASKED, evaluation_of(*"0123"), evaluation_of(*"0123"), tmp_path)
    worse = result_of(models, ASKED, evaluation_of(*"0123"), evaluation_of(*"0124"), tmp_path)
    found = frontier([alone, replace(alone, measurement=MEASUREMENT), replace(worse, measurement=slower)])
    assert found is not None and len(found.metrics) == 1
    assert [(point.accuracy, point.is_dominated) for point in found.points] == [(1.0, False), (0.75, True)]
    tokens = MEASUREMENT.new_tokens * MEASUREMENT.decode_per_token.p50
    assert found.points[0].latency_ms == pytest.approx(MEASUREMENT.first_token.p50 + tokens)


# What is kept, and what is not taken for it


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ExportError("disk is full")])
def test_no_model_is_asked_twice_after_a_failure(
    models: Models, data: Path, unwritten: Counts, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    with stopped(monkeypatch, error):
        report_of(models, data)
    assert not (data.parent / "out").exists() and unwritten.opened == ["ckpt", "fp32", "int4"]
    kept = list(partial_folder(data.parent / "out").rglob("*.json"))
    assert len(kept) == 4, "three evaluations, and the reference's answers to rows without any"
    report_of(models, data)
    assert unwritten.opened == ["ckpt", "fp32", "int4"] and len(unwritten.measured) == 2
    assert {path.name for path in data.parent.iterdir()} == {"data", "out"}


def test_report_that_goes_on_has_the_numbers_of_one_that_never_stopped(
    models: Models, data: Path, unwritten: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = report_of(models, data, out=data.parent / "whole")
    with monkeypatch.context() as patched:
        refuse(patched, lambda path: path == models.int4)
        with pytest.raises(BackendError, match="no memory"):
            report_of(models, data)
    unwritten.opened.clear()
    assert report_of(models, data).models == whole.models
    assert unwritten.opened == ["int4"]


@pytest.mark.parametrize("name", ["texts", "distributions.of"])
def test_what_is_missing_of_the_kept_reference_is_made_again(
    models: Models, data: Path, unwritten: Counts, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Without its answers the next model ended with a traceback."""
    whole = report_of(models, data, out=data.parent / "whole")
    with stopped(monkeypatch, KeyboardInterrupt()):
        make_report(options_for((models.fp32,), data, ref=models.ckpt))
    partial = partial_folder(data.parent / "out")
    for path in partial.glob(f"{name}/*.json") if name == "texts" else [partial / name]:
        path.write_bytes(b"\xff damaged")
    assert report_of(models, data).models == whole.models


def rewrite_picture(data: Path) -> None:
    """Another picture of the same name, size in bytes and time."""
    path = data / "0.png"
    content, before = bytearray(path.read_bytes()), path.stat()
    content[-10] ^= 0xFF  # in the last check sum
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def rewrite_rows(*rows: Row | str) -> Callable[[Path], None]:
    def write(data: Path) -> None:
        write_rows(data, [*rows, *ROWS[1:]])

    return write


FIRST: Row = {"image": "0.png", "messages": messages("What is 0?", "a 0"), "task": "vqa"}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(rewrite_rows({**FIRST, "messages": messages("What is 9?", "a 0")}), id="question"),
        pytest.param(rewrite_rows({**FIRST, "messages": messages("What is 0?", "nothing")}), id="answer"),
        pytest.param(rewrite_rows({**FIRST, "image": "1.png"}), id="other picture"),
        pytest.param(rewrite_rows({**FIRST, "template": "vqa"}), id="template"),
        pytest.param(rewrite_rows({**FIRST, "kind": "count"}), id="kind"),
        pytest.param(rewrite_rows(), id="row less"),
    ],
)
def test_changed_questions_are_asked_anew(
    models: Models, data: Path, unwritten: Counts, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    with stopped(monkeypatch, ExportError("disk is full")):
        make_report(options_for((models.fp32,), data))
    change(data)
    make_report(options_for((models.fp32,), data))
    assert unwritten.opened == ["fp32", "fp32"]


@pytest.mark.parametrize(
    "changed",
    [
        {"max_new_tokens": 3}, {"new_tokens": 3}, {"repeats": 2}, {"threads": 2}, {"provider": "cpu"},
        {"residency": "phase"}, {"template": "vqa"}, {"per_task": 1}, {"ref": "ckpt"},
    ],
    ids=str,
)  # fmt: skip
def test_changed_options_are_another_evaluation(
    models: Models, data: Path, unwritten: Counts, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    with stopped(monkeypatch, ExportError("disk is full")):
        make_report(options_for((models.fp32,), data))
    chosen = {key: models.ckpt if key == "ref" else value for key, value in changed.items()}
    make_report(options_for((models.fp32,), data, **chosen))
    assert unwritten.opened[-1] == "fp32" and len(unwritten.opened) == 2 + ("ref" in changed)


def test_picture_of_other_content_is_another_question(data: Path) -> None:
    """Name, size and time stayed the same: it was taken for the old one."""
    before = list(open_source(data, to_score=True).samples())
    old = samples_hash(before)
    rewrite_picture(data)
    assert samples_hash(before) != old


def test_hash_of_the_questions_does_not_depend_on_their_place(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "elsewhere")
    one, other = (list(open_source(folder, to_score=True).samples()) for folder in (data, tmp_path / "elsewhere"))
    assert samples_hash(one) == samples_hash(other)


def test_another_tokenizer_of_the_checkpoint_is_another_evaluation(
    models: Models, data: Path, unwritten: Counts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers of the tokenizer before were taken for those of the new one."""
    ckpt = Path(shutil.copytree(models.ckpt, tmp_path / "ckpt"))
    with stopped(monkeypatch, ExportError("disk is full")):
        report_of(models, data, ref=ckpt)
    changed = json.loads((ckpt / "tokenizer.json").read_text())
    (ckpt / "tokenizer.json").write_text(json.dumps(changed, indent=4))
    report_of(models, data, ref=ckpt)
    assert unwritten.opened == ["ckpt", "fp32", "int4"] * 2


def test_distributions_of_other_questions_are_never_compared_with(
    models: Models, data: Path, unwritten: Counts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with other data that was killed while it wrote left its distributions under the name of those before."""
    whole = report_of(models, data, out=tmp_path / "whole")
    others = write_rows(tmp_path / "others", [*ROWS[2:]])
    with monkeypatch.context() as patched:
        refuse(patched, lambda path: path != models.ckpt)
        with pytest.raises(BackendError, match="no memory"):
            report_of(models, data)
        patched.setattr(evaluator, "write_file", lambda path, write: raise_killed())
        with pytest.raises(BackendError, match="killed"):
            report_of(models, others)
    assert report_of(models, data).models == whole.models


def raise_killed() -> None:
    raise BackendError("killed")


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"[" * 100_000, b'{"answers": []}', b"null"])
def test_damaged_evaluation_is_made_again(tmp_path: Path, content: bytes) -> None:
    store, kept = Store(tmp_path), evaluation_of("a", "b")
    store.put("key", kept)
    assert store.get("key", 2) == kept and store.get("key", 3) is None and store.get("other", 2) is None
    store.path("key").write_bytes(content)
    assert store.get("key", 2) is None


def test_evaluation_keeps_text_that_is_no_utf8(tmp_path: Path) -> None:
    kept = evaluation_of("half a pair \ud83d", "nul \0", "", "\u2028")
    assert Store(tmp_path / "new" / "folder").put("key", kept) == Store(tmp_path / "new" / "folder").get("key", 4)


def test_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system names no file then, and the command ended with a traceback."""

    def fail(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vlmdeploy.artifact.sync_file", fail)
    with pytest.raises(ExportError, match=f"{tmp_path}: cannot be written: No space left on device"):
        Store(tmp_path).put("key", evaluation_of("a"))
    given = GivenAnswer(ASKED[0], np.arange(2), np.arange(2), None)
    with pytest.raises(ExportError, match="distributions: cannot be written: No space left on device"):
        ReferenceFile(tmp_path / "distributions", 3).write(Logits(), iter([given]))


class Logits:
    """A model that is sure of nothing."""

    def answer_logits(self, given: GivenAnswer) -> Floats:
        return np.zeros((len(given.answer), 3), np.float32)


def test_answers_of_two_models_at_most_are_held(
    models: Models, data: Path, unwritten: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep has many points, and a benchmark many questions: all answers of all models filled the memory."""
    held: list[int] = []
    before = count_evaluations()

    def counted(*arguments: Any) -> ModelResult:
        held.append(count_evaluations() - before)
        return model_result(*arguments)

    monkeypatch.setattr(run, "model_result", counted)
    copies = tuple(Path(shutil.copytree(models.fp32, data.parent / f"copy{n}")) for n in range(2))
    make_report(options_for((models.fp32, *copies), data))
    assert len(held) == 3 and max(held) <= 2, held


def count_evaluations() -> int:
    gc.collect()
    return sum(type(each) is Evaluation for each in gc.get_objects())


# Outputs that are refused


def test_second_report_of_the_same_output_is_refused(models: Models, data: Path, unwritten: Counts) -> None:
    out = data.parent / "out"
    with locked(partial_folder(out)), pytest.raises(ExportError, match=r"out\.partial: another run is writing it"):
        report_of(models, data)
    assert unwritten.opened == []


def test_existing_report_is_replaced_only_by_force(
    models: Models, data: Path, unwritten: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_titles(report: Report, folder: Path) -> list[Path]:
        for name in ("report.json", "report.html"):
            (folder / name).write_text(report.title)
        return []

    monkeypatch.setattr(run, "write_report", write_titles)
    options = options_for((models.fp32,), data)
    make_report(options)
    with pytest.raises(ExportError, match=r"out: exists already; choose another output or replace it with --force"):
        make_report(options)
    make_report(replace(options, force=True, title="again"))
    assert (options.out / "report.html").read_text() == "again"


def test_folder_of_somebody_else_stays(models: Models, data: Path, unwritten: Counts) -> None:
    out = data.parent / "out"
    out.mkdir()
    (out / "report.html").write_text("mine")
    with pytest.raises(ExportError, match=r"out: exists and was not made by vlmdeploy, so --force does not replace it"):
        report_of(models, data, force=True)
    assert (out / "report.html").read_text() == "mine" and unwritten.opened == []


def test_partial_folder_of_somebody_else_stays(models: Models, data: Path, unwritten: Counts) -> None:
    """With the last step of the report it would have been deleted."""
    partial = partial_folder(data.parent / "out")
    partial.mkdir()
    (partial / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"out\.partial: holds notes\.txt, which is not from a report"):
        report_of(models, data)
    assert [path.name for path in partial.iterdir()] == ["notes.txt"] and unwritten.opened == []


def test_output_below_a_file_is_refused(models: Models, data: Path, unwritten: Counts) -> None:
    with pytest.raises(ExportError, match=r"data\.jsonl/out\.partial: cannot be written: Not a directory"):
        report_of(models, data, out=data / "data.jsonl" / "out")
    assert unwritten.opened == []


# Inputs that are refused


def test_models_are_called_by_what_tells_them_apart(tmp_path: Path) -> None:
    a, b, c = tmp_path / "x" / "int4", tmp_path / "y" / "int4", tmp_path / "x" / "fp32"
    assert model_names([a, c]) == ["int4", "fp32"]
    assert model_names([a, b, c]) == ["x/int4", "y/int4", "x/fp32"]
    assert model_names([Path("/int4"), Path("/y/int4")]) == ["/int4", "y/int4"]


@pytest.mark.parametrize("again", ["fp32", "../models/fp32", "link"])
def test_bundle_given_twice_is_refused(tmp_path: Path, again: str) -> None:
    """By another way to it or a link, it was taken for another one."""
    folder = tmp_path / "models"
    (folder / "fp32").mkdir(parents=True)
    (folder / "link").symlink_to("fp32")
    with pytest.raises(ConfigError, match=f"{again}: is given twice"):
        model_names([folder / "fp32", folder / again])


def refusal(data: Path, *models: object, **options: object) -> str:
    """The line of a refused report, which leaves nothing behind but the lock of its partial folder."""
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    line = only_error_line(run_cli("report", *models, "--data", data, "--out", data.parent / "out", *flags))
    left = [path for path in data.parent.rglob("*") if "out" in path.name]
    assert all(path.name == "out.partial" for path in left), left
    return line


def test_models_that_do_not_fit_their_option_are_refused(models: Models, data: Path) -> None:
    nowhere = data / "nowhere"
    not_a_bundle = (
        f"Error: {models.ckpt}: is not a bundle, expected one made by `vlmdeploy export`; --ref takes a checkp"
    )
    assert refusal(data, models.fp32, models.ckpt).startswith(not_a_bundle)
    assert f"{nowhere}: no such folder, expected a bundle" in refusal(data, models.fp32, nowhere)
    line = refusal(data, models.int4, ref=models.fp32)
    assert line.startswith(f"Error: --ref {models.fp32}: is a bundle, expected a checkpoint")
    assert "nowhere" in refusal(data, models.int4, ref=nowhere)


def test_bundle_of_another_model_is_refused(models: Models, data: Path, tmp_path: Path) -> None:
    bundle, weights = models.fp32, write_text_checkpoint(tmp_path / "weights", seed=1, **ROOMY)
    size = write_text_checkpoint(tmp_path / "size", layers=1)
    family = write_calibration_checkpoint(tmp_path / "family", "cogvlm2")
    line = refusal(data, bundle, ref=weights)
    assert f"{bundle}: its embedding table differs from that of {weights} by 1.4" in line
    assert "was it made from another checkpoint?" in line
    assert f"{bundle}: decoder layers 2, and 1 in {size}" in refusal(data, bundle, ref=size)
    assert f"{bundle}: is a cogvlm, {family} a cogvlm2" in refusal(data, bundle, ref=family)


def test_another_tokenizer_is_refused(models: Models, data: Path, tmp_path: Path) -> None:
    changed = byte_tokenizer()
    changed.normalizer = normalizers.Lowercase()
    changed.save(str(tmp_path / "tokenizer.json"))
    line = refusal(data, models.fp32, ref=models.ckpt, tokenizer=tmp_path / "tokenizer.json")
    assert f"{models.fp32}: its tokenizer is not that of {models.ckpt}" in line


def test_checkpoint_without_a_tokenizer_is_refused(models: Models, data: Path, tmp_path: Path) -> None:
    ckpt = Path(shutil.copytree(models.ckpt, tmp_path / "ckpt"))
    (ckpt / "tokenizer.json").unlink()
    assert f"{ckpt}: holds no tokenizer.json and no tokenizer.model" in refusal(data, models.fp32, ref=ckpt)


def test_ids_only_bundle_is_refused(models: Models, data: Path, tmp_path: Path) -> None:
    ckpt = Path(shutil.copytree(models.ckpt, tmp_path / "ckpt"))
    (ckpt / "tokenizer.json").unlink()
    bundle = export(ckpt, tmp_path / "bundle")
    line = refusal(data, models.fp32, bundle)
    assert f"{bundle}: an ids-only bundle cannot be asked questions: export it with --tokenizer FILE" in line


def test_reference_whose_logits_are_not_finite_is_named(
    models: Models, data: Path, tmp_path: Path, unwritten: Counts
) -> None:
    """NaN went into the report, and ended it with a traceback when it was to be written."""
    ckpt = write_changed_checkpoint(tmp_path / "ckpt", overflow_for_pictures, vocab=259, **ROOMY)
    line = refusal(data, models.fp32, ref=ckpt, threads=1)
    assert line.startswith(f"Error: {ckpt}: logits of the answer to 'What is 0?' are not finite")


def test_damaged_quantization_report_is_told_before_anything_is_asked(
    models: Models, data: Path, tmp_path: Path, unwritten: Counts
) -> None:
    """It ended the report with a traceback when all models had been asked."""
    ckpt = Path(shutil.copytree(models.ckpt, tmp_path / "ckpt"))
    (ckpt / "quantization_report.json").write_text('{"linears": 4}')
    assert f"{ckpt / 'quantization_report.json'}" in refusal(data, models.fp32, ref=ckpt)
    (ckpt / "quantization_report.json").write_text("{")
    assert f"{ckpt / 'quantization_report.json'}" in refusal(data, models.fp32, ref=ckpt)
    assert unwritten.opened == []


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([""], "data.jsonl: holds no rows"),
        ([{"messages": messages("What?", "7")}], 'data.jsonl:1: key "task" is missing'),
        ([{"messages": messages("What?", "7")[:1], "task": "vqa"}],
         "data.jsonl: question \"1\" ('What?'): has no reference answer"),
        ([{"messages": messages("What?", "7"), "task": "chat"}], "('What?'): task \"chat\" has no metric"),
        ([{"messages": messages("Where?", ""), "task": "rec"}], "task rec has 0 boxes, expected a picture and one box"),
        (["{"], "data.jsonl:1: not JSON"),
        (["\xff"], "data.jsonl:1: not JSON"),
        ([{"image": "none.png", "messages": messages("What?", "7"), "task": "vqa"}], "none.png: no such file"),
        ([{"messages": messages("What?", "7"), "task": "vqa", "template": "no"}], 'template "no" is not one of this'),
        ([{"messages": messages("Why? " * 200, "7"), "task": "vqa"}],
         f"question '{'Why? ' * 16}': the prompt has 1019 tokens (an image takes 18) and the context holds 512"),
    ],
)  # fmt: skip
def test_unfit_questions_are_refused(
    models: Models, tmp_path: Path, unwritten: Counts, rows: list[Row | str], expected: str
) -> None:
    assert expected in refusal(write_rows(tmp_path / "data", rows), models.fp32, threads=1)


def test_picture_that_is_none_is_named(models: Models, tmp_path: Path, unwritten: Counts) -> None:
    data = write_rows(tmp_path / "data", ROWS)
    (data / "1.png").write_bytes(b"no picture")
    assert f"{data / '1.png'}" in refusal(data, models.fp32, threads=1)


def test_data_that_is_none_is_refused(models: Models, tmp_path: Path) -> None:
    data = tmp_path / "data"
    assert f"{data}: no such file" in refusal(data, models.fp32)
    data.mkdir()
    assert f"{data}: holds no known data" in refusal(data, models.fp32)
    picture(0).save(data / "0.png")
    assert f"{data}: is a folder of pictures; to score, questions with answers are expected" in refusal(
        data, models.fp32
    )


# The command


def test_command_prints_one_row_for_each_model(models: Models, data: Path, unwritten: Counts) -> None:
    out, other = data.parent / "out", data.parent / "other"
    fast = ("--threads", 1, "--max-new-tokens", 2)
    result = run_cli("report", models.int4, "--ref", models.ckpt, "--data", data, "--out", out, *fast)
    assert result.exit_code == 0, result.stderr
    assert "report.html" in result.stdout and "ckpt" in result.stdout and "int4" in result.stdout
    again = run_cli("report", models.int4, "--data", data, "--out", other, "--json", *fast)
    document = only_json_document(again)
    assert (document["report"], document["reference"], len(document["models"])) == (str(other), "int4", 1)


def test_interrupted_command_says_so_and_keeps_what_it_has(
    models: Models, data: Path, unwritten: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(report: Report, folder: Path) -> list[Path]:
        raise KeyboardInterrupt

    command = ("report", models.int4, "--data", data, "--out", data.parent / "out", "--threads", 1)
    with monkeypatch.context() as patched:
        patched.setattr(run, "write_report", interrupt)
        assert only_error_line(run_cli(*command)) == "Error: interrupted"
    assert run_cli(*command).exit_code == 0
    assert unwritten.opened == ["int4"]


@pytest.mark.slow
def test_report_measures_bundles_in_processes_of_their_own(models: Models, data: Path) -> None:
    report = report_of(models, data)
    for result in report.models[1:]:
        assert result.measurement is not None
        assert result.measurement.first_token.p50 > 0 and result.measurement.memory.peak_bytes > 10**7
    assert report.frontier is not None and [point.name for point in report.frontier.points] == ["fp32", "int4"]

"""Reference: the report's statistics against independent ones, of scipy or worked out by hand."""

from pathlib import Path
from typing import cast

import numpy as np
import pytest
from scipy import special, stats

from vlmdeploy.data.samples import Sample
from vlmdeploy.errors import DataError
from vlmdeploy.layout import Ints
from vlmdeploy.report.collect import dominates, layer_errors
from vlmdeploy.report.compared import DRIFT_EDGES, Fall, drift, drift_counts, falls_of, flips_of, mcnemar_p, worst
from vlmdeploy.report.distributions import (
    Floats,
    GivenAnswer,
    ReferenceFile,
    TokenRecord,
    agreement_of,
    compare,
    given_answers,
    log_softmax,
)
from vlmdeploy.report.document import FrontierPoint
from vlmdeploy.runtime.boxes import Box
from vlmdeploy.runtime.chat import Turn
from vlmdeploy.score.answerers import PreparedQuestion, QuestionMaker
from vlmdeploy.score.metrics import Prediction, measure

SIZE_PX = (100, 50)


def answer(text: str, reference: str = "7", task: str = "vqa", image: str | None = None) -> Prediction:
    picture = None if image is None else Path(image)
    return Prediction(Sample(picture, (Turn("What?"),), task, task, reference), text, size_px=SIZE_PX)


def box_answer(text: str, box: tuple[float, float, float, float] = (10, 5, 50, 25)) -> Prediction:
    return Prediction(Sample(Path("p.png"), (Turn("Where?"),), "rec", "rec", None, (box,)), text, size_px=SIZE_PX)


@pytest.mark.parametrize(
    ("lost", "gained"), [(0, 0), (1, 0), (5, 5), (3, 9), (9, 3), (0, 20), (17, 40), (300, 420), (2000, 2300)]
)
def test_mcnemar_is_the_exact_binomial_test(lost: int, gained: int) -> None:
    expected = stats.binomtest(lost, lost + gained, 0.5).pvalue if lost + gained else 1.0
    assert mcnemar_p(lost, gained) == pytest.approx(expected, rel=1e-9)


def test_flips_count_both_ways_and_only_shares() -> None:
    before = [answer("7"), answer("7"), answer("1"), answer("1"), answer("7", task="caption")]
    after = [answer("1"), answer("7"), answer("7"), answer("2"), answer("7 7", task="caption")]
    tasks = [answer.sample.task for answer in before]
    flips = flips_of(tasks, list(map(measure, before)), list(map(measure, after)))
    assert (flips["vqa"]["exact_match"].lost, flips["vqa"]["exact_match"].gained) == (1, 1)
    assert flips["vqa"]["exact_match"].p_value == 1.0
    assert set(flips["caption"]) == {"exact_match"}, "token_f1 is no share"


def test_fall_is_that_of_the_worst_metric() -> None:
    before, after, gone = (
        measure(box_answer(text)) for text in ("[[100,100,500,500]]", "[[100,100,500,400]]", "no box")
    )
    falls = falls_of([before, before], [after, gone])
    assert (falls[0].metric, falls[0].before) == ("mean_iou", 1.0)
    assert falls[0].after == pytest.approx(0.75)
    assert (falls[1].metric, falls[1].size) == ("acc@0.5", 1.0)


def test_worst_takes_tasks_by_turns_and_leaves_small_falls_out() -> None:
    tasks = ["vqa", "vqa", "vqa", "rec", "rec"]
    falls = [Fall(place, "m", 1.0, after) for place, after in enumerate([0.0, 0.0, 0.95, 0.5, 1.0])]
    assert [fall.place for fall in worst(falls, tasks, 9)] == [0, 3, 1]
    assert [fall.place for fall in worst(falls, tasks, 2)] == [0, 3]


def test_drift_is_the_farthest_edge_and_is_counted_by_its_bin() -> None:
    assert drift(Box((1, 2, 3, 4), (0, 0, 0, 0)), Box((4, 2, 1, 4), (0, 0, 0, 0))) == 3.0
    counts = dict(zip(DRIFT_EDGES, drift_counts([0.0, 0.5, 1.0, 4.9, 5.0, 1000.0]), strict=False))
    assert (counts[0.0], counts[1.0], counts[3.0], counts[5.0], counts[200.0]) == (2, 1, 1, 1, 1)


class Tabled:
    """A model whose logits are written down, question by question."""

    def __init__(self, tables: list[Floats]) -> None:
        self.tables = iter(tables)

    def answer_logits(self, given: GivenAnswer) -> Floats:
        return next(self.tables)


def givens(answers: list[list[int]], pictures: list[str | None]) -> list[GivenAnswer]:
    return [
        GivenAnswer(answer("", image=picture).sample, np.array([1]), np.array(ids), None)
        for ids, picture in zip(answers, pictures, strict=True)
    ]


def test_distributions_agree_with_scipy(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = [(3, 11), (1, 11), (4, 11)]
    theirs, ours = ([rng.normal(0, 3, shape).astype(np.float32) for shape in shapes] for _ in range(2))
    asked = givens([[1, 2, 3], [4], [5, 6, 7, 8]], ["a", "a", None])
    file = ReferenceFile(tmp_path / "reference", 11)
    assert file.write(Tabled(theirs), iter(asked)) == 8
    record = compare(Tabled(ours), file, iter(asked))
    p, q = (special.softmax(np.concatenate(tables).astype(np.float64), axis=-1) for tables in (theirs, ours))
    np.testing.assert_allclose(record.kl, special.rel_entr(p, q).sum(-1), rtol=1e-5)
    assert record.equal == (p.argmax(-1) == q.argmax(-1)).astype(float).tolist()
    ids = np.arange(1, 9)
    np.testing.assert_allclose(record.surprise, -np.log(q[np.arange(8), ids]), rtol=1e-6)
    agreement = agreement_of(record, "made up")
    assert agreement.perplexity.value == pytest.approx(np.exp(-np.log(q[np.arange(8), ids]).mean()), rel=1e-6)
    assert agreement.reference_perplexity == pytest.approx(np.exp(-np.log(p[np.arange(8), ids]).mean()), rel=1e-5)
    assert (agreement.questions, agreement.tokens, record.picture) == (3, 8, [0, 0, 0, 0, 1, 1, 1, 1])
    assert agreement.kl.low <= agreement.kl.value <= agreement.kl.high
    assert agreement.kl_max == pytest.approx(max(record.kl)) and agreement.kl_median == pytest.approx(
        np.median(record.kl)
    )


@pytest.mark.parametrize("spread", [3, 50])
def test_a_model_agrees_with_itself(tmp_path: Path, spread: float) -> None:
    """Rounded to float32, log-probabilities do not add up to 1: that made 1e-8 nats of divergence."""
    tables = [np.random.default_rng(seed).normal(0, spread, (40, 259)).astype(np.float32) for seed in range(2)]
    asked = givens([[1] * 40, [2] * 40], [None, None])
    file = ReferenceFile(tmp_path / "reference", 259)
    file.write(Tabled(tables), iter(asked))
    record = compare(Tabled(tables), file, iter(asked))
    agreement = agreement_of(record, "itself")
    assert max(record.kl) < 1e-12 and agreement.top1.value == 1.0
    assert agreement.perplexity.value == pytest.approx(agreement.reference_perplexity, rel=1e-5)


def test_reference_file_that_was_cut_is_named(tmp_path: Path) -> None:
    file = ReferenceFile(tmp_path / "reference", 7)
    file.write(Tabled([np.zeros((1, 7), np.float32)]), iter(givens([[0]], [None])))
    with pytest.raises(DataError, match=r"reference: holds fewer than 3 rows"):
        compare(Tabled([np.zeros((3, 7), np.float32)]), file, iter(givens([[0, 1, 2]], [None])))


class FixedPrompt:
    """A maker of questions with prompts of 10 tokens and answers of 4."""

    def question(self, sample: Sample) -> PreparedQuestion:
        return PreparedQuestion(sample, np.arange(10), None)

    def answer_ids(self, text: str) -> Ints:
        return np.array([5, 6, 7, 2], np.int64)


@pytest.mark.parametrize("context_tokens", [7, 9, 10])
def test_prompt_that_fills_the_context_is_refused(context_tokens: int) -> None:
    """One token too long was taken for "all but the last token of the answer"."""
    maker = cast("QuestionMaker", FixedPrompt())
    with pytest.raises(DataError, match=f"'What\\?': fills the context of {context_tokens} tokens"):
        next(given_answers([answer("").sample], ["7"], maker, context_tokens))


def test_answer_is_cut_where_the_context_ends() -> None:
    given = next(given_answers([answer("").sample], ["7"], cast("QuestionMaker", FixedPrompt()), 12))
    assert given.answer.tolist() == [5, 6]


def test_log_softmax_stands_large_logits() -> None:
    logits = np.array([[1e4, -1e4, 0.0]], np.float32)
    np.testing.assert_allclose(log_softmax(logits), special.log_softmax(logits.astype(np.float64), axis=-1))


def test_bootstrap_of_tokens_resamples_pictures() -> None:
    """Two pictures whose tokens are all alike: the interval spans from one to the other."""
    record = TokenRecord([0.0] * 10 + [1.0] * 10, [1.0] * 20, [0.0] * 20, [0.0] * 20, [0] * 10 + [1] * 10, 2)
    kl = agreement_of(record, "two pictures").kl
    assert (kl.value, kl.low, kl.high) == (0.5, 0.0, 1.0)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (FrontierPoint("b", 0.9, 10, 100, False), False),
        (FrontierPoint("b", 0.9, 10, 101, False), True),
        (FrontierPoint("b", 0.8, 20, 200, False), True),
        (FrontierPoint("b", 0.91, 20, 200, False), False),
        (FrontierPoint("b", 0.8, 9, 200, False), False),
    ],
)
def test_a_point_is_dominated_only_by_one_that_is_never_worse(other: FrontierPoint, expected: bool) -> None:
    assert dominates(FrontierPoint("a", 0.9, 10, 100, False), other) is expected
    assert not dominates(other, FrontierPoint("a", 0.9, 10, 100, False)) or not expected


def test_without_a_quantization_report_there_are_no_layer_errors(tmp_path: Path) -> None:
    assert layer_errors(tmp_path) is None

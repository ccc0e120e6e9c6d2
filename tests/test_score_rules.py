"""Reference: the scoring rules of public benchmarks against tables worked out by hand."""

import numpy as np
import pytest

from vlmdeploy.data.questions import RULES, UNSCORED
from vlmdeploy.data.samples import Sample
from vlmdeploy.data.vlmevalkit import RULE_OF_SET
from vlmdeploy.errors import DataError
from vlmdeploy.runtime.chat import Turn
from vlmdeploy.score.answer_text import leveled_answer
from vlmdeploy.score.choices import chosen_option, meets_open_question, said_yes_or_no
from vlmdeploy.score.metrics import (
    MEASURES,
    TASK_METRICS,
    Prediction,
    check_scorable,
    measure,
    paired_differences,
    score,
)
from vlmdeploy.score.set_scores import all_right, yes_scores
from vlmdeploy.score.text_rules import (
    anls,
    contains_answer,
    edit_distance,
    relaxed_accuracy,
    stripped_match,
    vqa_accuracy,
)

ANIMALS = (("A", "cat"), ("B", "dog"), ("C", "bird"), ("D", "fish"))


@pytest.mark.parametrize(
    ("text", "leveled"),
    [
        ("The Red Car", "red car"),
        ("a  an the", ""),
        ("Two dogs.", "2 dogs"),
        ("ten", "10"),
        ("none", "0"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("somebody'd", "somebodyd"),
        ("U.S.A.", "usa"),
        ("3.5", "3.5"),
        ("St. John", "st john"),
        ("1,000", "1000"),
        ("1,000 (a-b)", "1000 ab"),  # the number with a comma drops all marks
        ("e-mail", "e mail"),
        ("c-d(-b", "c d b"),  # beside a space in the answer as written
        ("a)b c)\nd", "ab c d"),  # a line end is a space
        ("yes, it is!", "yes it is"),
        ("no - way", "no way"),
        ("line\nbreak\ttab", "line break tab"),
        ("it's", "it's"),
        ("", ""),
    ],
)
def test_answers_are_leveled_as_in_the_vqa_evaluation(text: str, leveled: str) -> None:
    assert leveled_answer(text) == leveled


def people(*answers: tuple[str, int]) -> list[str]:
    """Ten references: each answer so many times."""
    return [answer for answer, count in answers for _ in range(count)]


@pytest.mark.parametrize(
    ("text", "references", "value"),
    [
        ("red", people(("red", 10)), 1.0),
        ("red", people(("red", 4), ("blue", 6)), 1.0),
        ("red", people(("red", 3), ("blue", 7)), 0.9),  # three leave-outs see 2 of 3, seven see 3 of 3
        ("red", people(("red", 2), ("blue", 8)), 0.6),  # two see 1/3, eight see 2/3
        ("red", people(("red", 1), ("blue", 9)), 0.3),  # one sees 0, nine see 1/3
        ("red", people(("blue", 10)), 0.0),
        ("The Red.", people(("red", 10)), 1.0),
        ("two", people(("2", 10)), 1.0),
        ("2", people(("two", 5), ("2", 5)), 1.0),
        ("1000", people(("1,000", 10)), 1.0),
        ("dont walk", people(("don't walk", 10)), 1.0),
        ("red car", people(("red", 10)), 0.0),
        ("", people(("red", 10)), 0.0),
        ("", people(("the", 1), ("red", 9)), 0.3),  # an article levels to nothing
        ("red", ["red", "red", "red", "red"], 1.0),
        ("red", ["red", "red", "red"], 2 / 3),  # each sees two others
        ("red", ["red"], 0.0),
    ],
)
def test_vqa_accuracy_leaves_each_reference_out_once(text: str, references: list[str], value: float) -> None:
    assert vqa_accuracy(text, references) == pytest.approx(value)


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("same", "same", 0)],
)
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == distance


@pytest.mark.parametrize(
    ("text", "references", "value"),
    [
        ("invoice", ["invoice"], 1.0),
        ("Invoice", ["invoice"], 1.0),
        ("invoise", ["invoice"], 6 / 7),
        ("in voice", ["invoice"], 7 / 8),
        ("abcd", ["abxx"], 0.5),  # one half just counts
        ("abc", ["axx"], 0.0),  # one third does not
        ("abcde", ["abxxx"], 0.0),  # 0.4
        ("12 May 1999", ["12 may 1999", "May 12"], 1.0),
        ("May 13", ["12 may 1999", "May 12"], 5 / 6),
        ("", ["abc"], 0.0),
        ("", [""], 1.0),
        ("abc", [""], 0.0),
        ("a  b", ["a b"], 1.0),  # runs of white space do not count
        ("ab      ", ["ab"], 1.0),
        ("ab      ", ["ac"], 7 / 8),  # but the length that divides is that of the text as written
        ("kitten", ["sitting"], 4 / 7),
        ("$1,200", ["$1,200.00"], 2 / 3),
    ],
)
def test_anls(text: str, references: list[str], value: float) -> None:
    assert anls(text, references) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "reference", "value"),
    [
        ("100", "100", 1),
        ("105", "100", 1),
        ("95", "100", 1),
        ("105.1", "100", 0),
        ("94.9", "100", 0),
        ("-100", "-104", 1),
        ("-100", "100", 0),
        ("-100", "-50", 0),
        (" Yes\n", "yes", 1),
        ("5%", "0.05", 1),
        ("5%", "5", 0),
        ("51%", "50%", 1),
        ("0", "0", 1),
        ("0.0", "0", 0),  # nothing is within 5 % of zero: a text
        ("1e2", "100", 1),
        (" 100 ", "100", 1),
        ("Yes", "yes", 1),
        ("yes.", "yes", 0),
        ("100 dollars", "100", 0),
        ("nan", "nan", 1),
        ("nan", "100", 0),
        ("inf", "100", 0),
        ("", "100", 0),
        ("%", "%", 1),
    ],
)
def test_relaxed_accuracy(text: str, reference: str, value: int) -> None:
    assert relaxed_accuracy(text, [reference]) == value
    assert relaxed_accuracy(text, ["somewhere else", reference]) == value


@pytest.mark.parametrize(
    ("text", "references", "is_formula", "value"),
    [
        ("CENTRE", ["centre"], False, 1),
        ("The word is Centre.", ["CENTRE"], False, 1),
        ("cent re", ["centre"], False, 0),
        ("two\nlines", ["two lines"], False, 1),
        ("a b", ["x", "a b"], False, 1),
        ("", ["a"], False, 0),
        ("centre", ["centres"], False, 0),
        ("12", ["1"], False, 1),  # contained is enough
        (" a ", ["a "], False, 1),
        ("İ", ["i"], False, 1),
        (r"\frac { a } { b }", [r"\frac{a}{b}"], True, 1),
        (r"x = \frac{a}{b}", [r"\frac { a } { b }"], True, 1),
        ("a\nb", ["a b"], True, 1),
        ("X ^ 2", ["x ^ 2"], True, 0),  # of formulas case counts
        ("x^2", ["x^3"], True, 0),
        ("a\tb", ["ab"], True, 0),  # only spaces and line ends are dropped
    ],
)
def test_ocrbench_wants_the_reference_contained(text: str, references: list[str], is_formula: bool, value: int) -> None:
    assert contains_answer(text, references, is_formula) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yes", "yes"),
        ("no", "no"),
        ("Yes.", "yes"),
        ("No, it is not.", "no"),
        ("YES, there is.", "yes"),
        ("yes and no", None),
        ("Maybe", None),
        ("", None),
        ("Nothing", None),
        ("eyes", None),
        ("yesterday", None),
        ("The answer is no", "no"),
        ("yes/no", None),
        ("(yes)", "yes"),
        ("yes yes", "yes"),
        ("There is no dog.", "no"),
        ("non", None),
    ],
)
def test_yes_or_no_is_said_by_one_of_the_words(text: str, said: str | None) -> None:
    assert said_yes_or_no(text) == said


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("A", "A"),
        ("B.", "B"),
        ("(C)", "C"),
        ("D: fish", "D"),
        ("The answer is B", "B"),
        ("The correct answer is **C**. Here is a long reason why that is so", "C"),
        ("**B**", "B"),
        ("B as it barks", "B"),  # among the last four words
        ("B as it barks loudly", None),
        ("A, B or Z: the answer is B, so say I and so it is", "B"),
        ("The answer is b.", "B"),
        ("the correct answer is **c**, because it has feathers and can fly", "C"),
        ("ANSWER IS a", "A"),
        ("The answer is a dog", "B"),  # an article
        ("The answer is B, neither A nor C", "B"),
        ("The answer is D\u56e0\u4e3a\u5b83\u5728 A B", "D"),  # Chinese needs no space after the letter
        ("the answer is blue or dog", "B"),  # no letter: "dog" is quoted
        ("the answer is unclear", None),
        ("B because it barks very loudly at night", None),  # the letter is too far from the end
        ("A B", None),
        ("A or B", None),
        ("b", None),  # letters are upper case
        ("dog", "B"),
        ("It is a Dog.", "B"),
        ("cat and dog", None),
        ("horse", None),
        ("", None),
        ("E", None),
        ("Z", None),
        ("Z dog", None),  # says that none fits
        ("I can't process this file. A", None),
        ("the animal is surely a dog, as one can see", None),  # longer than twice all options
        ("Apple", None),
        ("[D]", "D"),
    ],
)
def test_an_option_is_chosen_by_its_letter_or_its_text(text: str, chosen: str | None) -> None:
    assert chosen_option(text, ANIMALS) == chosen


@pytest.mark.parametrize(
    ("text", "references", "is_met"),
    [
        ("24/7", ["24/7"], True),
        ("It is 24/7.", ["24/7"], True),
        ("-6", ["-6"], True),
        ("6", ["-6"], False),
        ("Transformer", ["transformer"], True),
        ("3.43", ["24/7", "3.43"], True),
        ("A", ["24/7"], False),
        ("B", ["24/7"], False),
        ("", ["24/7"], False),
        ("other answers", ["24/7"], False),
        ("24/7 or other answers", ["24/7"], False),
        ("42", ["2"], True),  # quoted is enough, as in VLMEvalKit
        ("x" * 60 + "24/7", ["24/7"], False),  # too long to be a quotation
        ("the wheel turns 7", ["7"], True),
        ("seven", ["7"], False),
    ],
)
def test_an_open_question_wants_the_reference_quoted(text: str, references: list[str], is_met: bool) -> None:
    assert meets_open_question(text, references) is is_met


@pytest.mark.parametrize(
    ("text", "references", "value"),
    [
        ("Cat", ["cat"], 1),
        (" cat\n", ["dog", "cat "], 1),
        ("the cat", ["cat"], 0),
        ("a  b", ["a b"], 0),
        ("", ["a"], 0),
    ],
)
def test_stripped_match_forgives_case_and_ends(text: str, references: list[str], value: int) -> None:
    assert stripped_match(text, references) == value


def asked(task: str, text: str, *references: str, kind: str = "", **fields: object) -> Prediction:
    sample = Sample(None, (Turn("?"),), task, kind or task, references[0], answers=references, **fields)  # type: ignore[arg-type]
    return Prediction(sample, text)


def test_every_rule_is_a_task_with_metrics_and_a_measure() -> None:
    assert set(RULES) <= TASK_METRICS.keys() == MEASURES.keys()
    assert set(RULE_OF_SET.values()) <= set(RULES)


@pytest.mark.parametrize("task", [task for task in TASK_METRICS if task != "rec"])
def test_each_answer_has_all_metrics_of_its_task(task: str) -> None:
    prediction = asked(task, "yes", *["yes"] * 4)
    assert tuple(measure(prediction)) == TASK_METRICS[task]
    assert all(0 <= value <= 1 for value in measure(prediction).values())
    better = paired_differences([asked(task, "nonsense", *["yes"] * 4)], [prediction])[task]
    assert better[TASK_METRICS[task][0]].value == 1


def test_benchmarks_are_means_over_questions_not_over_kinds() -> None:
    right, wrong = asked("anls", "a", "a", kind="few"), asked("anls", "a", "zz", kind="many")
    scores = score([right, wrong, wrong, wrong])["anls"]
    assert {name: (each.value, each.count) for name, each in scores.items()} == {
        "anls": (0.25, 4), "anls/few": (1.0, 1), "anls/many": (0.0, 3),
    }  # fmt: skip


def test_formulas_of_ocrbench_are_known_by_their_category() -> None:
    text, reference = r"\frac {a} {b}", r"\frac{a}{b}"
    formula = asked("ocrbench", text, reference, kind="Handwritten Mathematical Expression Recognition")
    assert measure(formula) == {"contains": 1.0}
    assert measure(asked("ocrbench", text, reference, kind="Handwriting Recognition")) == {"contains": 0.0}


def test_options_decide_how_a_choice_is_read() -> None:
    assert measure(asked("multiple_choice", "B", "B", options=ANIMALS)) == {"accuracy": 1.0, "parse_rate": 1.0}
    assert measure(asked("multiple_choice", "bark", "B", options=ANIMALS)) == {"accuracy": 0.0, "parse_rate": 0.0}
    assert measure(asked("multiple_choice", "B", "24/7")) == {"accuracy": 0.0, "parse_rate": 1.0}
    assert measure(asked("multiple_choice", " ", "24/7")) == {"accuracy": 0.0, "parse_rate": 0.0}


def test_what_is_undecided_is_neither_yes_nor_no() -> None:
    assert measure(asked("yes_no", "perhaps", "no")) == {"accuracy": 0.0, "parse_rate": 0.0}


def test_yes_has_precision_recall_and_f1() -> None:
    """2 hits, 4 true, 3 said."""
    truth, said = ("yes", "yes", "yes", "yes", "no"), ("Yes", "yes", "hm", "no", "yes")
    scores = score([asked("yes_no", text, answer) for text, answer in zip(said, truth, strict=True)])["yes_no"]
    values = [scores[name].value for name in ("accuracy", "parse_rate", "precision", "recall", "f1")]
    assert values == pytest.approx([0.4, 0.8, 2 / 3, 1 / 2, 4 / 7])
    assert all(scores[name].low <= scores[name].value <= scores[name].high for name in ("precision", "recall", "f1"))


def test_scores_of_yes_are_zero_where_nobody_says_it() -> None:
    none = np.zeros(3, np.bool_)
    assert yes_scores(none, none, np.arange(3)) == {"precision": (0, 0, 0), "recall": (0, 0, 0), "f1": (0, 0, 0)}


def test_a_rotated_question_counts_only_when_all_its_rotations_are_right() -> None:
    answers = [("1", "A"), ("1", "A"), ("2", "A"), ("2", "B"), ("3", "A")]
    predictions = [asked("multiple_choice", text, "A", options=ANIMALS, group=group) for group, text in answers]
    scores = score(predictions)["multiple_choice"]
    assert (scores["accuracy"].value, scores["accuracy"].count) == (0.8, 5)
    assert scores["circular_accuracy"].value == pytest.approx(2 / 3) and scores["circular_accuracy"].count == 3
    assert "circular_accuracy" not in paired_differences(predictions, predictions)["multiple_choice"]


def test_groups_need_not_stand_together() -> None:
    (value, low, high), count = all_right([True, False, True, True], ["a", "b", "b", "a"])
    assert (value, count) == (0.5, 2) and low < value < high


def test_too_few_references_for_vqa_accuracy_are_told() -> None:
    with pytest.raises(DataError, match="has 3 reference answers, task vqa_accuracy wants those of 4"):
        check_scorable([asked("vqa_accuracy", "", "a", "b", "c").sample])


@pytest.mark.parametrize(
    ("prediction", "told"),
    [
        (asked("yes_no", "", "Yes"), "its answer is 'Yes', expected one of yes, no"),
        (asked("multiple_choice", "", "E", options=ANIMALS), "its answer is 'E', expected one of A, B, C, D"),
    ],
)
def test_references_that_no_answer_could_meet_are_told(prediction: Prediction, told: str) -> None:
    with pytest.raises(DataError, match=told):
        check_scorable([prediction.sample])


def test_unscored_questions_name_the_way_out() -> None:
    with pytest.raises(DataError, match="not scored here: write the answers with --predictions"):
        check_scorable([asked(UNSCORED, "", "a").sample])

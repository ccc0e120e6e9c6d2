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
        ("The Red Car", "red car"), ("a  an the", ""), ("Two dogs.", "2 dogs"), ("ten", "10"), ("none", "0"),
        ("dont", "don't"), ("couldnt've", "couldn't've"), ("yall'd've", "y'all'd've"), ("somebody'd", "somebodyd"),
        ("U.S.A.", "usa"), ("3.5", "3.5"), ("St. John", "st john"), ("1,000", "1000"), ("e-mail", "e mail"),
        ("1,000 (a-b)", "1000 ab"),  # the number with a comma drops all marks
        ("c-d(-b", "c d b"),  # beside a space in the raw answer
        ("a)b c)\nd", "ab c d"),  # a line end is a space
        ("yes, it is!", "yes it is"), ("no - way", "no way"), ("line\nbreak\ttab", "line break tab"),
        ("it's", "it's"), ("", ""),
    ],
)  # fmt: skip
def test_answers_are_normalized_as_in_the_vqa_evaluation(text: str, leveled: str) -> None:
    assert leveled_answer(text) == leveled


def people(*answers: tuple[str, int]) -> list[str]:
    """Ten references: each answer so many times."""
    return [answer for answer, count in answers for _ in range(count)]


@pytest.mark.parametrize(
    ("text", "references", "value"),
    [
        ("red", people(("red", 10)), 1.0), ("red", people(("red", 4), ("blue", 6)), 1.0),
        ("red", people(("red", 3), ("blue", 7)), 0.9),  # three leave-outs see 2 of 3, seven see 3 of 3
        ("red", people(("red", 2), ("blue", 8)), 0.6),  # two see 1/3, eight see 2/3
        ("red", people(("red", 1), ("blue", 9)), 0.3),  # one sees 0, nine see 1/3
        ("red", people(("blue", 10)), 0.0), ("The Red.", people(("red", 10)), 1.0), ("two", people(("2", 10)), 1.0),
        ("2", people(("two", 5), ("2", 5)), 1.0), ("1000", people(("1,000", 10)), 1.0),
        ("dont walk", people(("don't walk", 10)), 1.0), ("red car", people(("red", 10)), 0.0),
        ("", people(("red", 10)), 0.0), ("", people(("the", 1), ("red", 9)), 0.3),  # an article becomes nothing
        ("red", ["red"] * 4, 1.0), ("red", ["red"] * 3, 2 / 3), ("red", ["red"], 0.0),  # of three, each sees two others
    ],
)  # fmt: skip
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
        ("invoice", ["invoice"], 1.0), ("Invoice", ["invoice"], 1.0), ("invoise", ["invoice"], 6 / 7),
        ("in voice", ["invoice"], 7 / 8), ("kitten", ["sitting"], 4 / 7), ("$1,200", ["$1,200.00"], 2 / 3),
        ("abcd", ["abxx"], 0.5), ("abcde", ["abxxx"], 0.0), ("abc", ["axx"], 0.0),  # one half counts, 0.4 does not
        ("12 May 1999", ["12 may 1999", "May 12"], 1.0), ("May 13", ["12 may 1999", "May 12"], 5 / 6),
        ("", ["abc"], 0.0), ("", [""], 1.0), ("abc", [""], 0.0),
        ("a  b", ["a b"], 1.0), ("ab      ", ["ab"], 1.0),  # repeated spaces do not count
        ("ab      ", ["ac"], 7 / 8),  # but the divisor is the length of the raw text
    ],
)  # fmt: skip
def test_anls(text: str, references: list[str], value: float) -> None:
    assert anls(text, references) == pytest.approx(value)


def test_an_answer_far_longer_than_the_reference_is_not_compared_letter_by_letter() -> None:
    """An answer of a million letters in a file of answers kept the comparison busy for a day."""
    assert anls("x" * 10**6, ["x" * 1000]) == 0
    assert anls("x" * 10, ["x" * 4]) == 0 and anls("x" * 10, ["x" * 5]) == 0.5


@pytest.mark.parametrize(
    ("value", "pairs"),
    [
        (1, [("100", "100"), ("105", "100"), ("95", "100"), ("-100", "-104"), ("1e2", "100"), (" 100 ", "100"),
             (" Yes\n", "yes"), ("Yes", "yes"), ("5%", "0.05"), ("51%", "50%"), ("%", "%"), ("0", "0"),
             ("nan", "nan")]),
        (0, [("105.1", "100"), ("94.9", "100"), ("-100", "100"), ("-100", "-50"), ("5%", "5"), ("yes.", "yes"),
             ("100 dollars", "100"), ("nan", "100"), ("inf", "100"), ("", "100"),
             ("0.0", "0")]),  # nothing is within 5 % of zero: a text
    ],
)  # fmt: skip
def test_relaxed_accuracy(value: int, pairs: list[tuple[str, str]]) -> None:
    for text, reference in pairs:
        assert relaxed_accuracy(text, [reference]) == value, text
        assert relaxed_accuracy(text, ["somewhere else", reference]) == value, text


@pytest.mark.parametrize(
    ("is_formula", "value", "pairs"),
    [
        (False, 1, [("CENTRE", "centre"), ("The word is Centre.", "CENTRE"), ("two\nlines", "two lines"), ("12", "1"),
                    (" a ", "a "), ("İ", "i")]),
        (False, 0, [("cent re", "centre"), ("", "a"), ("centre", "centres")]),
        (True, 1, [(r"\frac { a } { b }", r"\frac{a}{b}"), (r"x = \frac{a}{b}", r"\frac { a } { b }"),
                   ("a\nb", "a b")]),
        # Of formulas case counts, and only spaces and line ends are dropped.
        (True, 0, [("X ^ 2", "x ^ 2"), ("x^2", "x^3"), ("a\tb", "ab")]),
    ],
)  # fmt: skip
def test_ocrbench_wants_a_reference_contained(is_formula: bool, value: int, pairs: list[tuple[str, str]]) -> None:
    for text, reference in pairs:
        assert contains_answer(text, ["not this", reference], is_formula) == value, text


@pytest.mark.parametrize(
    ("said", "texts"),
    [
        ("yes", ["Yes", "Yes.", "YES, there is.", "(yes)", "yes yes"]),
        ("no", ["no", "No, it is not.", "The answer is no", "There is no dog."]),
        (None, ["yes and no", "yes/no", "Maybe", "", "Nothing", "eyes", "yesterday", "non"]),
    ],
)
def test_yes_or_no_is_said_by_one_of_the_words(said: str | None, texts: list[str]) -> None:
    assert [said_yes_or_no(text) for text in texts] == [said] * len(texts)


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("A", "A"), ("B.", "B"), ("(C)", "C"), ("D: fish", "D"), ("**B**", "B"), ("[D]", "D"), ("The answer is B", "B"),
        ("The correct answer is **C**. Here is a long reason why that is so", "C"),
        ("B as it barks", "B"), ("B as it barks loudly", None),  # among the last four words, and not
        ("B because it barks very loudly at night", None),
        ("A, B or Z: the answer is B, so say I and so it is", "B"),
        ("The answer is b.", "B"), ("ANSWER IS a", "A"), ("The answer is a dog", "B"),  # "a" may be an article
        ("the correct answer is **c**, because it has feathers and can fly", "C"),
        ("The answer is B, neither A nor C", "B"),
        ("The answer is D\u56e0\u4e3a\u5b83\u5728 A B", "D"),  # Chinese needs no space after the letter
        ("the answer is blue or dog", "B"), ("the answer is unclear", None),  # no letter: "dog" is quoted
        ("A B", None), ("A or B", None), ("b", None), ("E", None), ("Apple", None),  # letters are upper case
        ("dog", "B"), ("It is a Dog.", "B"), ("cat and dog", None), ("horse", None), ("", None),
        ("Z", None), ("Z dog", None),  # says that none fits
        ("I can't process this file. A", None),
        ("the animal is surely a dog, as one can see", None),  # longer than twice all options
    ],
)  # fmt: skip
def test_an_option_is_chosen_by_its_letter_or_its_text(text: str, chosen: str | None) -> None:
    assert chosen_option(text, ANIMALS) == chosen


@pytest.mark.parametrize(
    ("is_met", "pairs"),
    [
        (True, [("24/7", "24/7"), ("It is 24/7.", "24/7"), ("-6", "-6"), ("Transformer", "transformer"),
                ("3.43", "3.43"), ("the wheel turns 7", "7"), ("42", "2")]),  # quoted is enough, as in VLMEvalKit
        (False, [("6", "-6"), ("A", "24/7"), ("B", "24/7"), ("", "24/7"), ("other answers", "24/7"), ("seven", "7"),
                 ("24/7 or other answers", "24/7"), ("x" * 60 + "24/7", "24/7")]),  # too long to be a quotation
    ],
)  # fmt: skip
def test_an_open_question_wants_a_reference_quoted(is_met: bool, pairs: list[tuple[str, str]]) -> None:
    for text, reference in pairs:
        assert meets_open_question(text, [reference]) is is_met, text
        assert meets_open_question(text, ["a reference that is not met", reference]) is is_met, text


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
def test_stripped_match_ignores_case_and_ends(text: str, references: list[str], value: int) -> None:
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


@pytest.mark.parametrize(
    ("prediction", "message"),
    [
        (asked("vqa_accuracy", "", "a", "b", "c"), "has 3 reference answers, task vqa_accuracy wants those of 4"),
        (asked("yes_no", "", "Yes"), "its answer is 'Yes', expected one of yes, no"),
        (asked("multiple_choice", "", "E", options=ANIMALS), "its answer is 'E', expected one of A, B, C, D"),
        (asked("anls", "", "a", "x" * 2001), "has a reference of 2001 characters, at most 2000 are compared letter by"),
        (asked(UNSCORED, "", "a"), "not scored here: write the answers with --predictions"),
    ],
)
def test_questions_that_cannot_be_scored_say_why(prediction: Prediction, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_scorable([prediction.sample])

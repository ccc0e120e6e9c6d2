"""Reference: our rules and a second reading of VLMEvalKit's agree on answers put together at random."""

import random
from collections.abc import Iterator

from tests.reference import vlmevalkit_rules as theirs
from vlmdeploy.score.choices import chosen_option, said_yes_or_no
from vlmdeploy.score.text_rules import vqa_accuracy

WORDS = """
A B. (C) D: **B** E Z a b c the an red Red blue cat Dog dog, bird yes Yes, NO no. No! it is not unable to determine two
2 2.5 1,000 1000 none ten 50% $5 km/h e-mail (a) [x] 'hi' U.S.A. St. ? - -- ... / or and
"""
PIECES = WORDS.split()
SETS = (
    {"A": "cat", "B": "dog"},
    {"A": "Yes", "B": "No", "C": "Unable to determine"},
    {"A": "1", "B": "12", "D": "red"},
)


def answers(count: int) -> Iterator[str]:
    """Texts of up to eight pieces, joined by white space or nothing."""
    rng = random.Random(0)
    for _ in range(count):
        pieces = rng.choices(PIECES, k=rng.randint(0, 8))
        yield "".join(piece + rng.choice((" ", " ", " ", "\n", "")) for piece in pieces)


def test_choices_agree() -> None:
    chosen = set()
    for text in answers(4000):
        for options in SETS:
            expected = theirs.choice(text, options)
            expected = theirs.quoted(text, options) if expected == "by text" else expected
            assert chosen_option(text, tuple(options.items())) == expected, text
            chosen.add(expected)
    assert chosen == {None, "A", "B", "C", "D"}


def test_yes_and_no_agree() -> None:
    found = [(said_yes_or_no(text), theirs.yes_or_no(text), text) for text in answers(4000)]
    assert [each for each in found if each[0] != each[1]] == []
    assert {each[0] for each in found} == {None, "yes", "no"}


def test_vqa_accuracies_agree() -> None:
    texts = list(answers(4000))
    values = []
    for text in texts:
        people = [text.lower()] * (len(text) % 5) + texts[:9] + [f"the {text}"]
        values.append(vqa_accuracy(text, people))
        assert abs(values[-1] - theirs.vqa_accuracy(text, people)) < 1e-12, text
    assert min(values) < 0.1 and max(values) == 1

"""Normalizes short answers as VQA's evaluation does: punctuation, articles, number words, contractions.

Follows the official VQA evaluation (Antol et al. 2015, vqaEvaluation/vqaEval.py) as VLMEvalKit uses it for TextVQA
(vlmeval/smp/misc.py process_punctuation, vlmeval/dataset/utils/vqa_eval.py process_answer).
"""

import re

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = frozenset(("a", "an", "the"))
NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBER_WORDS.split())}
# Without their apostrophe, these get it back.
WITH_ONE_APOSTROPHE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd
it'll ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't should've shouldn't somebody'll
somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'll
they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll
who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
# Of these, each spelling that lacks one apostrophe is known.
WITH_SEVERAL_APOSTROPHES = """
couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've someone'd've
something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'd've y'all'll you'd've
"""
NUMBER_WITH_COMMA = re.compile(r"\d,\d")
LONE_PERIOD = re.compile(r"(?<!\d)\.(?!\d)")


def _contractions() -> dict[str, str]:
    known = {word.replace("'", ""): word for word in WITH_ONE_APOSTROPHE.split()}
    for word in WITH_SEVERAL_APOSTROPHES.split():
        places = [place for place, letter in enumerate(word) if letter == "'"]
        known.update({word[:place] + word[place + 1 :]: word for place in places})
    return known | {"somebody'd": "somebodyd"}  # as in the official table


CONTRACTIONS = _contractions()


def without_punctuation(text: str) -> str:
    """Drop punctuation marks next to a space, and replace those between letters with a space.

    If the text has a number with a comma, drop all. Periods next to a digit stay.
    """
    drop_all = NUMBER_WITH_COMMA.search(text) is not None
    result = text
    for mark in PUNCTUATION:
        is_loose = drop_all or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if is_loose else " ")
    return LONE_PERIOD.sub("", result)


def leveled_answer(text: str) -> str:
    """Normalize an answer: lower case, no punctuation, no articles, digits for number words up to ten."""
    plain = without_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = (NUMBERS.get(word, word) for word in plain.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)

"""VLMEvalKit's rules for choices, yes or no, and VQA accuracy, written a second time, slowly, from what they do (as of
August 2026), not from our code: `vlmeval/utils/matching_util.py`, `yorn.py` and `vqa_eval.py` are the originals."""

import string

TO_NINE = "zero one two three four five six seven eight nine"


def choice(text: str, options: dict[str, str]) -> str | None:
    """The letter that the text names; "by text" where no letter decides. The rule "answer is X" is left out."""
    for mark in ".()[],:;!*#{}":
        text = " ".join(text.split(mark))
    words = text.split()
    present = {letter for letter in options if words.count(letter)}
    if len(present) == 1:
        (letter,) = present
        behind = len(words) - 1 - words.index(letter)
        if behind <= 3:
            return letter
    if not present and "Z" in words:
        return None
    return "by text"


def quoted(text: str, options: dict[str, str]) -> str | None:
    """The only option whose text occurs, unless the answer is longer than all options twice."""
    found = {letter for letter, content in options.items() if text.lower().find(content.lower()) >= 0}
    is_short = len(text) <= 2 * sum(map(len, options.values()))
    return found.pop() if len(found) == 1 and is_short else None


def flat(text: str) -> str:
    """Text without punctuation, as VQA's evaluation sees it; loose is judged on the text as it came."""
    triples = zip(text, text[1:], text[2:], strict=False)
    with_comma = any(a.isdecimal() and b == "," and c.isdecimal() for a, b, c in triples)
    pieces = []
    for character in text:
        if character in ';/[]"{}()=+\\_-><@`,?!':
            loose = f" {character}" in text or f"{character} " in text
            pieces.append("" if loose or with_comma else " ")
        else:
            pieces.append(character)
    joined = "".join(pieces)
    sides = zip(f" {joined}", joined, f"{joined} "[1:], strict=False)
    return "".join(c for before, c, after in sides if c != "." or before.isdecimal() or after.isdecimal())


def yes_or_no(text: str) -> str | None:
    """The one of the two words that is said alone."""
    said = {"yes", "no"} & set(flat(text.lower()).split())
    return said.pop() if len(said) == 1 else None


def vqa_accuracy(text: str, references: list[str]) -> float:
    """Mean over people of min(1, others who agree / 3); texts without contractions to mend."""
    digits = {"none": "0", "ten": "10"} | dict(zip(TO_NINE.split(), string.digits, strict=True))

    def level(answer: str) -> list[str]:
        words = flat(answer.translate({9: " ", 10: " "}).strip()).lower().split()
        return [digits.get(word, word) for word in words if word not in ("a", "an", "the")]

    agree = [level(reference) == level(text) for reference in references]
    scores = [min(1.0, sum(agree[:place] + agree[place + 1 :]) / 3) for place in range(len(agree))]
    return sum(scores) / len(scores)

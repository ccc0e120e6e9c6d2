"""Which choice a free text makes: yes or no, or one of the lettered options.

Follows VLMEvalKit (vlmeval/dataset/utils/yorn.py YOrN_Extraction, vlmeval/utils/matching_util.py can_infer_option and
can_infer_text) without its judge model: undecidable answers are wrong.
"""

import re
from collections.abc import Sequence

from vlmdeploy.score.answer_text import without_punctuation

Options = Sequence[tuple[str, str]]
"""(letter, text) of each."""

BRACKETING = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
LAST_WORDS = 4  # a letter among other words counts only near the end
# A letter of any case after "answer is" without a Latin letter behind it; "a" before a word is an article.
STATED = re.compile(r"(?i:answer\s+is)\s+\**([A-Zb-z]|a(?!\s+\w))(?![A-Za-z])")
NO_OPTION = "Z"  # "none of them", for models that were prompted so
REFUSALS = (
    "Failed to obtain answer via API",
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
OTHER_ANSWERS = "other answers"  # VLMEvalKit's second option for questions without options


def said_yes_or_no(text: str) -> str | None:
    """ "yes" or "no" if exactly one of the words occurs, else None."""
    words = set(without_punctuation(text.lower()).split())
    said = [word for word in ("yes", "no") if word in words]
    return said[0] if len(said) == 1 else None


def chosen_option(text: str, options: Options) -> str | None:
    """The letter of the only option that a text names by letter or quotes; else None."""
    if any(refusal in text for refusal in REFUSALS):
        return None
    letters = [letter for letter, _ in options]
    chosen = _named_letter(text, letters) or _quoted_option(text, options)
    return chosen if chosen in letters else None


def _named_letter(text: str, letters: Sequence[str]) -> str | None:
    words = text.translate(BRACKETING).split()
    named = [letter for letter in letters if letter in words]
    if len(named) == 1 and words.index(named[0]) >= len(words) - LAST_WORDS:
        return named[0]
    if not named and NO_OPTION in words:
        return NO_OPTION
    stated = STATED.search(text)
    return stated[1].upper() if stated is not None and stated[1].upper() in letters else None


def _quoted_option(text: str, options: Options) -> str | None:
    text = text.lower()
    if len(text) > 2 * sum(len(content) for _, content in options):
        return None  # long texts quote options by chance
    quoted = [letter for letter, content in options if content.lower() in text]
    return quoted[0] if len(quoted) == 1 else None


def meets_open_question(text: str, references: Sequence[str]) -> bool:
    """Whether the answer to a question without options quotes a reference.

    VLMEvalKit turns such questions of MMMU into a choice between the reference and "Other Answers" (multiple_choice.py,
    MMMU_preproc). Unlike there, a bare "A" does not mean the reference, and each of several references counts.
    """
    pairs = [(("right", reference), ("wrong", OTHER_ANSWERS)) for reference in references]
    return any(_quoted_option(text, pair) == "right" for pair in pairs)

"""Scores of a free-text answer against its references, 0..1, by the rules of public VQA benchmarks.

Each function is one rule and names its source. `choices` has the rules for choices.
"""

import math
from collections.abc import Sequence

from vlmdeploy.score.answer_text import leveled_answer

AGREEING_PEOPLE = 3  # this many other people make an answer fully right
ANLS_THRESHOLD = 0.5
CHART_TOLERANCE = 0.05


def vqa_accuracy(text: str, references: Sequence[str]) -> float:
    """min(1, agreeing references / 3), averaged over leaving out each reference once.

    Both sides are normalized first. TextVQA and VQAv2 have ten references; with fewer than four nothing reaches 1.
    Source: Antol et al. 2015 (VQA), section 4; VLMEvalKit, vqa_eval.py, method "vqa_score".
    """
    answer = leveled_answer(text)
    agrees = [leveled_answer(reference) == answer for reference in references]
    total = sum(agrees)
    return sum(min(1.0, (total - agreed) / AGREEING_PEOPLE) for agreed in agrees) / len(references)


def anls(text: str, references: Sequence[str]) -> float:
    """Normalized Levenshtein similarity to the nearest reference; 0 below one half.

    Ignores case and repeated spaces; the divisor is the length of the longer raw text.
    Source: Biten et al. 2019 (ST-VQA), equation 1, threshold 0.5; used by DocVQA and InfographicVQA.
    """
    similarity = max(1 - _relative_distance(text, reference) for reference in references)
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


def _relative_distance(text: str, reference: str) -> float:
    longest = max(len(text.upper()), len(reference.upper()))
    a, b = _plain(text), _plain(reference)
    if abs(len(a) - len(b)) > (1 - ANLS_THRESHOLD) * longest:
        return 1.0  # the difference in length alone is too far; counting takes the product of both lengths
    return edit_distance(a, b) / longest if longest else 0.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's distance: the fewest insertions, deletions and replacements of one character."""
    distances = list(range(len(b) + 1))  # from nothing of a to each beginning of b
    for row, character in enumerate(a, 1):
        diagonal, distances[0] = row - 1, row
        for column, other in enumerate(b, 1):
            replaced = diagonal + (character != other)
            diagonal = distances[column]
            distances[column] = min(replaced, diagonal + 1, distances[column - 1] + 1)
    return distances[-1]


def relaxed_accuracy(text: str, references: Sequence[str]) -> float:
    """1 if a number is within 5 % of a reference, or a text equals one ignoring case; else 0.

    "12%" is the number 0.12. A reference of 0 is compared as text.
    Source: Masry et al. 2022 (ChartQA), section 5.1; VLMEvalKit, vqa_eval.py, relaxed_correctness.
    """
    return float(any(_is_near(text.strip(), reference) for reference in references))


def _is_near(text: str, reference: str) -> bool:
    value, expected = _number(text), _number(reference)
    if value is not None and expected:
        return abs(value - expected) / abs(expected) <= CHART_TOLERANCE
    return text.lower() == reference.lower()


def _number(text: str) -> float | None:
    """Parse a number; None for other text, including "nan" and "inf"."""
    try:
        value = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def contains_answer(text: str, references: Sequence[str], is_formula: bool = False) -> float:
    """1 if the answer contains a reference, else 0: ignoring case, or, for a formula, spaces.

    Source: Liu et al. 2023 (OCRBench), section 3; VLMEvalKit, OCRBench.evaluate.
    """
    flat = _without_spaces if is_formula else _one_line
    return float(any(flat(reference) in flat(text) for reference in references))


def _without_spaces(text: str) -> str:
    return text.strip().replace("\n", "").replace(" ", "")


def _one_line(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def stripped_match(text: str, references: Sequence[str]) -> float:
    """1 if the answer equals a reference, ignoring case and outer white space, else 0.

    Source: VLMEvalKit, vqa_eval.py, method "accuracy", which OCRVQA and GQA use.
    """
    return float(any(text.strip().lower() == reference.strip().lower() for reference in references))

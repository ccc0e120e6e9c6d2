"""Questions of VLMEvalKit's TSV files (https://github.com/open-compass/VLMEvalKit): their scoring rule and prompts.

Columns: index, image or image_path, question, answer (a text or a Python list literal), the options A, B, C, ..., hint,
category, split. Prompts are VLMEvalKit's, word for word: ImageVQADataset, ImageMCQDataset and, in the style "cogvlm",
its vlm/cogvlm.py.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from vlmdeploy.data.questions import UNSCORED, QuestionOptions, find_picture
from vlmdeploy.data.samples import Picture, Sample
from vlmdeploy.data.stored_picture import StoredPicture
from vlmdeploy.data.tsv_table import Table, TableRow, literal_list
from vlmdeploy.errors import DataError
from vlmdeploy.runtime.chat import Turn

RULE_OF_SET = {
    **dict.fromkeys(("MME", "POPE", "HallusionBench", "AMBER"), "yes_no"),
    **dict.fromkeys(("MMBench", "CCBench", "MMMU", "MMStar", "SEEDBench", "SEEDBench2"), "multiple_choice"),
    **dict.fromkeys(("ScienceQA", "AI2D", "RealWorldQA", "BLINK", "MMT-Bench"), "multiple_choice"),
    "TextVQA": "vqa_accuracy",
    **dict.fromkeys(("DocVQA", "InfoVQA"), "anls"),
    "ChartQA": "relaxed_accuracy",
    "OCRBench": "ocrbench",
    **dict.fromkeys(("OCRVQA", "GQA"), "exact_match"),
}
NOT_SCORED_HERE = {
    **dict.fromkeys(("MMVet", "MM-Vet", "LLaVABench", "MathVista", "MathVerse", "MMLongBench"), "by a judge model"),
    "OCRBench_v2": "by many rules of its own",
    **dict.fromkeys(("COCO", "NoCaps", "Flickr30k"), "by BLEU and CIDEr"),
    **dict.fromkeys(("RefCOCO", "RefCOCO+", "RefCOCOg"), "by boxes, which are read from JSONL or JSON"),
}
NO_RULE = "none"
SHORT_ANSWER_RULES = ("vqa_accuracy", "anls", "relaxed_accuracy", "exact_match")
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
YES_OR_NO = "\nPlease answer yes or no."  # AMBER's questions lack it
CHOOSE = "Please select the correct answer from the options above. \n"
CHOOSE_LETTER = "\nAnswer with the option's letter from the given choices directly."
CHOOSE_LETTER_ZH = "\n请直接回答选项字母。"
SHORT_ANSWER_COGVLM = "\nShort Answer."
CHINESE = re.compile("[\u4e00-\u9fff]")
IMAGE_MARK = re.compile(r"<image \d>")
ROTATED = re.compile("[0-9]{7,15}")
ROTATION = 10**6  # added to the index for each rotation of a question


@dataclass(frozen=True)
class QuestionSet:
    """The rows to ask, their rule and why it was chosen. unscored: why the rows cannot be scored; None: they can."""

    table: Table
    rows: tuple[TableRow, ...]
    rule: str
    why: str
    unscored: str | None
    options: QuestionOptions
    kind_column: str | None
    is_circular: bool

    def description(self) -> str:
        """One line for the user."""
        parts = [f"VLMEvalKit TSV {self.table.path}", f"{len(self.rows)} questions", f"rule {self.rule} ({self.why})"]
        if self.options.split is not None:
            parts.append(f'split "{self.options.split}"')
        if self.table.without_picture:
            parts.append(f"{self.table.without_picture} rows without a picture left out")
        if self.unscored is not None:
            parts.append(f"not scored: {self.unscored}")
        return ", ".join(parts)

    def items(self) -> Iterator[Callable[[], Sample]]:
        """One function per row that returns its sample, or raises DataError; the next row can still be read."""
        return (partial(_sample, self, row) for row in self.rows)


def plan_questions(table: Table, options: QuestionOptions) -> QuestionSet:
    """Choose rows and rule. Raises DataError if the split has no rows, or a multiple choice has no options."""
    rows = table.rows if options.split is None else _of_split(table, options.split)
    rule, why = _choose_rule(table.path.stem, rows, options.rule)
    if rule == "multiple_choice" and not any(map(_options, rows)) and not _is_mmmu(table):
        raise DataError(f"{table.path}: rule {rule} ({why}), but no row has options; expected columns A, B, C, ...")
    unscored, kinds = _why_unscored(table.path.stem, rows, options.rule), _kind_column(rule, rows)
    is_circular = rule == "multiple_choice" and _has_rotations(rows)
    return QuestionSet(table, rows, rule, why, unscored, options, kinds, is_circular)


def _of_split(table: Table, split: str) -> tuple[TableRow, ...]:
    rows = tuple(row for row in table.rows if row.text("split") == split)
    if not rows:
        known = ", ".join(sorted({row.text("split") or "" for row in table.rows} - {""})) or "no column split"
        raise DataError(f'{table.path}: has no rows of split "{split}"; it has: {known}')
    return rows


def _choose_rule(name: str, rows: tuple[TableRow, ...], asked: str | None) -> tuple[str, str]:
    """The rule and why it applies."""
    if asked is not None:
        return asked, "by --rule"
    if _by_name(NOT_SCORED_HERE, name) is not None:
        return NO_RULE, f"by the name {name}"
    known = _by_name(RULE_OF_SET, name)
    if known is not None:
        return known, f"by the name {name}"
    if any(row.text("A") is not None and row.text("B") is not None for row in rows):
        return "multiple_choice", "by its columns A and B"
    answers = {(row.text("answer") or "").strip().lower() for row in rows}
    if answers <= {"yes", "no"}:
        return "yes_no", "because all answers are yes or no"
    return "exact_match", "neither name nor columns tell another"


def _by_name(table: dict[str, str], name: str) -> str | None:
    """The entry whose key is the name or its prefix up to "_" or "-": DocVQA matches DocVQA_VAL."""
    found = (rule for key, rule in table.items() if re.match(rf"{re.escape(key)}(?![^_-])", name, re.IGNORECASE))
    return next(found, None)


def _why_unscored(name: str, rows: tuple[TableRow, ...], asked: str | None) -> str | None:
    if not any(row.text("answer") is not None for row in rows):
        return "no row has an answer"
    judged = _by_name(NOT_SCORED_HERE, name)
    return f"{name} is scored {judged}" if judged is not None and asked is None else None


def _kind_column(rule: str, rows: tuple[TableRow, ...]) -> str | None:
    """The column that divides the questions: several splits, else categories; OCRBench needs categories."""
    if rule == "ocrbench":
        return "category"
    columns = ("split", "category", "l2-category")
    return next((column for column in columns if len({row.text(column) for row in rows}) > 1), None)


def _is_mmmu(table: Table) -> bool:
    """Whether it is MMMU, which has open questions among its choices and marks in the text for its pictures."""
    return table.path.stem.upper().startswith("MMMU")


def _has_rotations(rows: tuple[TableRow, ...]) -> bool:
    indexes = {row.index for row in rows}
    return any(_group(index) != index and _group(index) in indexes for index in indexes)


def _sample(questions: QuestionSet, row: TableRow) -> Sample:
    where = f'{questions.table.path}:{row.line}: index "{row.index}"'
    options = _options(row) if questions.rule == "multiple_choice" else ()
    answers = _answers(questions, row, options, where)
    category = None if questions.kind_column is None else row.text(questions.kind_column)
    task = questions.rule if questions.unscored is None else UNSCORED
    return Sample(
        image=_image(questions, row, where),
        turns=(Turn(_prompt(questions, row, options, where)),),
        task=task,
        kind=category or task,
        answer=Counter(answers).most_common(1)[0][0] if answers else None,
        answers=answers,
        options=options,
        group=_group(row.index) if questions.is_circular else None,
        key=row.index,
    )


def _options(row: TableRow) -> tuple[tuple[str, str], ...]:
    cells = ((letter, row.text(letter)) for letter in string.ascii_uppercase)
    return tuple((letter, text) for letter, text in cells if text is not None)


def _answers(
    questions: QuestionSet, row: TableRow, options: tuple[tuple[str, str], ...], where: str
) -> tuple[str, ...]:
    """The references. Raises DataError for one that does not fit the rule."""
    cell = (row.text("answer") or "").strip()
    if not cell:
        return ()
    if options:
        return (_found(cell, {letter: letter for letter, _ in options}, where),)
    if questions.rule == "yes_no":
        return (_found(cell, {"YES": "yes", "NO": "no"}, where),)
    listed = literal_list(cell)
    answers = (cell,) if listed is None else tuple(listed)
    if not answers or (questions.rule == "ocrbench" and not all(answer.strip() for answer in answers)):
        raise DataError(f"{where}: answer is {cell[:80]!r}, expected a text or a list of texts")
    return answers


def _found(cell: str, expected: dict[str, str], where: str) -> str:
    """The reference that a cell means, ignoring case; expected: references by their upper-case spelling."""
    if cell.upper() not in expected:
        raise DataError(f"{where}: answer is {cell[:80]!r}, expected one of {', '.join(expected.values())}")
    return expected[cell.upper()]


def _image(questions: QuestionSet, row: TableRow, where: str) -> Picture | None:
    if len(row.pictures) > 1 and not questions.options.first_picture:
        raise DataError(
            f"{where}: has {len(row.pictures)} pictures, the model takes one; validate --first-picture shows only the "
            "first, as VLMEvalKit does for such models"
        )
    picture = row.pictures[0] if row.pictures else None
    if picture is None or isinstance(picture, StoredPicture):
        return picture
    return find_picture(picture, questions.table.path.parent, questions.options.images, where)


def _group(index: str) -> str:
    """The index of the original question, if this is a rotation, else its own."""
    return str(int(index) % ROTATION) if ROTATED.fullmatch(index) else index


def _prompt(questions: QuestionSet, row: TableRow, options: tuple[tuple[str, str], ...], where: str) -> str:
    question = row.text("question")
    if question is None:
        raise DataError(f"{where}: has no question")
    style, rule = questions.options.prompt, questions.rule
    if style == "bare":
        return question
    if rule == "multiple_choice":
        hint = row.text("hint")
        if style == "cogvlm":
            return _choice_prompt_cogvlm(hint, question, options)
        prompt = _choice_prompt(hint, question, options)
        return "\n".join(IMAGE_MARK.split(prompt)) if _is_mmmu(questions.table) else prompt
    if rule == "yes_no":
        is_amber = questions.table.path.stem.upper().startswith("AMBER")
        return question + YES_OR_NO * is_amber + SHORT_ANSWER_COGVLM * (style == "cogvlm")
    return question + SHORT_ANSWER if rule in SHORT_ANSWER_RULES else question


def _choice_prompt(hint: str | None, question: str, options: tuple[tuple[str, str], ...]) -> str:
    lines = [] if hint is None else [f"Hint: {hint}\n"]
    lines.append(f"Question: {question}\n")
    if options:
        lines += ["Options:\n", *(f"{letter}. {text}\n" for letter, text in options), CHOOSE]
    return "".join(lines)


def _choice_prompt_cogvlm(hint: str | None, question: str, options: tuple[tuple[str, str], ...]) -> str:
    lines = [question, *(f"{letter}. {text}" for letter, text in options)]
    prompt = "\n".join(lines if hint is None else [hint, *lines])
    return prompt + (CHOOSE_LETTER_ZH if CHINESE.search(prompt) else CHOOSE_LETTER) + SHORT_ANSWER_COGVLM

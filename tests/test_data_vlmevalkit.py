"""Contract: VLMEvalKit's TSV files become questions with the right pictures, prompts and rules, in bounded memory; what
is wrong in one is told with file and line."""

import codecs
import csv
import json
import os
import threading
import tracemalloc
from pathlib import Path

import pytest

from tests.benchmark_files import Row, picture_cell, png, write_tsv
from tests.tiny_bundle import only_json_document, run_cli, write_text_checkpoint
from vlmdeploy.data import tsv_table
from vlmdeploy.data.questions import PromptStyle, QuestionOptions
from vlmdeploy.data.samples import Sample, choose
from vlmdeploy.data.source import open_source
from vlmdeploy.data.stored_picture import StoredPicture
from vlmdeploy.data.tsv_table import LONGEST_LITERAL, literal_list, read_rows, read_table
from vlmdeploy.errors import ConfigError, DataError
from vlmdeploy.runtime.image import load_image
from vlmdeploy.score.metrics import FORMULAS

RED = picture_cell("red")
CHOICE = {"index": 1, "image": RED, "question": "Which?", "A": "cat", "B": "dog", "answer": "B"}
OPEN = {"index": 0, "image": RED, "question": "What?", "answer": "cat"}


def samples_of(path: Path, **options: object) -> list[Sample]:
    return list(open_source(path, options=QuestionOptions(**options)).samples())  # type: ignore[arg-type]


def only_sample(path: Path, row: Row, **options: object) -> Sample:
    (sample,) = samples_of(write_tsv(path, row), **options)
    return sample


def color_of(sample: Sample) -> object:
    assert sample.image is not None
    return load_image(sample.image).getpixel((0, 0))


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_a_row_becomes_a_question_about_its_picture(tmp_path: Path, quoting: int) -> None:
    question = 'Who says "two\nlines\tand a tab"?'
    row = {**OPEN, "question": question, "answer": "['Ann', 'Bob', 'Bob']"}
    (sample,) = samples_of(write_tsv(tmp_path / "DocVQA_VAL.tsv", row, quoting=quoting))
    assert sample.turns[0].user == question + "\nAnswer the question using a single word or phrase."
    assert (sample.task, sample.key, sample.answer) == ("anls", "0", "Bob")
    assert sample.answers == sample.references == ("Ann", "Bob", "Bob")
    assert isinstance(sample.image, StoredPicture) and sample.image.read_bytes() == png("red")


@pytest.mark.parametrize("name", ["7", "validation_Architecture_and_Engineering_7"])
def test_a_short_image_cell_names_another_row(tmp_path: Path, name: str) -> None:
    rows = [{**OPEN, "image": name}, {**OPEN, "index": name, "image": picture_cell("blue")}, {**OPEN, "index": 8}]
    first, second, third = samples_of(write_tsv(tmp_path / "x.tsv", *rows))
    assert first.image == second.image != third.image
    assert [color_of(each) for each in (first, second, third)] == [(0, 0, 255), (0, 0, 255), (255, 0, 0)]


def test_the_same_picture_in_two_rows_is_one_picture(tmp_path: Path) -> None:
    first, second = samples_of(write_tsv(tmp_path / "x.tsv", OPEN, {**OPEN, "index": 5}))
    assert first.image == second.image and hash(first.image) == hash(second.image)


def test_pictures_may_be_named_by_path(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png())
    row = {"index": 0, "image_path": "a.png", "question": "What?", "answer": "cat"}
    (beside,) = samples_of(write_tsv(tmp_path / "pictures" / "x.tsv", row))
    assert beside.image == tmp_path / "pictures" / "a.png"
    elsewhere = only_sample(tmp_path / "x.tsv", {**row, "image_path": "['a.png']"}, images=tmp_path / "pictures")
    assert elsewhere.image == tmp_path / "pictures" / "a.png"
    with pytest.raises(DataError, match=r'x\.tsv:2: index "0": picture .*a\.png: no such file; validate --images DIR'):
        only_sample(tmp_path / "x.tsv", row)


def test_several_pictures_are_refused_by_name_unless_the_first_is_asked_for(tmp_path: Path) -> None:
    row = {**OPEN, "index": "validation_7", "image": str([RED, picture_cell("blue")])}
    with pytest.raises(
        DataError, match=r'index "validation_7": has 2 pictures, the model takes one; .*--first-picture'
    ):
        only_sample(tmp_path / "x.tsv", row)
    assert color_of(only_sample(tmp_path / "x.tsv", row, first_picture=True)) == (255, 0, 0)


def test_rows_without_the_picture_that_others_have_are_left_out_and_counted(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "x.tsv", OPEN, {**OPEN, "index": 1, "image": ""}, {**OPEN, "index": 2, "image": "nan"})
    source = open_source(path)
    assert len(list(source.samples())) == 1 and "2 rows without a picture left out" in source.description


@pytest.mark.parametrize(
    ("column", "cell"), [("image", ""), ("image", "nan"), ("image_path", " "), ("image_path", "[]")]
)
def test_a_column_of_pictures_without_any_is_told(tmp_path: Path, column: str, cell: str) -> None:
    row = {"index": 0, column: cell, "question": "What?", "answer": "x"}
    with pytest.raises(DataError, match=rf'x\.tsv: column "{column}" is empty in every row'):
        read_table(write_tsv(tmp_path / "x.tsv", row))


def test_a_table_without_any_picture_is_text_only(tmp_path: Path) -> None:
    assert only_sample(tmp_path / "x.tsv", {"index": 0, "question": "What?", "answer": "x"}).image is None


def test_memory_is_bounded_by_a_row_not_by_the_table(tmp_path: Path) -> None:
    """Forty pictures of 400 KB each: the table is 16 MB, reading it takes a few rows' worth."""
    cells = [("AAAA" * 100_000) + f"{number:04}" for number in range(40)]
    path = write_tsv(tmp_path / "x.tsv", *({**OPEN, "index": n, "image": cell} for n, cell in enumerate(cells)))
    tracemalloc.start()
    table = read_table(path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(table.rows) == 40 and peak_bytes < path.stat().st_size / 3


def test_reading_a_table_leaves_the_limit_of_csv_as_it_was(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    read_table(write_tsv(tmp_path / "x.tsv", OPEN))
    assert csv.field_size_limit() == before


def test_a_table_that_changes_while_it_is_in_use_is_told(tmp_path: Path) -> None:
    sample = only_sample(tmp_path / "x.tsv", OPEN)
    write_tsv(tmp_path / "x.tsv", {**OPEN, "image": picture_cell("blue")})
    assert sample.image is not None
    with pytest.raises(DataError, match=r'x\.tsv, index "0": .*was changed while it was in use'):
        load_image(sample.image)


def test_a_table_that_became_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    """The pipe was opened, which waited for someone to write to it."""
    sample = only_sample(tmp_path / "x.tsv", OPEN)
    (tmp_path / "x.tsv").unlink()
    os.mkfifo(tmp_path / "x.tsv")
    assert sample.image is not None
    with pytest.raises(
        DataError, match=r"x\.tsv: is a FIFO or pipe, expected the table with the picture of x\.tsv, index"
    ):
        load_image(sample.image)


def test_too_long_a_picture_is_refused_before_it_is_read() -> None:
    with pytest.raises(DataError, match=r"x: its picture has 268\.4 MB of base64, at most 268\.4 MB are read"):
        StoredPicture(Path("absent"), "", 0, 2**28 + 1, "x").read_bytes()


@pytest.mark.parametrize(
    ("cell", "told"),
    [("*" * 80, "not valid base64"), (f"QUJD,{RED}", "not valid base64"), ("QUJD" * 40, "not a picture or damaged")],
)
def test_what_is_no_picture_is_told_with_its_index(tmp_path: Path, cell: str, told: str) -> None:
    sample = only_sample(tmp_path / "x.tsv", {**OPEN, "image": cell})
    with pytest.raises(DataError, match=f'x.tsv, index "0": .*{told}'):
        color_of(sample)


def test_base64_may_be_broken_into_lines_or_a_data_url(tmp_path: Path) -> None:
    broken = "\n".join(RED[start : start + 40] for start in range(0, len(RED), 40))
    for cell in (broken, f"data:image/png;base64,{RED}"):
        assert color_of(only_sample(tmp_path / "x.tsv", {**OPEN, "image": cell})) == (255, 0, 0)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "1: has no column \"index\"; the first line holds nothing"),
        (b"index\tquestion\n", "holds no rows, only a header"),
        (b"question\tanswer\nWhat?\tx\n", '1: has no column "index"; the first line holds question, answer'),
        (b"index\tanswer\n0\tx\n", '1: has no column "question"'),
        (b"index\tquestion\tindex\n", '1: column "index" is twice in the header'),
        (b"index\tquestion\n0\tWhat?\n0\tWhy?\n", '3: index "0" is already in line 2'),
        (b"index\tquestion\n0\tWhat?\tmore\n", "2: has 3 cells, the header 2"),
        (b"index\tquestion\n\n0\n", "3: has 1 cells, the header 2"),
        (b"index\tquestion\n\tWhat?\n", "2: has no index"),
        (b"index\tquestion\n0\t\xff\n", "2: not UTF-8"),
        (b'index\tquestion\n0\tWhat?\n1\t"never closed\n2\tWhy?\n', "3: cannot be read as tab-separated values"),
        (b'index\tquestion\n0\t"a\nb"\n1\t"Go" says?\n', "4: cannot be read as tab-separated values"),
        (b'"index\tquestion\n', "1: cannot be read as tab-separated values"),
        (b"index\rquestion\r0\rWhat?", "cannot be read as tab-separated values"),
        (b"index\timage\tquestion\n0\t9\tWhat?\n", '2: its image "9" names no row that holds a picture'),
        (b"index\timage\tquestion\n0\t0\tWhat?\n", '2: its image "0" names no row that holds a picture'),
        (b"index\timage\tquestion\n0\t" + b'"' + b'ab""' * 40 + b'"\tWhat?\n', "2: its image is not base64"),
    ],
)  # fmt: skip
def test_a_bad_table_is_told_with_file_and_line(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "x.tsv").write_bytes(content)
    with pytest.raises(DataError) as error:
        read_table(tmp_path / "x.tsv")
    assert str(error.value).startswith(str(tmp_path / "x.tsv")) and told in str(error.value)


@pytest.mark.parametrize(
    ("name", "row", "told"),
    [
        ("MMBench_DEV_EN", {**CHOICE, "answer": "C"}, "answer is 'C', expected one of A, B"),
        ("MMBench_DEV_EN", {**CHOICE, "answer": "cat"}, "answer is 'cat', expected one of A, B"),
        ("MME", {**OPEN, "answer": "Maybe"}, "answer is 'Maybe', expected one of yes, no"),
        ("OCRBench", {**OPEN, "answer": "['a', '']"}, ".* expected a text or a list of texts"),
        ("DocVQA_VAL", {**OPEN, "answer": "[]"}, r"answer is '\[\]', expected a text or a list"),
        ("DocVQA_VAL", {**OPEN, "question": ""}, "has no question"),
    ],
)
def test_a_bad_question_is_told_with_its_index(tmp_path: Path, name: str, row: Row, told: str) -> None:
    with pytest.raises(DataError, match=rf'{name}\.tsv:2: index "\d": {told}'):
        only_sample(tmp_path / f"{name}.tsv", row)


@pytest.mark.parametrize(
    ("cell", "items"),
    [
        ("['a', \"b's\"]", ["a", "b's"]), ("[1, 2.5]", ["1", "2.5"]), ("[]", []), ("cat", None), ("('a', 'b')", None),
        ("[a, b]", None), ("['a'", None), ("[0]*9", None), ("[__import__('os')]", None),
        ("[" * 3000 + "]" * 3000, None),
    ],
)  # fmt: skip
def test_lists_are_read_as_literals_and_nothing_is_run(cell: str, items: list[str] | None) -> None:
    assert literal_list(cell) == items


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("TextVQA_VAL", "vqa_accuracy"), ("textvqa_val", "vqa_accuracy"), ("DocVQA_VAL", "anls"),
        ("InfoVQA_VAL", "anls"), ("ChartQA_TEST", "relaxed_accuracy"), ("OCRBench", "ocrbench"),
        ("OCRVQA_TESTCORE", "exact_match"),
        ("OCRBench_v2", "none"), ("MMVet", "none"), ("COCO_VAL", "none"), ("RefCOCO", "none"),
        ("TextVQAlike", "exact_match"), ("mine", "exact_match"),
    ],
)  # fmt: skip
def test_the_name_decides_the_rule_and_the_description_says_so(tmp_path: Path, name: str, rule: str) -> None:
    source = open_source(write_tsv(tmp_path / f"{name}.tsv", OPEN))
    assert source.questions is not None and source.questions.rule == rule
    assert f"rule {rule} (" in source.description
    assert (source.questions.unscored is None) == (rule != "none")


@pytest.mark.parametrize("name", ["MMMU_DEV_VAL", "MMBench_DEV_EN_V11", "mmstar", "MMT-Bench_VAL"])
def test_sets_of_choices_are_known_by_name(tmp_path: Path, name: str) -> None:
    assert "rule multiple_choice (by the name" in open_source(write_tsv(tmp_path / f"{name}.tsv", CHOICE)).description


def test_columns_decide_where_the_name_does_not(tmp_path: Path) -> None:
    choice = open_source(write_tsv(tmp_path / "mine.tsv", CHOICE))
    assert "rule multiple_choice (by its columns A and B)" in choice.description
    rows = [{**OPEN, "answer": "Yes"}, {**OPEN, "index": 1, "answer": "no"}]
    assert "rule yes_no (because all answers are" in open_source(write_tsv(tmp_path / "mine.tsv", *rows)).description


def test_an_explicit_rule_wins(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "TextVQA_VAL.tsv", OPEN)
    source = open_source(path, options=QuestionOptions(rule="anls"))
    assert "rule anls (by --rule)" in source.description and next(source.samples()).task == "anls"
    with pytest.raises(ConfigError, match='--rule is "bleu", expected one of yes_no, multiple_choice'):
        QuestionOptions(rule="bleu")


@pytest.mark.parametrize("row", [OPEN, {**OPEN, "A": "", "B": "nan"}])
def test_choices_without_any_options_are_told(tmp_path: Path, row: Row) -> None:
    with pytest.raises(DataError, match=r"MMBench_DEV_EN\.tsv: rule multiple_choice .* no row has options; expected"):
        open_source(write_tsv(tmp_path / "MMBench_DEV_EN.tsv", row))
    with pytest.raises(DataError, match=r"mine\.tsv: rule multiple_choice \(by --rule\), but no row has options"):
        open_source(write_tsv(tmp_path / "mine.tsv", row), options=QuestionOptions(rule="multiple_choice"))


def test_without_answers_questions_are_asked_as_usual_but_not_scored(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "MMBench_TEST_EN.tsv", {**CHOICE, "answer": ""})
    source = open_source(path)
    (sample,) = source.samples()
    assert (sample.task, sample.references) == ("unscored", ()) and "Options:\nA. cat" in sample.turns[0].user
    assert "not scored: no row has an answer" in source.description


HINTED = {**CHOICE, "hint": "Look.", "C": "None"}


@pytest.mark.parametrize(
    ("name", "row", "style", "prompt"),
    [
        ("MMBench", HINTED, "vlmevalkit", "Hint: Look.\nQuestion: Which?\nOptions:\nA. cat\nB. dog\nC. None\n"
         "Please select the correct answer from the options above. \n"),
        ("MMBench", HINTED, "cogvlm", "Look.\nWhich?\nA. cat\nB. dog\nC. None\n"
         "Answer with the option's letter from the given choices directly.\nShort Answer."),
        ("MMBench", HINTED, "bare", "Which?"),
        ("MMBench_CN", {**CHOICE, "question": "哪个"}, "cogvlm",
         "哪个\nA. cat\nB. dog\n请直接回答选项字母。\nShort Answer."),
        ("MMMU_DEV_VAL", {**OPEN, "question": "Is <image 1> it?"}, "vlmevalkit", "Question: Is \n it?\n"),
        ("MME", {**OPEN, "answer": "Yes"}, "vlmevalkit", "What?"),
        ("MME", {**OPEN, "answer": "Yes"}, "cogvlm", "What?\nShort Answer."),
        ("AMBER", {**OPEN, "answer": "yes"}, "vlmevalkit", "What?\nPlease answer yes or no."),
        ("AMBER", {**OPEN, "answer": "yes"}, "cogvlm",
         "What?\nPlease answer yes or no.\nShort Answer."),
        ("OCRBench", OPEN, "vlmevalkit", "What?"),
        ("MMVet", OPEN, "vlmevalkit", "What?"),
        ("TextVQA_VAL", OPEN, "cogvlm", "What?\nAnswer the question using a single word or phrase."),
    ],
)  # fmt: skip
def test_prompts_are_those_of_vlmevalkit(tmp_path: Path, name: str, row: Row, style: PromptStyle, prompt: str) -> None:
    assert only_sample(tmp_path / f"{name}.tsv", row, prompt=style).turns[0].user == prompt


def test_options_may_have_any_letter_and_gaps(tmp_path: Path) -> None:
    sample = only_sample(tmp_path / "mine.tsv", {**CHOICE, "C": "", "H": 3, "answer": "h"})
    assert sample.options == (("A", "cat"), ("B", "dog"), ("H", "3")) and sample.references == ("H",)


def test_a_choice_without_options_is_an_open_question(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "MMMU_DEV_VAL.tsv", CHOICE, {**OPEN, "index": 2, "answer": "['24/7', '3.43']"})
    _, question = samples_of(path)
    assert (question.options, question.references) == ((), ("24/7", "3.43"))


def test_several_splits_are_kinds_and_one_can_be_asked_for(tmp_path: Path) -> None:
    rows = [
        {**CHOICE, "index": n, "split": split, "category": f"c{n}"} for n, split in enumerate(["dev", "val", "val"])
    ]
    path = write_tsv(tmp_path / "MMMU_DEV_VAL.tsv", *rows)
    assert [sample.kind for sample in samples_of(path)] == ["dev", "val", "val"]
    assert [sample.kind for sample in samples_of(path, split="val")] == ["c1", "c2"]
    with pytest.raises(DataError, match='has no rows of split "test"; it has: dev, val'):
        samples_of(path, split="test")


def test_categories_of_the_second_level_are_kinds_where_there_are_no_others(tmp_path: Path) -> None:
    rows = [{**CHOICE, "index": number, "l2-category": f"c{number}"} for number in range(2)]
    assert [sample.kind for sample in samples_of(write_tsv(tmp_path / "mine.tsv", *rows))] == ["c0", "c1"]


def test_formulas_of_ocrbench_keep_their_category_where_it_is_the_only_one(tmp_path: Path) -> None:
    row = {**OPEN, "category": FORMULAS}
    assert only_sample(tmp_path / "OCRBench.tsv", row).kind == FORMULAS


def test_a_byte_order_mark_is_no_part_of_the_header(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "x.tsv", OPEN)
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    (sample,) = samples_of(path)
    assert sample.key == "0" and color_of(sample) == (255, 0, 0)


def test_rotations_of_a_question_share_a_group_and_are_drawn_together(tmp_path: Path) -> None:
    indexes = [number + 10**6 * turn for number in (0, 1, 2, 100_001, 100_002) for turn in range(3)]
    samples = samples_of(write_tsv(tmp_path / "mine.tsv", *({**CHOICE, "index": index} for index in indexes)))
    assert [sample.group for sample in samples[:4]] == ["0", "0", "0", "1"]
    drawn = choose(samples, per_task=2, seed=0)
    assert [sample.group for sample in samples[9::3]] == ["100001", "100002"]
    assert len(drawn) == 6 and len({sample.group for sample in drawn}) == 2


def test_indexes_without_end_are_no_numbers(tmp_path: Path) -> None:
    """Python refuses to read numbers of more than 4300 digits."""
    assert only_sample(tmp_path / "mine.tsv", {**CHOICE, "index": "9" * 5000}).group is None


def test_a_table_calibrates_a_checkpoint(tmp_path: Path) -> None:
    ckpt = write_text_checkpoint(tmp_path / "ckpt")
    rows = [{**OPEN, "index": number, "answer": str(["cat"] * 10)} for number in range(16)]
    data = write_tsv(tmp_path / "TextVQA_VAL.tsv", *rows)
    command = ("quantize", "--ckpt", ckpt, "--calib", data, "--out", tmp_path / "out", "--group", 16, "--json")
    report = only_json_document(run_cli(*command, "--allow-uncalibrated"))
    assert "rule vqa_accuracy (by the name TextVQA_VAL)" in json.dumps(report)


def test_large_indexes_alone_are_no_rotations(tmp_path: Path) -> None:
    samples = samples_of(write_tsv(tmp_path / "mine.tsv", *({**CHOICE, "index": n + 10**7} for n in range(3))))
    assert [sample.group for sample in samples] == [None] * 3


def test_broken_rows_can_be_skipped_and_counted(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "MMBench.tsv", CHOICE, {**CHOICE, "index": 2, "answer": "Q"})
    samples = open_source(path).samples(skip_broken=True)
    assert len(list(samples)) == 1 and samples.skipped.count == 1


def test_options_that_do_not_apply_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"messages": [{"role": "user", "content": "?"}]}\n')
    with pytest.raises(DataError, match=r"--rule does not apply to this JSONL file"):
        open_source(tmp_path, options=QuestionOptions(rule="anls"))
    with pytest.raises(DataError, match=r"--grounding-prompt does not apply to this VLMEvalKit TSV"):
        open_source(write_tsv(tmp_path / "x.tsv", OPEN), options=QuestionOptions(grounding_prompt="<expr>?"))


@pytest.mark.parametrize(
    ("constant", "content"),
    [
        ("LONGEST_ROW_BYTES", b'0\t"' + b"never closed\n" * 1000),
        ("MOST_TABS", b"0" + b"\t" * 101),
        ("MOST_TABS", b'0\t"' + b"\t\n" * 101),
    ],
)
def test_a_row_without_end_is_not_read_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, constant: str, content: bytes
) -> None:
    monkeypatch.setattr(tsv_table, constant, 100)
    (tmp_path / "x.tsv").write_bytes(b"index\tquestion\n" + content)
    with pytest.raises(DataError, match=r"x\.tsv:2: the row is too long, at most .* are read; is a quote not closed\?"):
        read_table(tmp_path / "x.tsv")


@pytest.mark.parametrize(
    ("cell", "items"),
    [
        ("['a', \"b'\", 3]", ["a", "b'", "3"]),
        ("[ 'a' ,\"b\" , ]", ["a", "b"]),
        ("['" + "A" * 10**6 + "', '" + "B" * 10**6 + "']", ["A" * 10**6, "B" * 10**6]),
        ("['a', 3" + " " * LONGEST_LITERAL + "]", None),
        ("[0x" + "f" * 5000 + "]", None),
        (r"['\ud800']", None),
        ("[" * 5000 + "]" * 5000, None),
        ("[" + "-" * 5000 + "1]", None),
        ("['a' 'b']", ["ab"]),
        ("[f'a']", None),
    ],
)
def test_a_list_in_a_cell_is_read_or_left_a_text(cell: str, items: list[str] | None) -> None:
    """A number too long to print, and what stands for no text, ended in errors of Python's."""
    assert literal_list(cell) == items


def test_pictures_of_one_cell_are_found_in_their_order(tmp_path: Path) -> None:
    """The place of each picture was looked for from the start of the row."""
    cell = repr([RED, picture_cell("blue"), RED])
    (row,) = read_table(write_tsv(tmp_path / "x.tsv", {"index": 0, "image": cell, "question": RED})).rows
    places = [picture.offset for picture in row.pictures if isinstance(picture, StoredPicture)]
    assert len(places) == 3 and places == sorted(set(places))
    assert row.pictures[0] == row.pictures[2] != row.pictures[1]


def test_tables_are_read_at_the_same_time(tmp_path: Path) -> None:
    """The first thread to end restored the limit of a cell, which is the process's, while another one was reading."""
    path = write_tsv(tmp_path / "x.tsv", {"index": 0, "image": "A" * 200_000, "question": "What?"})
    before = csv.field_size_limit()
    with tsv_table.LONG_CELLS:
        thread = threading.Thread(target=read_table, args=(path,))
        thread.start()
        thread.join()
        assert [len(row.cells) for row in read_rows(path)] == [3, 3]
    assert csv.field_size_limit() == before

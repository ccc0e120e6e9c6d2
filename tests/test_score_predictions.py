"""Contract: answers are written as VLMEvalKit reads them, and scored again from the file, through `validate` too."""

import csv
import io
import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.benchmark_files import picture_cell, png, write_tsv
from tests.tiny_bundle import only_error_line, only_json_document, run_cli, write_text_checkpoint
from vlmdeploy.data.questions import RULES, QuestionOptions
from vlmdeploy.data.source import DataSource, open_source
from vlmdeploy.errors import DataError, ExportError, VlmdeployError
from vlmdeploy.score import predictions
from vlmdeploy.score.answerers import Validation, agreement
from vlmdeploy.score.metrics import Prediction
from vlmdeploy.score.predictions import check_output, output_paths, read_predictions, write_predictions
from vlmdeploy.score.scorecard import Scorecard, ScoreOptions, score_models

ROWS = [
    {"index": 3, "image": picture_cell(), "question": "Two\nlines?", "answer": "['12', '12.5']", "split": "human"},
    {"index": 10, "image": 3, "question": "=1+1", "answer": "2", "split": "augmented"},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_tsv(tmp_path / "ChartQA_TEST.tsv", *ROWS)


def answered(data: Path, *texts: str) -> tuple[DataSource, list[Prediction]]:
    source = open_source(data)
    return source, [Prediction(sample, text) for sample, text in zip(source.samples(), texts, strict=True)]


def write_answers(path: Path, **answers: str) -> Path:
    """A file of answers in JSON lines; keys are the indexes after an i."""
    rows = [{"index": name.removeprefix("i"), "prediction": text} for name, text in answers.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def score_file(path: Path, data: Path, **options: Any) -> Scorecard:
    return score_models((path,), ScoreOptions(data, **options), lambda *_: None)


def test_a_tsv_keeps_all_columns_but_the_picture(tmp_path: Path, data: Path) -> None:
    write_predictions(tmp_path / "out.tsv", *answered(data, 'a\t"b"\n', "=2"))
    with (tmp_path / "out.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert list(rows[0]) == ["index", "question", "answer", "split", "prediction"]
    assert rows[0] == {
        "index": "3", "question": "Two\nlines?", "answer": "['12', '12.5']", "split": "human", "prediction": 'a\t"b"\n',
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".new"] == []


def test_a_workbook_holds_texts_and_numeric_indexes(tmp_path: Path, data: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl", reason='pip install "vlmdeploy[report]"')
    write_predictions(tmp_path / "out.xlsx", *answered(data, "bell \x07 and \x0b\ud800", "=2+2"))
    rows = list(openpyxl.load_workbook(tmp_path / "out.xlsx").active.iter_rows())
    assert [cell.value for cell in rows[0]] == ["index", "question", "answer", "split", "prediction"]
    assert (rows[1][0].value, rows[1][4].value) == (3, "bell \ufffd and \ufffd\ufffd")
    assert [(cell.value, cell.data_type) for cell in rows[2]][:2] == [(10, "n"), ("=1+1", "s")]
    assert rows[2][4].data_type == "s", "what a model says is no formula"


def test_a_workbook_refuses_what_its_cells_cannot_hold(tmp_path: Path, data: Path) -> None:
    pytest.importorskip("openpyxl", reason='pip install "vlmdeploy[report]"')
    with pytest.raises(DataError, match=r'"prediction" of index "10" has 32768 characters.*write \.tsv instead'):
        write_predictions(tmp_path / "out.xlsx", *answered(data, "", "x" * 32768))
    assert not (tmp_path / "out.xlsx").exists()


@pytest.mark.parametrize("suffix", [".tsv", ".xlsx", ".jsonl"])
def test_what_is_written_is_read_back(tmp_path: Path, data: Path, suffix: str) -> None:
    if suffix == ".xlsx":
        pytest.importorskip("openpyxl", reason='pip install "vlmdeploy[report]"')
    texts = ("zwölf\n=\t'", "")
    path = tmp_path / "new" / f"answers{suffix}"
    write_predictions(path, *answered(data, *texts))
    assert read_predictions(path) == {"3": texts[0], "10": texts[1]}


def test_other_data_gives_index_picture_question_and_answer(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    row = {"image": "a.png", "messages": [{"role": "user", "content": "What?"}], "task": "vqa", "answer": "cat"}
    (tmp_path / "data.jsonl").write_text(f"\n{json.dumps(row)}\n")
    write_predictions(tmp_path / "out.jsonl", *answered(tmp_path, "dog"))
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {
        "index": "2", "image": str(tmp_path / "a.png"), "question": "What?", "answer": "cat", "prediction": "dog",
    }  # fmt: skip


def test_a_spreadsheet_program_may_have_changed_types(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl", reason='pip install "vlmdeploy[report]"')
    book = openpyxl.Workbook()
    for row in (["prediction", None, "index"], [12, None, 3.0], [None, "x", 10], [None, None, None], [0.5, None, "a"]):
        book.active.append(row)
    book.save(tmp_path / "edited.xlsx")
    assert read_predictions(tmp_path / "edited.xlsx") == {"3": "12", "10": "", "a": "0.5"}


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("x.txt", b"", "expected a file that ends in .tsv, .xlsx, .jsonl"),
        ("x.tsv", b"", 'column "index" must be in the header once; it holds nothing'),
        ("x.tsv", b"index\tprediction\n", "holds no answers"),
        ("x.tsv", b"index\tanswer\n1\ta\n", 'column "prediction" must be in the header once; it holds index, answer'),
        ("x.tsv", b"index\tprediction\n1\ta\n1\tb\n", 'index "1" occurs twice'),
        ("x.tsv", b"index\tprediction\n1\n", "row 2 has 1 cells, the header 2"),
        ("x.tsv", b"index\tprediction\n1\t\xff\n", "2: not UTF-8"),
        ("x.jsonl", b"{\n", "1: not JSON"),
        ("x.jsonl", b"[]\n", "1: holds a list of 0, expected an object"),
        ("x.jsonl", b'{"index": 1}\n', '1: expected an object with "index" and "prediction"'),
        ("x.jsonl", b'\n{"index": 1, "prediction": 3}\n', "2: prediction is 3, expected a text"),
        ("x.jsonl", b"", "holds no rows"),
    ],
)
def test_a_bad_file_of_answers_is_told(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read_predictions(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name)) and told in str(error.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"index\tprediction\n"])
def test_what_is_no_workbook_is_told(tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("openpyxl", reason='pip install "vlmdeploy[report]"')
    (tmp_path / "x.xlsx").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.xlsx: cannot be read as \.xlsx"):
        read_predictions(tmp_path / "x.xlsx")


def test_outputs_are_checked_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "there.tsv").touch()
    (tmp_path / "folder.tsv").mkdir()
    for name, told in (("x.csv", "ends in '.csv'"), ("there.tsv", "exists already"), ("folder.tsv", "is a folder")):
        with pytest.raises(ExportError, match=told):
            check_output(tmp_path / name, force=False)
    check_output(tmp_path / "there.tsv", force=True)


def test_several_models_write_a_file_each(tmp_path: Path) -> None:
    out = tmp_path / "MMVet.xlsx"
    assert output_paths(out, [Path("a/ckpt")]) == [out]
    assert output_paths(out, [Path("a/ckpt"), Path("b")]) == [tmp_path / "ckpt_MMVet.xlsx", tmp_path / "b_MMVet.xlsx"]
    with pytest.raises(ExportError, match="two models are called ckpt"):
        output_paths(out, [Path("a/ckpt"), Path("b/ckpt")])


def test_a_file_of_answers_is_scored_without_a_model(tmp_path: Path, data: Path) -> None:
    path = write_answers(tmp_path / "answers.jsonl", i3="12.9", i10="two", i99="other data")
    result = run_cli("validate", "--from-predictions", path, "--data", data, "--json")
    document = only_json_document(result)
    scores = document["tasks"]["relaxed_accuracy"]
    assert {name: each["value"] for name, each in scores.items()} == {
        "relaxed_accuracy": 0.5, "relaxed_accuracy/augmented": 0.0, "relaxed_accuracy/human": 1.0,
    }  # fmt: skip
    assert "rule relaxed_accuracy (by the name ChartQA_TEST)" in document["source"]
    table = run_cli("validate", "--from-predictions", path, "--data", data).stdout
    assert "rule relaxed_accuracy (by the name" in table.splitlines()[0]


def test_the_first_missing_answer_is_named(tmp_path: Path, data: Path) -> None:
    path = write_answers(tmp_path / "answers.jsonl", i3="12")
    line = only_error_line(run_cli("validate", "--from-predictions", path, "--data", data))
    assert 'answers.jsonl: has no answer to index "10"' in line


def test_one_split_of_the_answers_can_be_scored(tmp_path: Path, data: Path) -> None:
    path = write_answers(tmp_path / "answers.jsonl", i3="12")
    card = score_file(path, data, questions=QuestionOptions(split="human"))
    assert card.validations[0].scores["relaxed_accuracy"]["relaxed_accuracy"].value == 1


def test_two_files_are_compared_by_their_texts(tmp_path: Path, data: Path) -> None:
    first = write_answers(tmp_path / "first.jsonl", i3="12", i10="two")
    second = write_answers(tmp_path / "second.jsonl", i3="12", i10="2")
    document = only_json_document(
        run_cli("validate", "--from-predictions", first, "--compare", second, "--data", data, "--json")
    )
    (compared,) = document["compared"]
    assert compared["equal_answers"]["value"] == 0.5
    assert compared["differences"]["relaxed_accuracy"]["relaxed_accuracy"]["value"] == 0.5


def test_equal_texts_do_not_hide_other_ids(data: Path) -> None:
    source = open_source(data)
    sample = next(source.samples())
    one, other = (Validation({}, (Prediction(sample, "a", ids),)) for ids in ((1,), (2,)))
    assert agreement(one, other).value == 0 and agreement(one, one).value == 1


def test_boxes_in_a_file_are_scored_on_the_pictures(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(size=(40, 20)))
    row = {"image": "a.png", "sent": "it", "bbox": [10, 5, 30, 15], "height": 20, "width": 40}
    (tmp_path / "refcoco_val.jsonl").write_text(json.dumps(row))
    path = write_answers(tmp_path / "answers.jsonl", i1="[[250,250,750,750]]")
    card = score_file(path, tmp_path / "refcoco_val.jsonl")
    assert card.validations[0].scores["rec"]["mean_iou"].value == 1


def test_judged_sets_are_refused_unless_their_answers_are_wanted(tmp_path: Path) -> None:
    data = write_tsv(tmp_path / "MMVet.tsv", *ROWS)
    path = write_answers(tmp_path / "answers.jsonl", i3="a", i10="b")
    line = only_error_line(run_cli("validate", "--from-predictions", path, "--data", data))
    assert "MMVet is scored by a judge model: --predictions FILE writes the answers" in line
    out = tmp_path / "out.tsv"
    result = run_cli("validate", "--from-predictions", path, "--data", data, "--predictions", out, "--json")
    document = only_json_document(result)
    assert (document["tasks"], document["predictions"]) == ({}, [str(out)])
    assert read_predictions(out) == {"3": "a", "10": "b"}


def test_validate_writes_what_a_model_says(tmp_path: Path, data: Path) -> None:
    ckpt, out = write_text_checkpoint(tmp_path / "ckpt"), tmp_path / "out.tsv"
    command = ("validate", "--ckpt", ckpt, "--data", data, "--predictions", out, "--max-new-tokens", 3)
    document = only_json_document(run_cli(*command, "--json"))
    rescored = only_json_document(run_cli("validate", "--from-predictions", out, "--data", data, "--json"))
    assert rescored["tasks"] == document["tasks"]
    assert all(len(text) <= 3 for text in read_predictions(out).values())
    assert "exists already" in only_error_line(run_cli(*command))
    assert "answers written to" in run_cli(*command, "--force").stdout


def test_wrong_usage_of_validate(tmp_path: Path, data: Path) -> None:
    path = write_answers(tmp_path / "answers.jsonl", i3="a")
    both = run_cli("validate", "--ckpt", path, "--from-predictions", path, "--data", data)
    assert both.exit_code == 2 and "give one of --ckpt and --bundle, or --from-predictions" in both.stderr
    unknown = run_cli("validate", "--from-predictions", path, "--data", data, "--rule", "bleu")
    assert unknown.exit_code == 2 and all(rule in unknown.stderr for rule in RULES)


def test_a_folder_of_pictures_cannot_be_scored(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png())
    path = write_answers(tmp_path / "answers.jsonl", i1="a")
    with pytest.raises(VlmdeployError, match="is a folder of pictures; to score, questions with answers"):
        score_file(path, tmp_path / "pictures")


def test_a_missing_library_is_told_before_anything_runs(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run_cli("validate", "--ckpt", "nowhere", "--data", data, "--predictions", data.with_name("x.xlsx"))
    assert only_error_line(result) == 'Error: openpyxl is not installed: pip install "vlmdeploy[report]"'


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"width": 400, "height": 200}, 'question "1" has its box in a picture of 400 x 200: was it resized'),
        ({"width": 20, "height": 40}, 'question "1" has its box in a picture of 20 x 40: was it resized or turned'),
        ({}, 'question "1" has the box [0.0, 0.0, 9.0, 39.0]'),
    ],
)
def test_a_box_that_belongs_to_another_picture_size_is_told(tmp_path: Path, sizes: dict[str, int], told: str) -> None:
    (tmp_path / "a.png").write_bytes(png(size=(40, 20)))
    row = {"image": "a.png", "sent": "x", "bbox": [0, 0, 9, 39]}
    (tmp_path / "refcoco_val.jsonl").write_text(json.dumps(row | sizes))
    path = write_answers(tmp_path / "out.jsonl", i1="[[0,0,9,9]]")
    line = only_error_line(run_cli("validate", "--from-predictions", path, "--data", tmp_path / "refcoco_val.jsonl"))
    assert f"a.png: is 40 x 20 pixels, but {told}" in line


SHEET = """<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><sheetData><row r="1">
<c r="A1" t="inlineStr"><is><t>index</t></is></c><c r="B1" t="inlineStr"><is><t>prediction</t></is></c></row>
{}</sheetData></worksheet>"""
ROW = '<row r="{}"><c r="A{}"><v>{}</v></c><c r="B{}" t="inlineStr"><is><t>{}</t></is></c></row>'


def write_workbook(path: Path, sheet: str) -> Path:
    """A workbook whose only sheet is this XML."""
    openpyxl = pytest.importorskip("openpyxl", reason='pip install "vlmdeploy[report]"')
    content = io.BytesIO()
    openpyxl.Workbook().save(content)
    with zipfile.ZipFile(content) as template, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as workbook:
        for name in template.namelist():
            workbook.writestr(name, sheet if name.endswith("sheet1.xml") else template.read(name))
    return path


def test_rows_beyond_any_are_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows missing before row 999999999 were made one by one."""
    monkeypatch.setattr(predictions, "MOST_XLSX_ROWS", 100)
    far = ROW.replace('r="{}"', 'r="999999999"', 1)
    sheet = SHEET.format(ROW.format(2, 2, 7, 2, "a") + far.format(3, 8, 3, "b"))
    assert read_predictions(write_workbook(tmp_path / "x.xlsx", sheet)) == {"7": "a"}


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = write_workbook(tmp_path / "x.xlsx", SHEET.format(" " * predictions.MOST_XLSX_BYTES))
    assert path.stat().st_size < 100_000
    with pytest.raises(
        DataError, match=r"x\.xlsx: holds 67\.1 MB of tables, at most 67\.1 MB are read: give the answers as"
    ):
        read_predictions(path)


@pytest.mark.parametrize(("place", "value"), [(8, 1), (10, 99)], ids=["encrypted", "unknown method"])
def test_whatever_the_library_raises_is_told(tmp_path: Path, place: int, value: int) -> None:
    """A workbook with a password ended in a RuntimeError, one packed in a strange way in a NotImplementedError."""
    path = write_workbook(tmp_path / "x.xlsx", SHEET.format(ROW.format(2, 2, 7, 2, "a")))
    content = bytearray(path.read_bytes())
    for entry in re.finditer(b"PK\x01\x02", path.read_bytes()):
        content[entry.start() + place] = value
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.xlsx: cannot be read as \.xlsx \("):
        read_predictions(path)


@pytest.mark.parametrize("name", ["x.tsv", "x.jsonl", "x.xlsx"])
def test_answers_that_are_no_file_are_told(tmp_path: Path, name: str, data: Path) -> None:
    """A FIFO was no answer file, so a checkpoint was looked for in it; read as one, it was waited for."""
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=f"{name}: is a FIFO or pipe"):
        read_predictions(tmp_path / name)
    with pytest.raises(DataError, match=f"{name}: is a FIFO or pipe"):
        score_file(tmp_path / name, data)


@pytest.mark.parametrize(("index", "text"), [("1", "\ud800"), ("\ud800", "a")])
def test_answers_that_are_no_text_are_told(tmp_path: Path, index: str, text: str) -> None:
    """Lone surrogates came back as a UnicodeEncodeError when the answers were written again."""
    (tmp_path / "x.jsonl").write_text(json.dumps({"index": index, "prediction": text}))
    with pytest.raises(DataError, match=r"x\.jsonl: (an index|the answer to \"1\") is not valid UTF-8"):
        read_predictions(tmp_path / "x.jsonl")

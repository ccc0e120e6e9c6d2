"""Contract: RefCOCO in Qwen-VL's lines and in COCO's JSON; pickles are refused without reading one."""

import codecs
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.benchmark_files import png
from vlmdeploy.data import jsonl, refcoco
from vlmdeploy.data.questions import QuestionOptions
from vlmdeploy.data.samples import Sample
from vlmdeploy.data.source import open_source
from vlmdeploy.errors import ConfigError, DataError
from vlmdeploy.score.metrics import Prediction, check_scorable, measure
from vlmdeploy.score.predictions import read_predictions, write_predictions

LINE = {"image": "a.png", "sent": "the red one", "bbox": [10, 5, 30, 15], "height": 20, "width": 40}
COCO: dict[str, Any] = {
    "images": [{"id": 7, "file_name": "a.png", "width": 40, "height": 20}],
    "annotations": [{"id": 3, "image_id": 7, "bbox": [10, 5, 20, 10], "caption": "the red one"}],
}
PROMPT = "Can you point out the red one in the image and provide the bounding boxes of its location?"


def write_lines(folder: Path, *rows: object) -> Path:
    (folder / "a.png").write_bytes(png())
    path = folder / "refcoco_val.jsonl"
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def write_coco(folder: Path, **changes: Any) -> Path:
    (folder / "a.png").write_bytes(png())
    path = folder / "refcoco.json"
    path.write_text(json.dumps(COCO | changes))
    return path


def annotation(**changes: Any) -> dict[str, Any]:
    return {**COCO["annotations"][0], **changes}


@pytest.mark.parametrize("write", [lambda folder: write_lines(folder, LINE), write_coco])
def test_a_phrase_becomes_the_authors_question_with_its_box(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    (sample,) = open_source(write(tmp_path)).samples()
    assert sample.image == tmp_path / "a.png" and sample.turns[0].user == PROMPT
    assert (sample.task, sample.boxes) == ("rec", ((10.0, 5.0, 30.0, 15.0),))
    assert sample.answer == "[[250,250,750,750]]"
    check_scorable([sample])


def test_the_answer_is_scored_by_its_box(tmp_path: Path) -> None:
    (sample,) = open_source(write_lines(tmp_path, LINE)).samples()
    right = measure(Prediction(sample, "[[250,250,750,750]]", size_px=(40, 20)))
    half = measure(Prediction(sample, "[[250,250,500,750]]", size_px=(40, 20)))
    assert right == {"acc@0.5": 1.0, "mean_iou": 1.0, "parse_rate": 1.0} and half["mean_iou"] == 0.5


def test_the_source_says_which_form_it_took(tmp_path: Path) -> None:
    lines, coco = open_source(write_lines(tmp_path, LINE)), open_source(write_coco(tmp_path))
    assert (lines.kind, coco.kind) == ("RefCOCO JSONL", "RefCOCO JSON")
    assert "refcoco_val.jsonl (Qwen-VL's form)" in lines.description and "COCO's form" in coco.description


def test_a_byte_order_mark_does_not_matter(tmp_path: Path) -> None:
    for path in (write_lines(tmp_path, LINE), write_coco(tmp_path)):
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
        source = open_source(path)
        assert source.kind.startswith("RefCOCO") and len(list(source.samples())) == 1


def test_each_line_has_its_number_as_key(tmp_path: Path) -> None:
    samples = open_source(write_lines(tmp_path, LINE, b"", LINE)).samples()
    assert [sample.key for sample in samples] == ["1", "3"]


def test_every_sentence_is_a_question(tmp_path: Path) -> None:
    sentences = ["left one", {"sent": "red one"}, {"raw": "Red, left"}]
    path = write_coco(tmp_path, annotations=[annotation(caption=None, sentences=sentences)])
    samples = list(open_source(path).samples())
    assert [sample.turns[0].user.split(" in the")[0] for sample in samples] == [
        "Can you point out left one", "Can you point out red one", "Can you point out Red, left",
    ]  # fmt: skip
    assert len({sample.key for sample in samples}) == 3


def test_a_phrase_said_twice_is_two_questions_whose_answers_can_be_read_back(tmp_path: Path) -> None:
    """RefCOCO holds such phrases; answers that were written could not be scored again, as their names were equal."""
    source = open_source(write_coco(tmp_path, annotations=[annotation(caption=None, sentences=["left", "left", "x"])]))
    samples = list(source.samples())
    assert [sample.key for sample in samples] == ["3: left", "3: left (2)", "3: x"]
    write_predictions(tmp_path / "out.jsonl", source, [Prediction(sample, "?") for sample in samples])
    assert list(read_predictions(tmp_path / "out.jsonl")) == [sample.key for sample in samples]


def test_one_split_can_be_asked_for(tmp_path: Path) -> None:
    rows = [annotation(id=number, split=split) for number, split in enumerate(["val", "testA", "val"])]
    path = write_coco(tmp_path, annotations=rows)
    assert len(list(open_source(path, options=QuestionOptions(split="val")).samples())) == 2
    with pytest.raises(DataError, match='has no annotation of split "testB"; it has: testA, val'):
        list(open_source(path, options=QuestionOptions(split="testB")).samples())


def test_pictures_are_found_elsewhere_by_path_or_bare_name(tmp_path: Path) -> None:
    (tmp_path / "coco" / "train2014").mkdir(parents=True)
    (tmp_path / "coco" / "train2014" / "b.png").write_bytes(png())
    path = write_lines(tmp_path, LINE | {"image": "data/coco/train2014/b.png"})
    (sample,) = open_source(path, options=QuestionOptions(images=tmp_path / "coco" / "train2014")).samples()
    assert sample.image == tmp_path / "coco" / "train2014" / "b.png"
    with pytest.raises(DataError, match=r"refcoco_val\.jsonl:1: picture .*b\.png: no such file; validate --images"):
        list(open_source(path).samples())


def test_the_question_can_be_set(tmp_path: Path) -> None:
    options = QuestionOptions(grounding_prompt="Where is <expr>? answer in [[x0,y0,x1,y1]] format.")
    (sample,) = open_source(write_lines(tmp_path, LINE), options=options).samples()
    assert sample.turns[0].user == "Where is the red one? answer in [[x0,y0,x1,y1]] format."
    with pytest.raises(ConfigError, match=r"--grounding-prompt is .*, expected <expr> in it"):
        QuestionOptions(grounding_prompt="Where?")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[1]", "holds a list of 1, expected an object"),
        (b'{"sent": ' + b"[" * 20000, "not JSON (maximum recursion depth exceeded"),
        (LINE | {"sent": ""}, '"sent" is "", expected a text'),
        (LINE | {"sent": 3}, '"sent" is 3, expected a text'),
        (LINE | {"sent": "\ud800"}, '"sent" is not valid UTF-8'),
        (LINE | {"image": None}, '"image" is null, expected a text'),
        (LINE | {"image": "x" * 5000}, "cannot be read (File name too long)"),
        (LINE | {"image": "a\0b"}, "picture"),
        (LINE | {"bbox": None}, '"bbox" is null, expected four numbers'),
        (LINE | {"bbox": [1, 2, 3]}, '"bbox" is [1, 2, 3], expected four numbers'),
        (LINE | {"bbox": [1, 2, 3, "4"]}, "expected four numbers"),
        (LINE | {"bbox": [1, 2, 3, True]}, "expected four numbers"),
        (LINE | {"bbox": [1, 2, 3, float("nan")]}, "expected four numbers"),
        (LINE | {"bbox": [1, 2, 3, 10**400]}, "expected four numbers"),
        (LINE | {"bbox": [30, 5, 10, 15]}, "expected x0 < x1 and y0 < y1"),
        (LINE | {"bbox": [10, 5, 10, 15]}, "expected x0 < x1 and y0 < y1"),
        (LINE | {"bbox": [10, 5, 90, 15]}, "lies outside the picture of 40 x 20 pixels"),
        (LINE | {"width": 0}, "width and height are [0, 20], expected pixels"),
    ],
)
def test_a_bad_line_is_told_by_its_number(tmp_path: Path, row: object, told: str) -> None:
    samples = open_source(write_lines(tmp_path, LINE, row)).samples()
    next(samples)
    with pytest.raises(DataError) as error:
        next(samples)
    assert str(error.value).startswith(f"{tmp_path / 'refcoco_val.jsonl'}:2: ") and told in str(error.value)


def test_a_box_may_end_a_little_outside(tmp_path: Path) -> None:
    (sample,) = open_source(write_lines(tmp_path, LINE | {"bbox": [-0.5, 5, 41, 15]})).samples()
    assert sample.boxes == ((-0.5, 5.0, 41.0, 15.0),) and sample.answer == "[[000,250,999,750]]"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"images": {}}, '"images" is not a list of objects'),
        ({"annotations": [3]}, '"annotations" is not a list of objects'),
        ({"annotations": []}, 'no annotation has a "caption" or "sentences"'),
        ({"annotations": [annotation(image_id=8)]}, "annotation 3: its image_id 8 is not among the images"),
        ({"annotations": [annotation(bbox=[1, 2])]}, 'annotation 3: "bbox" is [1, 2], expected four numbers'),
        ({"annotations": [annotation(bbox=[1, 2, -3, 4])]}, "expected x0 < x1"),
        ({"annotations": [annotation(caption=4)]}, 'annotation 3: "caption" is 4, expected a text'),
        ({"annotations": [annotation(caption=None, sentences=[{}])]}, '"sentences" is null, expected a text'),
        ({"images": [*COCO["images"], {"id": 7, "file_name": "b.png"}]}, "two images have the id 7"),
        ({"images": [{"id": 7}]}, '"file_name" is null, expected a text'),
    ],
)
def test_a_bad_annotation_is_told(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError) as error:
        list(open_source(write_coco(tmp_path, **changes)).samples())
    assert str(error.value).startswith(str(tmp_path / "refcoco.json")) and told in str(error.value)


def test_without_sizes_there_is_a_box_but_no_answer_text(tmp_path: Path) -> None:
    (sample,) = open_source(write_coco(tmp_path, images=[{"id": 7, "file_name": "a.png"}])).samples()
    assert sample.answer is None and len(sample.boxes) == 1


class Bomb:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["refs(unc).p", "refs.pkl", "refs.json", "refs"])
def test_pickles_are_refused_unread(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps([Bomb(tmp_path / "exploded")]))
    with pytest.raises(DataError, match=r"is a Python pickle, .* docs/evaluation\.md"):
        open_source(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("key", ["images", "annotations"])
def test_half_of_cocos_form_is_told(tmp_path: Path, key: str) -> None:
    (tmp_path / "x.json").write_text(json.dumps({key: []}))
    with pytest.raises(DataError, match=rf'x\.json: has "{key}" alone; expected RefCOCO in COCO\'s form'):
        open_source(tmp_path / "x.json")


@pytest.mark.parametrize("content", ["", "[]", "[" * 20000, "{}", "text"])
def test_other_json_is_read_as_our_own_rows(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    source = open_source(tmp_path / "x.json")
    assert source.kind == "JSONL"
    with pytest.raises(DataError, match=r"x\.json"):
        list(source.samples())


def test_samples_are_equal_whatever_their_key(tmp_path: Path) -> None:
    first, second = open_source(write_lines(tmp_path, LINE, LINE)).samples()
    assert isinstance(first, Sample) and first == second and first.key != second.key


@pytest.mark.parametrize("longest_line", [10, jsonl.LONGEST_LINE_BYTES])
def test_a_document_larger_than_any_is_not_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, longest_line: int
) -> None:
    path = write_coco(tmp_path)
    monkeypatch.setattr(refcoco, "LONGEST_LINE_BYTES", longest_line)
    assert open_source(path).kind == "RefCOCO JSON"
    monkeypatch.setattr(refcoco, "MOST_COCO_BYTES", 100)
    with pytest.raises(DataError, match=r"refcoco\.json: has \d+ bytes, at most 100 bytes are read"):
        open_source(path)


def test_lines_are_known_by_the_first_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of lines called .json was read into memory as one document."""
    monkeypatch.setattr(refcoco, "MOST_COCO_BYTES", 100)
    path = write_lines(tmp_path, LINE, LINE).rename(tmp_path / "lines.json")
    assert open_source(path).kind == "RefCOCO JSONL"


@pytest.mark.parametrize(
    ("name", "told"), [("\ud800", "is not valid UTF-8"), ([1], r"is \[1\], expected a number or a text")]
)
def test_an_id_that_no_file_of_answers_can_hold_is_told(tmp_path: Path, name: object, told: str) -> None:
    """Writing the answers ended in a UnicodeEncodeError, after all of them had been given."""
    with pytest.raises(DataError, match=rf'refcoco\.json: "id" of annotation 0 {told}'):
        list(open_source(write_coco(tmp_path, annotations=[annotation(id=name)])).samples())

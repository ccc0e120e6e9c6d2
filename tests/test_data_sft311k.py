"""Contract: the published layout of CogVLM-SFT-311K becomes samples, and a broken file is told by name."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmdeploy.data.samples import Sample
from vlmdeploy.data.sft311k import QUESTIONS, is_root, label_folders, read_items
from vlmdeploy.errors import DataError
from vlmdeploy.runtime.chat import Turn

CAPTIONED = "llava_details-minigpt4_3500_formate"
SINGLE = "llava_instruction_single_conversation_formate"
MULTI = "llava_instruction_multi_conversations_formate"
MUTI = "llava_instruction_muti_conversations_formate"
CAPTION = {"captions": [{"role": "caption", "content": "Two cats on a sofa."}]}


def read_samples(path: Path) -> list[Sample]:
    return [read() for read in read_items(path)]


def talk(*texts: object) -> dict[str, Any]:
    """A conversation of these texts, the user first."""
    roles = ("user", "assistant")
    return {"conversations": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


def write(folder: Path, stem: str, label: object, labels: str = "labels_en", suffix: str = ".jpg") -> Path:
    """A picture and its label file in a folder of the set; a label is an object, or bytes as they are."""
    for name in ("images", labels):
        (folder / name).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), "red").save(folder / "images" / f"{stem}{suffix}")
    content = label if isinstance(label, bytes) else json.dumps(label).encode()
    (folder / labels / f"{stem}.json").write_bytes(content)
    return folder


def test_a_caption_answers_a_question_that_its_file_name_chooses(tmp_path: Path) -> None:
    for number in range(20):
        write(tmp_path / CAPTIONED, f"{number:08}", CAPTION)
    samples = read_samples(tmp_path)
    assert samples == read_samples(tmp_path)
    assert {(sample.task, sample.kind, sample.answer) for sample in samples} == {
        ("caption", "caption", "Two cats on a sofa.")
    }
    asked = {sample.turns[-1].user for sample in samples}
    assert len(asked) > 1 and asked <= set(QUESTIONS["en"])


def test_a_conversation_keeps_all_turns_and_leaves_the_last_one_open(tmp_path: Path) -> None:
    folder = write(tmp_path / MULTI, "00000007", talk("What?", "A cat.", "Where?", "On a sofa."))
    (sample,) = read_samples(tmp_path)
    picture = folder / "images" / "00000007.jpg"
    assert sample == Sample(picture, (Turn("What?", "A cat."), Turn("Where?")), "chat", "chat", "On a sofa.")


def test_folders_and_files_are_read_in_sorted_order(tmp_path: Path) -> None:
    for folder in (SINGLE, CAPTIONED, MUTI):
        for stem in ("00000002", "00000001", "00000003"):
            write(tmp_path / folder, stem, talk("?", "!"))
    pictures = [sample.image for sample in read_samples(tmp_path)]
    assert len(pictures) == 9 and pictures == sorted(pictures, key=str)


@pytest.mark.parametrize("name", [MULTI, "my copy"])
def test_one_folder_of_the_set_is_a_root(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / name, "00000001", CAPTION, labels="labels")
    assert is_root(folder) and len(read_samples(folder)) == 1


@pytest.mark.parametrize("suffix", [".jpeg", ".png", ".webp"])
def test_pictures_may_be_of_another_format(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / SINGLE, "00000001", talk("?", "!"), suffix=suffix)
    (sample,) = read_samples(tmp_path)
    assert isinstance(sample.image, Path) and sample.image.suffix == suffix


def test_of_two_languages_english_is_read(tmp_path: Path) -> None:
    write(tmp_path / CAPTIONED, "00000001", CAPTION)
    write(tmp_path / CAPTIONED, "00000001", {"captions": [{"role": "caption", "content": "两只猫"}]}, "labels_zh")
    (sample,) = read_samples(tmp_path)
    assert sample.answer == "Two cats on a sofa." and sample.turns[0].user in QUESTIONS["en"]


def test_the_only_language_is_read_and_captions_are_asked_for_in_it(tmp_path: Path) -> None:
    folder = write(tmp_path / CAPTIONED, "00000001", CAPTION, "labels_zh")
    (sample,) = read_samples(tmp_path)
    assert label_folders(tmp_path) == [folder / "labels_zh"] and sample.turns[0].user in QUESTIONS["zh"]


@pytest.mark.parametrize(
    ("label", "told"),
    [
        (b'{"captions": [{"role": "caption",\n"content": "x"},\n]}', "trailing comma in line 2"),
        (b'{"captions": ', "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        ([1], "holds a list of 1, expected an object; expected"),
        ({"caption": "x"}, "has the keys caption; expected"),
        (CAPTION | talk("?", "!"), "has the keys captions, conversations; expected"),
        ({"captions": "x"}, '"captions" is a str, expected a list'),
        ({"captions": []}, "has 0 captions, expected one"),
        ({"captions": ["x"]}, 'caption 0 is "x", expected {"role": "caption"'),
        ({"captions": [{"role": "caption", "content": " "}]}, "the caption's text is empty"),
        (talk(), "has 0 entries, expected user and assistant in pairs"),
        (talk("?", "!", "?"), "has 3 entries, expected user and assistant in pairs"),
        ({"conversations": talk("?", "!")["conversations"][::-1]}, 'entry 0 is {"role": "assistant"'),
        (talk("?", 3), 'entry 1 is {"role": "assistant", "content": 3}'),
        (talk("?", ""), "the assistant's text is empty"),
        (talk("?", "\ud83d"), "the assistant's text is not valid UTF-8 at character 0"),
    ],
)
def test_a_broken_label_file_is_named_and_the_next_one_can_be_read(tmp_path: Path, label: object, told: str) -> None:
    folder = write(tmp_path / SINGLE, "00000001", label)
    write(folder, "00000002", talk("?", "!"))
    broken, whole = read_items(tmp_path)
    with pytest.raises(DataError) as error:
        broken()
    assert str(error.value).startswith(str(folder / "labels_en" / "00000001.json")) and told in str(error.value)
    assert whole().answer == "!"


def test_a_name_that_is_not_utf8_is_read(tmp_path: Path) -> None:
    write(tmp_path / CAPTIONED, os.fsdecode(b"1\xff"), CAPTION)
    assert [sample.answer for sample in read_samples(tmp_path)] == ["Two cats on a sofa."]


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / SINGLE, "00000001", talk("?", "!"))
    (folder / "images" / "00000001.jpg").unlink()
    with pytest.raises(DataError, match=r"00000001\.json: its picture .*images/00000001\.jpg .*no such file"):
        read_samples(tmp_path)


def test_missing_labels_are_told_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / SINGLE / "images").mkdir(parents=True)
    with pytest.raises(DataError, match=f"{SINGLE}: holds no labels, expected labels_en, labels, labels_zh"):
        read_samples(tmp_path)
    (tmp_path / SINGLE / "labels").mkdir()
    with pytest.raises(DataError, match="labels: holds no label files"):
        read_samples(tmp_path)


def test_other_folders_are_no_root(tmp_path: Path) -> None:
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    (tmp_path / "labels" / "0.txt").touch()  # as object detection sets have them
    assert not is_root(tmp_path) and not is_root(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is not a CogVLM-SFT-311K root"):
        read_samples(tmp_path)


def test_hidden_files_are_not_labels(tmp_path: Path) -> None:
    folder = write(tmp_path / SINGLE, "00000001", talk("?", "!"))
    (folder / "labels_en" / "._00000001.json").write_bytes(b"\0")  # macOS leaves these on foreign disks
    assert len(read_samples(tmp_path)) == 1

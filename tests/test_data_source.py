"""Contract: DATA is recognized, broken samples are skipped only on request and counted, and pictures can be checked."""

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import pytest
from PIL import Image

from tests.benchmark_files import picture_cell, write_tsv
from vlmdeploy.data import image_folder
from vlmdeploy.data.samples import Sample
from vlmdeploy.data.source import MAX_REASONS, check_picture, open_source
from vlmdeploy.errors import DataError
from vlmdeploy.runtime.chat import Turn

SFT_FOLDER = "llava_instruction_single_conversation_formate"


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), "red").save(path)
    return path


def jsonl(folder: Path, *images: str) -> Path:
    """A folder with data.jsonl, a row about each of these pictures."""
    rows = [{"image": image, "messages": [{"role": "user", "content": "What?"}]} for image in images]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def sft(root: Path, *labels: str) -> Path:
    """A root of CogVLM-SFT-311K with these files, each with its picture."""
    (root / SFT_FOLDER / "labels_en").mkdir(parents=True)
    for number, label in enumerate(labels):
        picture(root / SFT_FOLDER / "images" / f"{number:08}.jpg")
        (root / SFT_FOLDER / "labels_en" / f"{number:08}.json").write_text(label)
    return root


LABEL = json.dumps({"conversations": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]})


def test_jsonl_comes_first_as_a_file_or_in_its_folder(tmp_path: Path) -> None:
    sft(tmp_path, LABEL)
    picture(tmp_path / "0.png")
    for data in (jsonl(tmp_path, "0.png"), tmp_path / "data.jsonl"):
        source = open_source(data)
        assert (source.kind, source.path) == ("JSONL", tmp_path / "data.jsonl")
        assert source.description == f"JSONL file {tmp_path / 'data.jsonl'}"
        assert list(source.samples()) == [Sample(tmp_path / "0.png", (Turn("What?"),), "chat", "chat", None)]


def test_an_sft_root_says_which_labels_it_takes(tmp_path: Path) -> None:
    source = open_source(sft(tmp_path, LABEL, LABEL))
    assert (source.kind, source.path) == ("CogVLM-SFT-311K", tmp_path)
    assert f"{SFT_FOLDER}/labels_en" in source.description
    assert [sample.answer for sample in source.samples()] == ["!", "!"]


def test_a_folder_of_pictures_is_asked_one_question(tmp_path: Path) -> None:
    names = ("b/1.PNG", "c.bmp", "b/0.webp", "b/2.gif", "a.jpg")
    for name in (*names, ".thumbnails/0.png"):
        picture(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    source = open_source(tmp_path, "Describe it.")
    assert source.kind == "pictures with one prompt" and "Describe it." in source.description
    expected = [Sample(tmp_path / name, (Turn("Describe it."),), "caption", "caption", None) for name in sorted(names)]
    assert list(source.samples()) == expected == [read() for read in image_folder.read_items(tmp_path, "Describe it.")]


def test_a_folder_of_pictures_needs_a_prompt(tmp_path: Path) -> None:
    picture(tmp_path / "0.png")
    with pytest.raises(DataError, match="folder of pictures, which needs a question: give --calib-prompt"):
        open_source(tmp_path)
    with pytest.raises(DataError, match="--calib-prompt is empty"):
        open_source(tmp_path, " ")
    with pytest.raises(DataError, match="--calib-prompt is not valid UTF-8 at character 5"):
        open_source(tmp_path, "What \udcff")


def test_a_prompt_fits_only_pictures(tmp_path: Path) -> None:
    for data in (sft(tmp_path / "sft", LABEL), jsonl(tmp_path)):
        with pytest.raises(DataError, match="--calib-prompt fits only a folder of pictures, but this is a"):
            open_source(data, "Describe it.")


@pytest.mark.parametrize(("name", "found"), [("", "holds no known data"), ("nowhere", "no such file")])
def test_unknown_data_lists_what_was_looked_for(tmp_path: Path, name: str, found: str) -> None:
    with pytest.raises(DataError) as error:
        open_source(tmp_path / name, "Describe it.")
    for told in (str(tmp_path / name), found, "JSONL", "data.jsonl", "CogVLM-SFT-311K", "--calib-prompt", ".png"):
        assert told in str(error.value)


def test_a_broken_sample_raises_unless_skipping_is_asked_for(tmp_path: Path) -> None:
    samples = open_source(sft(tmp_path, LABEL, "{", LABEL)).samples()
    assert next(samples).answer == "!"
    with pytest.raises(DataError, match=r"00000001\.json: not JSON"):
        next(samples)


def test_skipped_samples_are_counted_with_the_first_reasons(tmp_path: Path) -> None:
    picture(tmp_path / "0.png")
    missing = [f"{number}.png" for number in range(1, 6)]
    samples = open_source(jsonl(tmp_path, "0.png", *missing, "0.png")).samples(skip_broken=True)
    assert [sample.image for sample in samples] == [tmp_path / "0.png"] * 2
    assert samples.skipped.count == 5 and len(samples.skipped.reasons) == MAX_REASONS
    assert "data.jsonl:2: picture" in samples.skipped.reasons[0] and "1.png" in samples.skipped.reasons[0]


def test_a_link_to_nowhere_is_a_broken_sample(tmp_path: Path) -> None:
    picture(tmp_path / "0.png")
    (tmp_path / "1.png").symlink_to(tmp_path / "nowhere.png")
    samples = open_source(tmp_path, "Describe it.").samples(skip_broken=True)
    assert len(list(samples)) == 1 and "1.png: no such file" in samples.skipped.reasons[0]


def test_data_of_broken_samples_only_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    samples = open_source(sft(tmp_path, "{", "{")).samples(skip_broken=True)
    with pytest.raises(DataError, match=r"only broken samples \(2\); the first: .*00000000\.json"):
        list(samples)


def test_data_without_rows_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no rows"):
        list(open_source(jsonl(tmp_path)).samples(skip_broken=True))


def test_a_truncated_picture_is_found_when_checked(tmp_path: Path) -> None:
    path = picture(tmp_path / "0.jpg")
    whole = path.read_bytes()
    (sample,) = open_source(tmp_path, "Describe it.").samples()
    check_picture(sample)
    path.write_bytes(whole[:-50])
    with pytest.raises(DataError, match=r"0\.jpg: damaged or truncated"):
        check_picture(sample)


def test_a_sample_without_a_picture_passes_the_check() -> None:
    check_picture(Sample(None, (Turn("What?"),), "chat", "chat", None))


@pytest.mark.parametrize("name", ["DocVQA_VAL.tsv", "refcoco_val.jsonl", "refcoco.json", "x.tsv.gz"])
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (gzip.compress(b"index", mtime=0), "is packed with gzip, expected text in UTF-8: unpack it first"),
        (lzma.compress(b"index"), "is packed with xz"),
        (bz2.compress(b"index"), "is packed with bzip2"),
        (b"PK\x03\x04rest", "is packed with zip"),
        ("index".encode("utf-16"), "is text in UTF-16, expected UTF-8"),
    ],
)
def test_packed_files_and_utf_16_are_told_as_such(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: {told}"):
        open_source(tmp_path / name)


@pytest.mark.parametrize("name", ["x.jsonl", "x.tsv", "x.json", "x", "folder/data.jsonl"])
def test_data_that_is_no_file_is_told(tmp_path: Path, name: str) -> None:
    """A FIFO was waited for, or said to be absent; a table from /dev/zero filled the memory."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    given = path.parent if path.name == "data.jsonl" else path
    os.mkfifo(path)
    with pytest.raises(DataError, match=f"{name}: is a FIFO or pipe"):
        open_source(given)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(DataError, match=f"{name}: is a device"):
        open_source(given)


@pytest.mark.parametrize(
    "kind", ["JSONL", "VLMEvalKit TSV", "RefCOCO JSONL", "CogVLM-SFT-311K", "pictures with one prompt"]
)
def test_a_picture_that_is_no_file_is_told(tmp_path: Path, kind: str) -> None:
    """A FIFO among the pictures was said to be absent."""
    data, prompt, fifo = tmp_path / "data", None, tmp_path / "data" / "0.png"
    data.mkdir()
    if kind == "JSONL":
        jsonl(data, "0.png")
    elif kind == "VLMEvalKit TSV":
        data = write_tsv(data / "x.tsv", {"index": 0, "image_path": "0.png", "question": "What?"})
    elif kind == "RefCOCO JSONL":
        (data / "x.jsonl").write_text(json.dumps({"image": "0.png", "sent": "it", "bbox": [1, 1, 2, 2]}))
        data = data / "x.jsonl"
    elif kind == "CogVLM-SFT-311K":
        fifo = sft(data, LABEL) / SFT_FOLDER / "images" / "00000000.jpg"
        fifo.unlink()
    else:
        prompt = "Describe it."
    os.mkfifo(fifo)
    source = open_source(data, prompt)
    assert source.kind == kind
    with pytest.raises(DataError, match=rf"{fifo.name}: is a FIFO or pipe"):
        list(source.samples())


def test_a_table_that_became_no_file_is_told(tmp_path: Path) -> None:
    """A picture in a table was read by waiting for whatever lay there."""
    path = write_tsv(tmp_path / "x.tsv", {"index": 0, "image": picture_cell(), "question": "What?"})
    (sample,) = open_source(path).samples()
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match=r"x\.tsv: is a FIFO or pipe"):
        check_picture(sample)

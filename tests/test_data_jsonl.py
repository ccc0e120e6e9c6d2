"""Contract: JSONL data sets become samples, and whatever is wrong in one is told with file and line."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vlmdeploy.data import jsonl
from vlmdeploy.data.jsonl import read_items
from vlmdeploy.data.samples import Sample, choose
from vlmdeploy.errors import DataError
from vlmdeploy.runtime.chat import Turn
from vlmdeploy.score.metrics import check_scorable

ASKED = {"role": "user", "content": "How many digits?"}
ANSWERED = {"role": "assistant", "content": "3"}
ROW = {
    "image": "images/0.png",
    "messages": [ASKED, ANSWERED],
    "task": "vqa",
    "kind": "how_many",
    "answer": "3",
    "boxes": [[1, 2, 3.5, 4]],
}


def read_samples(data: str | Path, default_task: str | None = None) -> Iterator[Sample]:
    return (read() for read in read_items(data, default_task))


def write(folder: Path, *rows: object) -> Path:
    """A data set with one picture; rows are objects, or lines as they are."""
    (folder / "images").mkdir()
    (folder / "images" / "0.png").touch()
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / "data.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    return folder


def changed(**changes: Any) -> dict[str, Any]:
    return {**ROW, **changes}


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in ROW.items() if name != key}


def test_a_row_becomes_a_sample(tmp_path: Path) -> None:
    (sample,) = read_samples(write(tmp_path, ROW))
    turns = (Turn("How many digits?"),)
    assert sample == Sample(tmp_path / "images/0.png", turns, "vqa", "how_many", "3", ((1.0, 2.0, 3.5, 4.0),))
    assert sample.conversation().images == (tmp_path / "images/0.png",)


def test_the_file_and_its_folder_are_the_same_data(tmp_path: Path) -> None:
    folder = write(tmp_path, ROW, changed(kind="sum"))
    assert list(read_samples(str(folder))) == list(read_samples(folder / "data.jsonl"))


def test_only_messages_and_task_are_needed(tmp_path: Path) -> None:
    (sample,) = read_samples(write(tmp_path, {"messages": [ASKED, ANSWERED], "task": "vqa"}))
    assert sample == Sample(None, (Turn("How many digits?"),), "vqa", "vqa", "3")
    assert sample.conversation().images == ()


def test_with_a_default_task_only_messages_are_needed(tmp_path: Path) -> None:
    bare, named = read_samples(write(tmp_path, {"messages": [ASKED, ANSWERED]}, ROW), default_task="chat")
    assert bare == Sample(None, (Turn("How many digits?"),), "chat", "chat", "3")
    assert named.task == "vqa"


def test_a_row_that_got_the_default_task_cannot_be_scored(tmp_path: Path) -> None:
    samples = list(read_samples(write(tmp_path, without("task")), default_task="chat"))
    with pytest.raises(DataError, match=r"question \"1\" \('How many digits\?'\): task \"chat\" has no metric"):
        check_scorable(samples)


def test_items_after_a_broken_one_can_be_read(tmp_path: Path) -> None:
    first, broken, last = read_items(write(tmp_path, ROW, b"{", changed(kind="sum")))
    assert (first().kind, last().kind) == ("how_many", "sum")
    with pytest.raises(DataError, match=r"data\.jsonl:2: not JSON"):
        broken()


def test_earlier_turns_stay_and_the_last_answer_is_the_reference(tmp_path: Path) -> None:
    again = {"role": "user", "content": "And the sum?"}
    row = {"messages": [ASKED, ANSWERED, again, {"role": "assistant", "content": "12"}], "task": "vqa"}
    (sample,) = read_samples(write(tmp_path, row))
    assert sample.turns == (Turn("How many digits?", "3"), Turn("And the sum?"))
    assert sample.answer == "12"


def test_an_answer_wins_over_the_assistants_message(tmp_path: Path) -> None:
    (sample,) = read_samples(write(tmp_path, changed(answer="three", template="vqa", extra=True)))
    assert (sample.answer, sample.template, sample.extra) == ("three", "vqa", True)


def test_a_question_without_a_reference_is_read(tmp_path: Path) -> None:
    (sample,) = read_samples(write(tmp_path, {"messages": [ASKED], "task": "vqa"}))
    assert sample.answer is None


def test_a_question_may_have_several_answers_or_options(tmp_path: Path) -> None:
    several = without("answer") | {"answers": ["three", "3", "3"]}
    first, second = read_samples(write(tmp_path, several, changed(options={"B": "many", "A": "few"}, answer="B")))
    assert (first.answer, first.references) == ("3", ("three", "3", "3"))
    assert (second.options, second.references) == ((("A", "few"), ("B", "many")), ("B",))


def test_empty_lines_and_a_byte_order_mark_are_skipped(tmp_path: Path) -> None:
    folder = write(tmp_path, b"\xef\xbb\xbf" + json.dumps(ROW).encode() + b"\r", b"", b"  ", ROW)
    assert len(list(read_samples(folder))) == 2


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (b'{"image": ', "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[1]", "holds a list of 1, expected an object"),
        (without("messages"), 'key "messages" is missing'),
        (without("task"), 'key "task" is missing'),
        (changed(task=3), '"task" is 3, expected a string'),
        (changed(messages="hello"), '"messages" is "hello", expected a list'),
        (changed(messages=["hello"]), 'message 0 is "hello"'),
        (changed(messages=[{"role": "user", "content": [1]}]), "message 0 is"),
        (changed(messages=[ANSWERED, ASKED]), "message 0 is from the assistant"),
        (changed(messages=[]), "the list of messages is empty"),
        (changed(image=7), '"image" is 7, expected a string'),
        (changed(image="images/none.png"), "images/none.png: no such file"),
        (changed(image="images"), "images: is a folder"),
        (changed(image="images/" * 20 + "none.png"), "images/none.png: no such file"),
        (changed(image="x" * 5000), "xxx...: cannot be read (File name too long)"),
        (changed(image="data:image/png;base64," + "A" * 9000), "AAA... is a data URL, expected the path of a file"),
        (changed(messages=[{"role": "x" * 5000, "content": ""}]), "message 0 has the role 'xxx"),
        (changed(answer=3), '"answer" is 3, expected a string'),
        (changed(answer="3\ud800"), '"answer" is not valid UTF-8 at character 1'),
        (changed(messages=[ASKED, {"role": "assistant", "content": "\udfff"}]), "the assistant's answer is not valid"),
        (changed(task="\ud800"), '"task" is not valid UTF-8 at character 0'),
        (changed(kind="\ud800"), '"kind" is not valid UTF-8 at character 0'),
        (b'{"messages": ' + b"[" * 20000, "not JSON (maximum recursion depth exceeded"),
        (changed(extra="yes"), '"extra" is "yes", expected true or false'),
        (changed(boxes={}), '"boxes" is {}, expected a list'),
        (changed(answers=["3"]), '"answers" is ["3"], expected a list of strings, in place of "answer"'),
        (without("answer") | {"answers": []}, '"answers" is [], expected a list of strings'),
        (without("answer") | {"answers": ["3", 3]}, '"answers" is ["3", 3], expected a list of strings'),
        (without("answer") | {"answers": "3"}, '"answers" is "3", expected a list'),
        (without("answer") | {"answers": ["\ud800"]}, '"answers" is not valid UTF-8'),
        (changed(options=["3"]), '"options" is ["3"], expected an object'),
        (changed(options={"AB": "3"}), '"options" has {"AB": "3"}, expected a letter from A to Z'),
        (changed(options={"A": 3}), '"options" has {"A": 3}, expected a letter from A to Z and a string'),
        (changed(boxes=[[1, 2, 3]]), "a box is [1, 2, 3]"),
        (changed(boxes=[[1, 2, 3, True]]), "a box is [1, 2, 3, true]"),
        (changed(boxes=[[1, 2, 3, float("nan")]]), "a box is [1, 2, 3, NaN]"),
        (changed(boxes=[[5, 2, 3, 4]]), "a box is [5, 2, 3, 4]"),
        (changed(boxes=[[1, 2, 3, 10**400]]), "a box is [1, 2, 3, 1000"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, row: object, told: str) -> None:
    samples = read_samples(write(tmp_path, ROW, b"", row))
    next(samples)
    with pytest.raises(DataError) as error:
        next(samples)
    assert str(error.value).startswith(f"{tmp_path / 'data.jsonl'}:3: ")
    assert told in str(error.value) and len(str(error.value)) < len(str(tmp_path)) * 2 + 300


@pytest.mark.parametrize("depth", range(850, 1050, 5))
def test_nesting_of_any_depth_is_told_or_read(tmp_path: Path, depth: int) -> None:
    """Where the row could just be read, the message that showed it ran out of stack."""
    row = b'{"messages": [], "task": ' + b"[" * depth + b"]" * depth + b"}"
    with pytest.raises(DataError, match=r"data\.jsonl:1: (nested more than 64 levels|not JSON \(maximum recursion)"):
        list(read_samples(write(tmp_path, row)))


def test_missing_data_is_told_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such file; expected a JSONL file or a folder"):
        read_samples(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no data\.jsonl"):
        read_samples(tmp_path)


def test_a_data_set_without_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no rows"):
        list(read_samples(write(tmp_path, b"", b" ")))


def many(task: str, count: int) -> list[Sample]:
    return [Sample(None, (Turn(str(number)),), task, task, "") for number in range(count)]


def test_choose_limits_every_task_and_keeps_the_order() -> None:
    mixed = [sample for pair in zip(many("vqa", 50), many("rec", 50), strict=True) for sample in pair] + many("reg", 3)
    chosen = choose(mixed, per_task=10, seed=1)
    assert Counter(sample.task for sample in chosen) == {"vqa": 10, "rec": 10, "reg": 3}
    assert [mixed.index(sample) for sample in chosen] == sorted(mixed.index(sample) for sample in chosen)


def test_choose_follows_the_seed_whatever_other_tasks_there_are() -> None:
    vqa, rec = many("vqa", 50), many("rec", 50)
    chosen = choose(vqa, 10, seed=1)
    assert choose(vqa, 10, seed=1) == chosen != choose(vqa, 10, seed=2)
    assert [sample for sample in choose(rec + vqa, 10, seed=1) if sample.task == "vqa"] == chosen


def test_a_line_without_end_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "LONGEST_LINE_BYTES", 1000)
    samples = read_samples(write(tmp_path, ROW, b"x" * 10_000, ROW))
    next(samples)
    with pytest.raises(DataError, match=r"data\.jsonl:2: is longer than 1,000 bytes, the most that a line may have"):
        next(samples)

"""Contract tests of examples/digits: honest splits, true answers, a lossless tokenizer, a data folder that is
whole or absent."""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

DIGITS = Path(__file__).parents[1] / "examples" / "digits"
NUM_SCENES = 300
NUM_TRAIN_DIGITS = 1437
TEXTS = ("", " ", "a  b", " two\tspaces \n\n", "Grüße, 世界 🙂!", "[[[1]]] ;;", "\x00\x7f", "Question:\nQuestion: 12")


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, Any]]:
    """The example's scripts, imported the way they import each other."""
    sys.path.insert(0, str(DIGITS))
    names = ("scenes", "questions", "make_data", "make_tokenizer")
    yield {name: importlib.import_module(name) for name in names}
    sys.path.remove(str(DIGITS))
    for name in names:
        del sys.modules[name]


@pytest.fixture(scope="module")
def scenes(modules: dict[str, Any]) -> Any:
    return modules["scenes"]


@pytest.fixture(scope="module")
def questions(modules: dict[str, Any]) -> Any:
    return modules["questions"]


@pytest.fixture(scope="module")
def batch(scenes: Any) -> Any:
    return scenes.DigitScenes("train").draw(NUM_SCENES, np.random.default_rng(1))


@pytest.fixture(scope="module")
def asked(questions: Any, batch: Any) -> list[tuple[Any, Any]]:
    """(scene, question) pairs."""
    rng = np.random.default_rng(2)
    drawn = [batch.scene(index) for index in range(NUM_SCENES)]
    return [(scene, question) for scene in drawn for question in questions.questions(scene, rng)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DIGITS / "tokenizer.json"))


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def middle_x(box: tuple[int, int, int, int]) -> float:
    return (box[0] + box[2]) / 2


def test_test_digits_are_the_last_360_and_no_others_train(scenes: Any) -> None:
    from sklearn.datasets import load_digits

    images = load_digits().images
    np.testing.assert_array_equal(scenes.load_digits("test").images * 16, images[NUM_TRAIN_DIGITS:])
    for split in ("train", "calib"):
        np.testing.assert_array_equal(scenes.load_digits(split).images * 16, images[:NUM_TRAIN_DIGITS])


def test_digits_read_from_a_file_are_the_same(scenes: Any, tmp_path: Path) -> None:
    scenes.write_digits(tmp_path / "digits.npz")
    stored, original = scenes.load_digits("test", tmp_path / "digits.npz"), scenes.load_digits("test")
    np.testing.assert_array_equal(stored.images, original.images)
    np.testing.assert_array_equal(stored.labels, original.labels)


def test_unknown_split_is_refused(scenes: Any) -> None:
    with pytest.raises(ValueError, match='unknown split "valid"'):
        scenes.DigitScenes("valid")


def test_equal_seeds_draw_equal_scenes(scenes: Any, batch: Any) -> None:
    again = scenes.DigitScenes("train").draw(NUM_SCENES, np.random.default_rng(1))
    for name in ("pixels", "digits", "boxes", "counts"):
        np.testing.assert_array_equal(getattr(again, name), getattr(batch, name))


@pytest.mark.parametrize("size_px", [64, 96])
def test_boxes_hold_exactly_the_ink(scenes: Any, monkeypatch: pytest.MonkeyPatch, size_px: int) -> None:
    """Without tint, clutter and noise, the pixels that differ clearly from the background are the boxes' own."""
    monkeypatch.setattr(scenes, "_add_clutter", lambda *_: None)
    monkeypatch.setattr(scenes, "_tints", lambda room, rng: np.zeros((len(room), 3), dtype=np.float32))
    flat = {"base": 0.0, "contrast": 1.0, "ink_side": 1.0, "noise": 0.0}

    def plain(count: int, rng: np.random.Generator) -> Any:
        levels = {name: np.full(count, value, dtype=np.float32) for name, value in flat.items()}
        return scenes._Looks(slope=np.zeros((count, 2), dtype=np.float32), **levels)

    monkeypatch.setattr(scenes._Looks, "draw", plain)
    drawn = scenes.DigitScenes("train", size_px=size_px).draw(40, np.random.default_rng(3))
    for index in range(40):
        levels = drawn.pixels[index, :, :, 0] / 255
        for x0, y0, x1, y1 in drawn.scene(index).boxes:
            inside = levels[y0:y1, x0:x1]
            assert min(edge.max() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1])) > 0.29
            levels[y0:y1, x0:x1] = 0
        assert levels.max() < 0.52, "more than the faint edges of two neighbouring digits lies outside the boxes"


def test_boxes_lie_inside_and_apart(batch: Any) -> None:
    for index in range(NUM_SCENES):
        covered = np.zeros((64, 64), dtype=np.int64)
        for x0, y0, x1, y1 in batch.scene(index).boxes:
            assert 0 <= x0 < x1 <= 64
            assert 0 <= y0 < y1 <= 64
            covered[y0:y1, x0:x1] += 1
        assert covered.max() == 1


def test_unused_slots_are_marked(batch: Any) -> None:
    unused = np.arange(4) >= batch.counts[:, None]
    assert (batch.digits[unused] == -1).all()
    assert (batch.boxes[unused] == 0).all()
    assert set(batch.counts.tolist()) == {1, 2, 3, 4}


def test_crowded_scene_falls_back_to_one_digit_in_each_quarter(scenes: Any) -> None:
    sizes = np.full((1, 4, 2), 32)
    corners = scenes._place_freely(sizes, np.ones((1, 4), dtype=np.bool_), 64, np.random.default_rng(0))
    assert sorted(map(tuple, corners[0].tolist())) == [(0, 0), (0, 32), (32, 0), (32, 32)]


def test_patch_targets_name_the_covering_digit(scenes: Any) -> None:
    dense = scenes.DigitScenes("train").draw_dense(20, np.random.default_rng(4))
    targets = scenes.patch_targets(dense, 8)
    assert 7 < dense.counts.mean() < 9
    for index in range(20):
        for patch in range(64):
            x, y = patch % 8 * 8, patch // 8 * 8
            shares = {
                box: max(0, min(x + 8, box[2]) - max(x, box[0])) * max(0, min(y + 8, box[3]) - max(y, box[1])) / 64
                for box in dense.scene(index).boxes
            }
            box = max(shares, key=lambda each: shares[each])
            if shares[box] < 0.25:
                assert targets.classes[index, patch] == scenes.BACKGROUND
            else:
                found = tuple(targets.boxes[index, patch].tolist())
                assert shares[found] == shares[box]
                label = dense.scene(index).digits[dense.scene(index).boxes.index(found)]
                assert targets.classes[index, patch] == label


def test_every_scene_is_asked_every_kind_that_applies(questions: Any, asked: list[tuple[Any, Any]]) -> None:
    number = {kind: sum(question.kind == kind for _, question in asked) for kind in questions.KINDS}
    assert [number[kind] for kind in ("how_many", "largest", "sum", "is_there", "reg")] == [NUM_SCENES] * 5
    assert min(number["caption"], number["which"]) > 0.97 * NUM_SCENES
    assert number["rec"] > 0.9 * NUM_SCENES
    assert number["left_right"] > 0.55 * NUM_SCENES


def test_digit_lists_and_numbers_are_true(asked: list[tuple[Any, Any]]) -> None:
    for scene, question in asked:
        digits = [digit for _, digit in sorted(zip(map(middle_x, scene.boxes), scene.digits, strict=True))]
        extremes = {"What is the leftmost digit?": digits[0], "What is the rightmost digit?": digits[-1]}
        expected = {
            "which": " ".join(map(str, digits)),
            "how_many": str(len(digits)),
            "largest": str(max(digits)),
            "sum": str(sum(digits)),
            "outermost": str(extremes.get(question.text)),
            "caption": "".join(map(str, digits)),
        }
        given = "".join(re.findall(r"\d", question.answer)) if question.kind == "caption" else question.answer
        assert given == expected.get(question.kind, given)


def test_left_and_right_are_true_clear_and_balanced(asked: list[tuple[Any, Any]]) -> None:
    answers = []
    for scene, question in asked:
        if question.kind != "left_right":
            continue
        match = re.fullmatch(r"Is the (\d) (left|right) of the (\d)\?", question.text)
        assert match is not None
        first, second = int(match[1]), int(match[3])
        assert scene.digits.count(first) == scene.digits.count(second) == 1
        gap = middle_x(scene.boxes[scene.digits.index(second)]) - middle_x(scene.boxes[scene.digits.index(first)])
        assert abs(gap) >= 4
        assert question.answer == ("yes" if (gap > 0) == (match[2] == "left") else "no")
        answers.append((match[2], question.answer))
    for pair in (("left", "yes"), ("left", "no"), ("right", "yes"), ("right", "no")):
        assert 0.15 < answers.count(pair) / len(answers) < 0.35


def test_is_there_is_true_and_balanced(asked: list[tuple[Any, Any]]) -> None:
    answers = []
    for scene, question in asked:
        if question.kind == "is_there":
            assert question.answer == ("yes" if int(question.text[-2]) in scene.digits else "no")
            answers.append(question.answer)
    assert 0.4 < answers.count("yes") / len(answers) < 0.6


def test_rec_and_reg_agree_with_the_boxes(scenes: Any, asked: list[tuple[Any, Any]]) -> None:
    for scene, question in asked:
        if question.task not in ("rec", "reg"):
            continue
        digit, written = (
            (question.text, question.answer) if question.task == "rec" else (question.answer, question.text)
        )
        value = int(re.findall(r"\d", digit)[0])
        assert question.task == "reg" or scene.digits.count(value) == 1
        (box,) = question.boxes
        assert scene.digits[scene.boxes.index(box)] == value
        match = re.search(r"\[\[(\d{3}),(\d{3}),(\d{3}),(\d{3})\]\]", written)
        assert match is not None
        assert [round(int(part) * 64 / 1000) for part in match.groups()] == list(box)


def test_boxes_are_written_in_thousandths(questions: Any) -> None:
    assert questions.box_text((0, 1, 32, 64), 64) == "[[000,016,500,999]]"


def test_mix_sets_the_number_of_questions(questions: Any, batch: Any) -> None:
    index = int(np.flatnonzero(batch.counts == 4)[0])
    rng = np.random.default_rng(5)
    drawn = [questions.questions(batch.scene(index), rng, {"sum": 0.5, "reg": 2.0}) for _ in range(200)]
    assert 60 < sum(question.kind == "sum" for each in drawn for question in each) < 140
    assert all(len({question.text for question in each}) == len(each) <= 3 for each in drawn)


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(ids(tokenizer, text)) == text


def test_prompt_and_answer_encode_alike_together_and_apart(tokenizer: Tokenizer, asked: list[tuple[Any, Any]]) -> None:
    history: list[int] = []
    for label in ("Answer:", "Short answer:"):
        for _, question in asked[:400]:
            prompt = f"Question: {question.text} {label}"
            history = ids(tokenizer, prompt) + ids(tokenizer, question.answer)
            assert ids(tokenizer, f"{prompt} {question.answer}") == history
            next_turn = ids(tokenizer, f"{prompt} {question.answer}\n{prompt}")
            assert next_turn[: len(history)] == history


def test_tasks_need_no_byte_tokens(tokenizer: Tokenizer, asked: list[tuple[Any, Any]]) -> None:
    for _, question in asked:
        chat = f"Question: {question.text} Answer: {question.answer}\nQuestion: {question.text} Short answer:"
        tokens = tokenizer.encode(chat, add_special_tokens=False).tokens
        assert not [token for token in tokens if token.startswith("<") or token == "\u2581"]


def test_each_digit_is_a_token(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("[[086,540,400,760]]", add_special_tokens=False).tokens
    assert tokens == ["\u2581[[", *"086,540,400,760", "]]"]
    assert tokenizer.encode("7 17", add_special_tokens=False).tokens == ["\u25817", "\u25811", "7"]


def test_tokenizer_file_is_what_the_script_builds(modules: dict[str, Any], tokenizer: Tokenizer) -> None:
    assert json.loads(tokenizer.to_str()) == json.loads(modules["make_tokenizer"].build_tokenizer().to_str())
    assert [tokenizer.token_to_id(token) for token in ("<unk>", "<s>", "</s>")] == [0, 1, 2]
    assert tokenizer.get_vocab_size() <= 400


def run_make_data(modules: dict[str, Any], out: Path, *more: str, count: str = "5") -> int:
    status: int = modules["make_data"].main(["--split", "test", "--count", count, "--out", str(out), *more])
    return status


def test_data_folder_has_one_row_per_question(modules: dict[str, Any], tmp_path: Path) -> None:
    from PIL import Image

    assert run_make_data(modules, tmp_path / "data") == 0
    rows = [json.loads(line) for line in (tmp_path / "data" / "data.jsonl").read_text().splitlines()]
    assert len({row["image"] for row in rows}) == 5
    for row in rows:
        extra = ["extra"] if row["kind"] in ("is_there", "outermost") else []
        assert list(row) == ["image", "messages", "task", "kind", "answer", "boxes", *extra]
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert row["messages"][1]["content"] == row["answer"]
        with Image.open(tmp_path / "data" / row["image"]) as image:
            assert (image.mode, image.size) == ("RGB", (64, 64))


def test_data_depends_on_arguments_only(modules: dict[str, Any], tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert run_make_data(modules, tmp_path / name, "--seed", seed) == 0
    folders = [{path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.*")} for name in "abc"]
    assert folders[0] == folders[1] != folders[2]


def test_splits_draw_different_layouts(modules: dict[str, Any]) -> None:
    firsts = {split: next(modules["make_data"].draw_scenes(split, 1, 0))[1] for split in ("train", "calib", "test")}
    assert len({scene.boxes for scene in firsts.values()}) == 3


def test_existing_folder_is_kept(modules: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    for more in ((), ("--force",)):
        assert run_make_data(modules, tmp_path / "mine", *more) == 1
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "letter.txt"]


def test_force_replaces_only_what_the_script_made(modules: dict[str, Any], tmp_path: Path) -> None:
    assert run_make_data(modules, tmp_path / "data", count="3") == 0
    assert run_make_data(modules, tmp_path / "data", count="2") == 1
    assert run_make_data(modules, tmp_path / "data", "--force", count="2") == 0
    assert len(list((tmp_path / "data" / "images").iterdir())) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_failed_run_leaves_nothing_behind(
    modules: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(modules["make_data"], "data_row", full_disk)
    assert run_make_data(modules, tmp_path / "data") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [("--count", "0"), ("--count", "x"), ("--seed", "-1"), ("--split", "valid")])
def test_wrong_usage_exits_with_2(modules: dict[str, Any], tmp_path: Path, bad: tuple[str, str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run_make_data(modules, tmp_path / "data", *bad)
    assert stop.value.code == 2

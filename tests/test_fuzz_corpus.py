"""Regression tests: every input that ever broke a reader is read again. The search for more starts from valid inputs,
so that it does not stop at the first check."""

import json
from pathlib import Path

import pytest

from fuzz.__main__ import CORPUS
from fuzz.mutation import mutate
from fuzz.targets import TARGETS, Models, Room, make_models
from vlmdeploy.errors import VlmdeployError

KEPT = sorted(path for path in CORPUS.glob("*/*") if path.is_file())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("fuzz") / "models")


@pytest.mark.parametrize("name", TARGETS)
def test_search_starts_from_valid_inputs(name: str, models: Models, tmp_path: Path) -> None:
    room = Room(name, models, tmp_path / "room")
    for seed in room.target.seeds(models):
        room.check(seed)


@pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_input_that_once_broke_a_reader_is_read_or_refused_in_one_line(
    path: Path, models: Models, tmp_path: Path
) -> None:
    try:
        Room(path.parent.name, models, tmp_path / "room").check(path.read_bytes())
    except VlmdeployError as error:
        assert "\n" not in str(error)


def test_corpus_names_targets() -> None:
    assert {path.name for path in CORPUS.iterdir() if path.is_dir()} <= set(TARGETS)


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if target.is_json])
def test_values_of_json_are_changed(name: str, models: Models, tmp_path: Path) -> None:
    """Changes of bytes alone seldom leave a document that a reader looks into."""
    import random

    chance, seeds = random.Random(0), TARGETS[name].seeds(models)
    changed = [mutate(seeds[0], seeds, chance, is_json=True) for _ in range(60)]
    documents = 0
    for data in changed:
        try:
            documents += json.loads(data) != json.loads(seeds[0])
        except (ValueError, RecursionError):
            continue
    assert documents > 20

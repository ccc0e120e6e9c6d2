"""Contract tests of whole runs with a tiny model: the loss falls, a killed run goes on exactly, no folder is lost."""

import errno
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vlmdeploy.artifact import locked
from vlmdeploy.errors import ExportError, TrainingError
from vlmdeploy.model.load import load_model
from vlmdeploy.runtime.chat import Conversation, Tokenizer, Turn, prompt_ids
from vlmdeploy.train.batches import normalized
from vlmdeploy.train.config import StageConfig, load_config
from vlmdeploy.train.run import Result, run
from vlmdeploy.train.stages import dense_weight, learning_rate, progress_of
from vlmdeploy.train.state import STATE, Place, load_optimizer, load_place, save_state
from vlmdeploy.train.workers import uses_bfloat16

DIGITS = Path(__file__).parents[1] / "examples" / "digits"
DATA = '''
"""Bright and dark pictures; in the middle of the run a worker dies if the file "deadly" is there."""

import os
import signal
from pathlib import Path

import numpy as np

from vlmdeploy.runtime.chat import Turn
from vlmdeploy.train.training_data import ImageBatch

DEADLY = Path(__file__).with_name("deadly")


class Brightness:
    num_patch_classes = 2

    def draw(self, stage, count, progress, rng):
        if stage == "joint" and progress > 0.4 and DEADLY.exists():
            DEADLY.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        bright = rng.integers(2, size=count)
        pixels = (50 + 150 * bright[:, None, None, None] + rng.integers(0, 50, (count, 8, 8, 3))).astype(np.uint8)
        patches = np.repeat(bright[:, None], 4, 1)
        boxes = np.tile(np.array([0, 0, 1, 1], np.float32), (count, 4, 1)) * patches[..., None].astype(np.float32)
        dialogues = [[[Turn("How many?", "1"), Turn("What is the sum?", str(answer))]] for answer in bright]
        return ImageBatch(pixels, patches, boxes, dialogues)
'''
RECIPE = """
seed = 1
workers = 1
max_cpu_minutes = 100
save_every_s = 0
dtype = "auto"
tokenizer = "tokenizer.json"
data = "brightness.py"
data_class = "Brightness"
optimizer = { weight_decay = 0.01, beta1 = 0.9, beta2 = 0.98, momentum = 0.95, clip = 1.0 }

[text]
template = "chat"
row_tokens = 24
chunk_tokens = 24
end_weight = 1.0
box_units_weight = 1.0
box_marks_weight = 1.0

[[stages]]
name = "patches"
trains = "vision"
images = 80
dense_weight = 1.0
OTHERS
[[stages]]
name = "joint"
trains = "all"
images = 320
dense_weight = 0.2
average = 0.5
OTHERS
[model]
architectures = ["CogVLMForCausalLM"]
bos_token_id = 1
eos_token_id = 2
pad_token_id = 0
vocab_size = 320
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
num_attention_heads = 2

[model.vision_config]
image_size = 8
patch_size = 4
num_positions = 5
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 2
num_heads = 2
"""
STAGE = """batch_images = 8
lr = 5e-3
final_lr_share = 0.1
warmup_steps = 2
cpu_share = 0.5
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "brightness.py").write_text(DATA)
    shutil.copy(DIGITS / "tokenizer.json", tmp_path)
    (tmp_path / "train.toml").write_text(RECIPE.replace("OTHERS", STAGE))
    return tmp_path / "train.toml"


@pytest.fixture(autouse=True)
def random_state_is_left_alone() -> Iterator[None]:
    """Runs seed nothing outside themselves."""
    state = torch.random.get_rng_state()
    yield
    assert torch.equal(torch.random.get_rng_state(), state)


def train(recipe: Path, name: str = "out", force: bool = False) -> Result:
    return run(recipe, recipe.with_name(name), force, lambda stage, done, total: None)


def change(recipe: Path, old: str, new: str) -> None:
    text = recipe.read_text()
    assert old in text
    recipe.write_text(text.replace(old, new))


def answers(checkpoint: Path) -> list[str]:
    """What the model says to the sum of a dark and a bright picture."""
    model, tokenizer = load_model(checkpoint), Tokenizer.from_bytes((checkpoint / "tokenizer.json").read_bytes(), "")
    template = {template.name: template for template in model.spec.templates}["chat"]
    prompt = prompt_ids(Conversation((Turn("What is the sum?"),), ("picture",)), template, model.spec.tokens, tokenizer)
    pixels = torch.tensor([75, 225], dtype=torch.uint8)[:, None, None, None].expand(2, 8, 8, 3)
    new_ids = model.generate(torch.from_numpy(prompt).expand(2, -1), normalized(pixels, model.spec.image))
    return [tokenizer.decode(row) for row in new_ids.tolist()]


def test_run_lowers_the_loss_and_writes_a_checkpoint_that_answers(recipe: Path) -> None:
    change(recipe, "images = 320", "images = 2400")
    change(recipe, "save_every_s = 0", "save_every_s = 60")
    seen: list[tuple[str, int, int]] = []
    result = run(recipe, recipe.with_name("out"), False, lambda *shown: seen.append(shown))
    assert result.images == 2480
    assert result.losses["language"] < 0.5
    assert result.losses["accuracy"] > 0.9
    assert seen[-1][1:] == (2400, 2400)
    out = recipe.with_name("out")
    files = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "training.json"]
    assert sorted(path.name for path in out.iterdir()) == files
    assert not recipe.with_name("out.partial").exists()
    record = json.loads((out / "training.json").read_text())
    assert record["cpu_minutes"] > 0
    assert record["versions"]["torch"] == torch.__version__
    weights = load_file(out / "model.safetensors")
    assert {value.dtype for name, value in weights.items() if "inv_freq" not in name} == {torch.bfloat16}
    assert answers(out) == ["0", "1"]


def test_trained_cogvlm2_is_read_back_as_one(recipe: Path) -> None:
    change(recipe, "images = 320", "images = 8")
    change(recipe, "num_attention_heads = 2", 'num_attention_heads = 2\nnum_multi_query_heads = 1\nfamily = "cogvlm2"')
    train(recipe)
    config = json.loads((recipe.with_name("out") / "config.json").read_text())
    assert load_model(recipe.with_name("out")).spec.family == "cogvlm2" and "family" not in config


@pytest.mark.slow
def test_killed_run_continues_exactly_where_it_was(recipe: Path) -> None:
    whole = train(recipe, "whole")
    recipe.with_name("deadly").touch()
    with pytest.raises(TrainingError, match=r"a worker died .* continues from the last state"):
        train(recipe, "killed")
    assert not recipe.with_name("killed").exists()
    killed = train(recipe, "killed")
    assert (killed.images, killed.losses) == (whole.images, whole.losses)
    assert killed.cpu_minutes > whole.cpu_minutes, "the time of both attempts counts"
    first, second = (recipe.with_name(name) / "model.safetensors" for name in ("whole", "killed"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
def test_two_workers_end_together_when_one_dies(recipe: Path) -> None:
    change(recipe, "workers = 1", "workers = 2")
    recipe.with_name("deadly").touch()
    with pytest.raises(TrainingError, match="a worker"):
        train(recipe)
    assert train(recipe).images == 400


@pytest.mark.slow
def test_unfinished_run_of_another_recipe_is_refused_and_the_key_named(recipe: Path) -> None:
    recipe.with_name("deadly").touch()
    with pytest.raises(TrainingError):
        train(recipe)
    change(recipe, "images = 320", "images = 328")
    with pytest.raises(TrainingError, match=r'"stages\.1\.images" is 320 there and 328 now'):
        train(recipe)
    assert train(recipe, force=True).images == 408


def test_second_run_of_the_same_output_is_refused(recipe: Path) -> None:
    with locked(recipe.with_name("out.partial")), pytest.raises(ExportError, match="another run is writing it"):
        train(recipe)


def test_finished_run_is_left_alone(recipe: Path) -> None:
    change(recipe, "images = 320", "images = 8")
    train(recipe)
    before = (recipe.with_name("out") / "training.json").stat().st_mtime_ns
    assert train(recipe).message.startswith("trained already")
    assert (recipe.with_name("out") / "training.json").stat().st_mtime_ns == before
    change(recipe, "seed = 1", "seed = 2")
    with pytest.raises(ExportError, match="exists already"):
        train(recipe)
    assert train(recipe, force=True).message.startswith("trained: 88 images")


def test_unfinished_run_of_a_finished_output_is_removed(recipe: Path) -> None:
    """A run that was killed right after publishing left OUT.partial for ever."""
    change(recipe, "images = 320", "images = 8")
    train(recipe)
    partial = recipe.with_name("out.partial")
    partial.mkdir()
    (partial / "recipe.json").write_text(json.dumps(load_config(recipe).values))
    (partial / "state.pt").touch()
    assert train(recipe).message.startswith("trained already")
    assert not partial.exists()


def test_full_disk_is_told_by_its_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was "unexpected pos 1280 vs 1180", of an archive that could not be closed."""

    class FullDisk(io.BytesIO):
        def write(self, content: Any) -> int:
            if self.tell() > 1000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(content)

    monkeypatch.setattr("vlmdeploy.train.state.write_file", lambda path, write: write(FullDisk()))
    optimizer: Any = SimpleNamespace(state=lambda: {"values": torch.zeros(1000)})
    with pytest.raises(OSError, match="No space left on device"):
        save_state(tmp_path, Place(), optimizer)


def test_foreign_folder_is_never_replaced(recipe: Path) -> None:
    recipe.with_name("out").mkdir()
    (recipe.with_name("out") / "letter.txt").write_text("dear")
    with pytest.raises(ExportError, match="was not made by vlmdeploy"):
        train(recipe, force=True)
    assert (recipe.with_name("out") / "letter.txt").read_text() == "dear"


def test_data_class_that_is_none_is_named(recipe: Path) -> None:
    change(recipe, 'data_class = "Brightness"', 'data_class = "Darkness"')
    with pytest.raises(TrainingError, match=r'brightness.py: has no class "Darkness"'):
        train(recipe)


def stage(**changes: float) -> StageConfig:
    sizes = {"images": 1000, "batch_images": 10, "warmup_steps": 10}
    values = {"lr": 1.0, "final_lr_share": 0.1, "dense_weight": 0.5, "cpu_share": 1.0, **changes}
    return StageConfig(name="s", trains="all", **sizes, **values)  # type: ignore[arg-type]


def test_learning_rate_warms_up_and_falls_to_its_final_share() -> None:
    rates = [learning_rate(stage(), step, step / 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates.index(max(rates)) == 9
    assert rates[-1] == pytest.approx(0.1)
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_patch_losses_fade_out() -> None:
    assert [dense_weight(stage(), progress) for progress in (0.0, 0.5, 1.0)] == [0.5, 0.25, 0.0]


def test_slow_machine_gets_a_shorter_schedule() -> None:
    assert progress_of(stage(), images=300, cpu_s=30, budget_s=100) == 0.3
    assert progress_of(stage(), images=100, cpu_s=51, budget_s=100) == pytest.approx(0.5)
    assert progress_of(stage(), images=600, cpu_s=100, budget_s=100) == 1.0


def test_bfloat16_is_a_choice_or_the_processors() -> None:
    assert uses_bfloat16("bfloat16")
    assert not uses_bfloat16("float32")
    assert uses_bfloat16("auto") in (True, False)


# What lies in the folders of a run is data


class Bomb:
    """A pickle that makes a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def saved_state(folder: Path, **changes: Any) -> Path:
    content = {
        **vars(Place()),
        "values": torch.ones(3),
        "first": torch.ones(3),
        "second": torch.ones(2),
        "num_steps": 1,
    }
    torch.save(content | changes, folder / STATE)
    return folder


def test_a_saved_state_is_read(tmp_path: Path) -> None:
    assert load_place(saved_state(tmp_path, step=3, stage=1), 2).step == 3


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"stage": 2}, "of stage 2, the recipe has 2"),
        ({"stage": -1}, '"stage" is missing or of another kind'),
        ({"step": True}, '"step" is missing or of another kind'),
        ({"average": None}, '"average" is missing or of another kind'),
        ({"losses": torch.zeros(4)}, "of stage 0, the recipe has 2"),
        ({"num_steps": 1.5}, '"num_steps" is missing or of another kind'),
    ],
)
def test_a_state_of_other_kinds_is_told(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    """Every one of these was a KeyError, an IndexError or a TypeError, or trained something else."""
    with pytest.raises(TrainingError, match=rf"state\.pt: damaged \({told}\); remove .* to start over"):
        load_place(saved_state(tmp_path, **changes), 2)


def test_the_state_of_another_model_is_told(tmp_path: Path) -> None:
    class Other:
        values, first, second = torch.ones(4), torch.ones(4), torch.ones(2)

    with pytest.raises(TrainingError, match=r"state\.pt: damaged \(values is \[3\], expected \[4\]\)"):
        load_optimizer(saved_state(tmp_path), Other())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "write", [lambda file, bomb: pickle.dump(bomb, file), lambda file, bomb: torch.save(bomb, file)]
)
def test_a_state_that_would_run_code_is_refused(tmp_path: Path, write: Callable[[Any, Bomb], Any]) -> None:
    """The message ran over thirty lines of advice on how to run the code after all."""
    with (tmp_path / STATE).open("wb") as file:
        write(file, Bomb(tmp_path / "mark"))
    with pytest.raises(TrainingError, match=r"state\.pt: damaged \(.{10,200}\); remove .* to start over$"):
        load_place(tmp_path, 1)
    assert not (tmp_path / "mark").exists()


def test_a_state_that_is_no_file_is_told(tmp_path: Path) -> None:
    """A FIFO counted as absent: the run started over and replaced it."""
    os.mkfifo(tmp_path / STATE)
    with pytest.raises(TrainingError, match=r"state\.pt: is a FIFO or pipe"):
        load_place(tmp_path, 1)


def test_only_the_recipe_that_was_given_names_code(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder that the command is given in, the unfinished run and the finished one hold code and name it."""
    here = recipe.with_name("here")
    here.mkdir()
    for name in ("brightness.py", "multiprocessing.py", "json.py", "vlmdeploy.py"):
        (here / name).write_text(f"from pathlib import Path\nPath({str(here / 'mark')!r}).touch()\n")
    change(recipe, "images = 320", "images = 8")
    values = load_config(recipe).values | {"data": str(here / "brightness.py")}
    for folder, name, content in (("out.partial", "recipe.json", values), ("out", "training.json", {"recipe": values})):
        recipe.with_name(folder).mkdir()
        (recipe.with_name(folder) / name).write_text(json.dumps(content))
    monkeypatch.chdir(here)
    with pytest.raises(ExportError, match="exists already"):
        train(recipe)
    train(recipe, force=True)
    assert not (here / "mark").exists()


@pytest.mark.parametrize(("key", "value"), [("images", None), ("images", "many"), ("losses", [1])])
def test_a_finished_run_whose_record_is_damaged_is_told(recipe: Path, key: str, value: Any) -> None:
    """It was a KeyError."""
    record = {"recipe": load_config(recipe).values, "cpu_minutes": 1, "wall_minutes": 1, "images": 3, "losses": {}}
    recipe.with_name("out").mkdir()
    kept = {name: found for name, found in {**record, key: value}.items() if found is not None}
    (recipe.with_name("out") / "training.json").write_text(json.dumps(kept))
    with pytest.raises(TrainingError, match=rf'training\.json: (key )?"{key}" is'):
        train(recipe)

"""Contract tests of training recipes: each wrong key or value is named with its file."""

import tomllib
from pathlib import Path

import pytest

from vlmdeploy.errors import ConfigError
from vlmdeploy.records import first_difference
from vlmdeploy.train.config import load_config

DIGITS = Path(__file__).parents[1] / "examples" / "digits"
RECIPE = (DIGITS / "train.toml").read_text(encoding="utf-8")


def write_recipe(folder: Path, *changes: tuple[str, str]) -> Path:
    """The digits recipe with some text replaced, beside the files it names."""
    text = RECIPE
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    for name in ("tokenizer.json", "training_data.py"):
        (folder / name).write_bytes((DIGITS / name).read_bytes())
    (folder / "train.toml").write_text(text, encoding="utf-8")
    return folder / "train.toml"


def test_digits_recipe_is_read() -> None:
    config = load_config(DIGITS / "train.toml")
    assert [stage.trains for stage in config.recipe.stages] == ["vision", "all"]
    assert (config.spec.family, config.spec.vision.num_patches) == ("cogvlm", 64)
    assert config.tokenizer_path == DIGITS / "tokenizer.json"


IDS = "bos_token_id = 1\neos_token_id = 2\npad_token_id = 0\n"
OTHER_IDS = "bos_token_id = 301\neos_token_id = 302\npad_token_id = 303\n"
KV_HEADS = "num_multi_query_heads = 2\n"
RELEASED_IDS = "bos_token_id = 128000\neos_token_id = 128001\npad_token_id = 128002\n"


@pytest.mark.parametrize(
    ("ids", "family"),
    [
        (IDS, "cogvlm"), (IDS + KV_HEADS, "cogvlm2"), (OTHER_IDS + KV_HEADS, "cogvlm2"),
        (OTHER_IDS + 'family = "cogvlm"\n', "cogvlm"), (OTHER_IDS + KV_HEADS + 'family = "cogvlm2"\n', "cogvlm2"),
        (RELEASED_IDS + KV_HEADS, "cogvlm2"),
    ],
)  # fmt: skip
def test_model_is_of_the_family_that_its_keys_tell(tmp_path: Path, ids: str, family: str) -> None:
    """Without tensors every recipe was read as CogVLM's: one of CogVLM2 trained another model than it described."""
    config = load_config(write_recipe(tmp_path, (IDS, ids), ("vocab_size = 320", "vocab_size = 128256")))
    assert config.spec.family == family
    assert "family" not in config.model_config, "config.json holds the published keys"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (OTHER_IDS, "\"family\" is missing, expected 'cogvlm' or 'cogvlm2'"),
        (OTHER_IDS + 'family = "glm4v"\n', "\"family\" is 'glm4v', expected 'cogvlm' or 'cogvlm2'"),
        (OTHER_IDS + "family = [2]\n", "\"family\" is [2], expected 'cogvlm' or 'cogvlm2'"),
        (KV_HEADS + 'family = "cogvlm"\n', "\"family\" is 'cogvlm', expected 'cogvlm2'"),
        (IDS + 'family = "cogvlm2"\n', "\"family\" is 'cogvlm2', expected 'cogvlm'"),
        (RELEASED_IDS + 'family = "cogvlm"\n', "\"family\" is 'cogvlm', expected 'cogvlm2'"),
    ],
)
def test_family_that_the_keys_leave_open_or_exclude_is_asked_for(tmp_path: Path, ids: str, message: str) -> None:
    path = write_recipe(tmp_path, (IDS, ids))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: [model]: {message} (as the other keys allow; ")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed = 0", "sede = 0", '"sede" is unknown'),
        ("seed = 0", "", 'key "seed" is missing'),
        ("seed = 0", "seed = 0.5", '"seed" is 0.5, expected a whole number'),
        ("seed = 0", "seed = true", '"seed" is true, expected a whole number'),
        ("workers = 2", "workers = 0", '"workers" is 0'),
        ("workers = 2", "workers = 3", '"stages.0.batch_images" is 32, expected a multiple of the 3 workers'),
        ('dtype = "auto"', 'dtype = "float16"', '"dtype" is "float16", expected \'auto\' or'),
        ('tokenizer = "tokenizer.json"', 'tokenizer = "none.json"', '"tokenizer" is .*none.json.*no such file'),
        (
            'tokenizer = "tokenizer.json"',
            'tokenizer = "training_data.py"',
            '"tokenizer" is .*expected a tokenizer.json',
        ),
        ("seed = 0", f"seed = 0x{'f' * 5000}", "holds a number of more than 64 digits"),
        ("seed = 0", f"seed = {10**30}", '"seed" is 10*, expected a whole number below 9.2e18'),
        ("num_heads = ", "made = 1979-05-27\nnum_heads = ", "holds a date or a time"),
        ("beta1 = 0.9", 'beta1 = "much"', '"optimizer.beta1" is "much", expected a number'),
        ("momentum", "momentun", '"optimizer.momentun" is unknown'),
        ('template = "chat"', 'template = "letter"', "\"text.template\" is 'letter', expected chat or"),
        ("chunk_tokens = 38", "chunk_tokens = 37", '"text.row_tokens" is 114, expected a multiple'),
        ("lr = 2e-3", "lr = -1.0", '"stages.0.lr" is -1.0, expected more than 0'),
        ("final_lr_share = 0.07", "final_lr_share = 7", '"stages.0.final_lr_share" is 7.0'),
        ("cpu_share = 0.2", "cpu_share = 0.5", '"stages" is 1.3, expected shares'),
        ('trains = "vision"', 'trains = "sight"', '"stages.0.trains" is "sight"'),
        ('trains = "all"', 'trains = "vision"', '"stages" is .* then at least one for "all"'),
        ("patch_size = 8", "patch_size = 7", r"\[model\]: .*patch_size"),
        ("hidden_size = 128", "", r"\[model\]: .*hidden_size"),
        ("seed = 0", "seed = ", "not TOML"),
    ],
)
def test_wrong_value_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = write_recipe(tmp_path, (old, new))
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


def test_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: no such file; expected a training recipe"):
        load_config(tmp_path / "none.toml")


def test_first_difference_names_the_key() -> None:
    ours, theirs = tomllib.loads(RECIPE), tomllib.loads(RECIPE)
    assert first_difference(ours, theirs) is None
    theirs["stages"][1]["lr"] = 1.0
    assert first_difference(ours, theirs) == ("stages.1.lr", 0.002, 1.0)
    del theirs["optimizer"]["clip"]
    assert first_difference(ours, theirs) == ("optimizer.clip", 1.0, None)

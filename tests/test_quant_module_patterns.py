"""Reference: patterns of modules against Python's `re`. Regression: hostile ones are refused, or matched at once."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.gptq_checkpoint import write_gptq_checkpoint
from vlmdeploy.errors import ConfigError
from vlmdeploy.model.checkpoint import Checkpoint
from vlmdeploy.quant.module_patterns import MOST_CHARACTERS, MOST_PATTERNS, check_patterns, matches

NAMES = (
    "model.layers.31.self_attn.vision_expert_query_key_value",
    "model.layers.3.mlp.language_mlp.gate_proj",
    "model.vision.linear_proj.dense_4h_to_h",
    "lm_head",
    "a.b",
    "aab",
    "",
)
PATTERNS = (
    "a", ".", "a.b", r"a\.b", "^a", "a^", "b$", "^a.b$", "$", "^$", "a*", "a*b", "a+b", "a?b", ".*b", ".*", ".+?b",
    "a*?a*b", "[^l]", r"[\w.]*proj$", "[a-c]+$", r"[-.\]a]+b", "x*x*x*b", "((((a))))", r"model\.layers\.\d+\.mlp",
    r"^model\.layers\.(?:3|31|11)\.self", r".*\.31\..*query", r".*\.(?:[0-9]|3[01])\..*(gate|up)", r"\Smodel",
    r"\Dm_head", r"model\.layers\.\d{1,2}\.", r"model\.layers\.\d{2}\.", r"model\.layers\.\d{2,}\.",
    r"model\.layers\.\d{0}3", "(a|aa)(a|b)?b", "a||b", "(|a)(|a)b", "(?:lm_head|mlp)", "(?P<part>model).*",
    "(?:.*mlp)?.*proj", "(^a|b)", "a{1,2}b", "a{2}b", "(?:a|b)?(?:a|b)?b$",
)  # fmt: skip
REFUSED = (
    "(a+)+$", "(a|a)*b", "(a|aa){30}", "(?:a?){80}", "(?=a)a", "(?!a)b", "(?<=a)b", r"(a)\1", r"a\b", r"a\Z", "(?i)a",
    "a*+", "a++", "a??+", "a{2}{3}", "a**", "(a", "a)", "[a", "*a", "[z-a]", "[]", "a{21}", "a{3,2}", "{", "a{",
    "(?:(?:(?:(?:(?:(?:(?:(?:(?:(?:(?:a)))))))))))", "[[a]", "[a--b]", "[a&&b]", "\\",
)  # fmt: skip


@pytest.mark.parametrize("pattern", ["", *PATTERNS])
def test_the_same_names_match_as_with_re(pattern: str) -> None:
    check_patterns([pattern], "here")
    for name in NAMES:
        assert matches(pattern, name) == (re.match(pattern, name) is not None), name


@pytest.mark.parametrize("pattern", REFUSED)
def test_what_is_not_understood_is_refused(pattern: str) -> None:
    """A pattern such as (a+)+$ was matched for ever."""
    with pytest.raises(ConfigError, match=r"^here: .*: not a regular expression that is read, from '.*' on"):
        check_patterns(["a", pattern], "here")


@pytest.mark.parametrize(
    "pattern", [".*" * 2000 + "!", ".?" * 2000 + "!", "(?:.|.)" * 500 + "!", ".{0,20}" * 500 + "!"]
)
def test_no_pattern_takes_long(pattern: str) -> None:
    """With `re`, each of these takes longer than anybody lives."""
    check_patterns([pattern], "here")
    assert not any(matches(pattern, name) for name in NAMES)


def test_a_checkpoint_whose_patterns_would_never_end_is_refused(tmp_path: Path) -> None:
    folder = write_gptq_checkpoint(tmp_path / "ckpt", config={"dynamic": {r"(?:\w*\.?)*!": {"bits": 8}}})
    with pytest.raises(ConfigError, match=r"config\.json: quantization_config: dynamic: .*: not a regular expression"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    "dynamic", [{f"a{number}": {} for number in range(MOST_PATTERNS + 1)}, {"a" * (MOST_CHARACTERS + 1): {}}]
)
def test_more_patterns_than_any_checkpoint_has_are_refused(tmp_path: Path, dynamic: dict[str, Any]) -> None:
    folder = write_gptq_checkpoint(tmp_path / "ckpt")
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 16, "dynamic": dynamic}))
    with pytest.raises(ConfigError, match=r"dynamic: has \d+ patterns with \d+ characters, at most 2000 with 50000"):
        Checkpoint(folder)

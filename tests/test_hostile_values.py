"""Contract test: whatever a caller of the public functions gives, it gets an answer or an error of ours in one line."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import vlmdeploy
from tests.tiny_bundle import picture
from vlmdeploy.errors import LONGEST_MESSAGE, VlmdeployError, one_line
from vlmdeploy.runtime.session import Session

LARGE = [10**18, 2**63, -(2**70), 10**400]
WORDS = [
    "user",
    "assistant",
    "system",
    "text",
    "image",
    "image_url",
    "role",
    "content",
    "type",
    "url",
    "data:image/png;base64,",
]
TEXTS = st.one_of(
    st.sampled_from(WORDS), st.text(max_size=8), st.sampled_from(["\ud800", "\x1b[2J", "a\0b", "x" * 9000])
)
NUMBERS = st.one_of(st.integers(-3, 300), st.floats(), st.sampled_from(LARGE), st.booleans())
ARRAYS = st.sampled_from([
    np.zeros((1, 3, 56, 56), np.float32), np.full((1, 3, 56, 56), np.nan), np.zeros((2, 2)), np.array(5), np.array("a"),
    np.arange(4), np.array([1, 300]), np.array([2**63], np.uint64), np.array([None]), np.zeros((0, 3)), np.array([1j]),
])  # fmt: skip
PLAIN = st.one_of(st.none(), NUMBERS, TEXTS, st.binary(max_size=8), ARRAYS, st.just(picture()), st.just(object()))
VALUES = st.recursive(
    PLAIN, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)), max_leaves=6
)
PARTS = st.lists(st.fixed_dictionaries({"type": st.sampled_from(WORDS)}, optional={
    "text": VALUES, "image": VALUES, "image_url": st.one_of(VALUES, st.fixed_dictionaries({"url": VALUES})),
}), max_size=3)  # fmt: skip
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(WORDS[:3]), "content": st.one_of(VALUES, PARTS)}), max_size=3
)
OPTIONS = st.dictionaries(
    st.sampled_from(
        ["temperature", "top_k", "top_p", "repetition_penalty", "seed", "max_new_tokens", "stop", "template"]
    ), VALUES, max_size=3,
)  # fmt: skip

few = settings(
    max_examples=150, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@pytest.fixture(scope="module")
def session(answering_bundle: Path) -> Session:
    return vlmdeploy.open(answering_bundle, threads=1)


def answered(call: Callable[[], Any]) -> None:
    """Make a call; an error must be ours, and one line."""
    try:
        call()
    except VlmdeployError as error:
        assert one_line(str(error)) == str(error) and len(str(error)) <= LONGEST_MESSAGE + 20


@few
@given(messages=st.one_of(VALUES, MESSAGES), options=OPTIONS)
def test_generate_takes_anything(session: Session, messages: Any, options: dict[str, Any]) -> None:
    answered(lambda: list(islice(session.generate(messages, **options), 3)))


@few
@given(conversations=st.one_of(VALUES, st.lists(MESSAGES, max_size=2)), template=VALUES)
def test_generate_batch_takes_anything(session: Session, conversations: Any, template: Any) -> None:
    from vlmdeploy.runtime.sampling import SamplingOptions

    answered(lambda: session.generate_batch(conversations, SamplingOptions(max_new_tokens=1), template))


@few
@given(ids=VALUES, images=VALUES, count=VALUES)
def test_ids_take_anything(session: Session, ids: Any, images: Any, count: Any) -> None:
    answered(lambda: session.generate_ids(ids, images, count))
    answered(lambda: session.logits(ids, images, count))
    answered(lambda: session.generate_ids_batch([(ids, images)], 1))
    answered(lambda: session.generate_ids_batch(ids, count))


@few
@given(options=st.dictionaries(
    st.sampled_from(
        ["check", "provider", "threads", "residency", "trust", "follow_links", "allow_local", "image_limits"]
    ), VALUES, min_size=1, max_size=2,
))  # fmt: skip
def test_open_takes_anything(answering_bundle: Path, options: dict[str, Any]) -> None:
    answered(lambda: vlmdeploy.open(answering_bundle, **options).close())


@few
@given(folder=VALUES)
def test_open_and_load_model_take_any_folder(folder: Any) -> None:
    answered(lambda: vlmdeploy.open(folder))
    answered(lambda: vlmdeploy.load_model(folder))

"""Fixtures that several test files share. Nothing here imports torch before a test asks for it: the runtime's tests
run without."""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import pytest

from tests.golden_cases import GOLDEN

if TYPE_CHECKING:
    from vlmdeploy.model.vlm import VisionLanguageModel

GoldenModels = Callable[[str], "VisionLanguageModel"]


@pytest.fixture(scope="session")
def golden_model() -> GoldenModels:
    """The PyTorch reference of a golden checkpoint by folder name, float32, loaded once. Do not change its weights."""
    from vlmdeploy import load_model

    return cache(lambda checkpoint: load_model(GOLDEN / checkpoint))

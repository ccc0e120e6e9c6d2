"""Agreement tests: the packed forward pass of training gives what the reference model gives for each pair alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.comparison import assert_close
from tests.tiny_checkpoint import TinyCheckpoint, write_checkpoint
from vlmdeploy.manifest import ImageRecipe
from vlmdeploy.model.load import load_model
from vlmdeploy.model.vlm import VisionLanguageModel
from vlmdeploy.train.batches import normalized
from vlmdeploy.train.config import TextConfig
from vlmdeploy.train.forward import TEXT_POSITION, head_logits, text_states, use_plain_attention
from vlmdeploy.train.packing import Pair, make_pair, pack_rows

SAME_FP32 = 1e-4  # the same float32 sums in another order, logits below 10
CHUNK = 8
TEXT = TextConfig("chat", 24, CHUNK, end_weight=0.5, box_units_weight=0.25, box_marks_weight=0.125)
LENGTHS = ((8, 5, 3, 7), (1, 2, 8, 8, 4), (6,))


@pytest.fixture(scope="module", params=["cogvlm", "cogvlm2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    """CogVLM2 has grouped heads, and a bias on the vision expert's QKV, which training once left out."""
    tiny = TinyCheckpoint(request.param)
    return load_model(write_checkpoint(tmp_path_factory.mktemp("tiny"), tiny.config(), tiny.tensors()))


def random_pair(length: int, rng: np.random.Generator) -> Pair:
    ids = rng.integers(3, 40, length + 1)
    return Pair(ids[:-1], ids[1:], np.ones(length, np.float32))


def image_prefix(model: VisionLanguageModel) -> torch.Tensor:
    tokens = model.spec.tokens
    return torch.tensor([tokens.bos_id] + [tokens.placeholder_id] * tokens.rows_per_image)


def test_packed_pairs_get_the_logits_they_get_alone(model: VisionLanguageModel) -> None:
    rng = np.random.default_rng(0)
    pairs = [[random_pair(length, rng) for length in lengths] for lengths in LENGTHS]
    text = pack_rows(pairs, TEXT, TEXT_POSITION)
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    before = image_prefix(model)
    with torch.no_grad():
        logits = head_logits(model, text_states(model, model.vision(images), text))
        for row in range(3):
            for number in range(int(text.pairs[row].max()) + 1):
                own = text.pairs[row] == number
                alone = model(torch.cat((before, text.ids[row][own]))[None], images[row : row + 1])[0, len(before) :]
                assert_close(f"pair {number} of row {row}", logits[row][own], alone, SAME_FP32)


def test_gradients_are_those_of_the_reference(model: VisionLanguageModel) -> None:
    rng = np.random.default_rng(1)
    text = pack_rows([[random_pair(8, rng)]], replace(TEXT, row_tokens=CHUNK), TEXT_POSITION)
    images = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    before = image_prefix(model)
    theirs = model(torch.cat((before, text.ids[0]))[None], images)[0, len(before) :]
    use_plain_attention(model.vision)
    ours = head_logits(model, text_states(model, model.vision(images), text))[0]
    parameters = dict(model.named_parameters())
    gradients = [
        torch.autograd.grad(logits.logsumexp(-1).sum(), list(parameters.values()), allow_unused=True)
        for logits in (ours, theirs)
    ]
    for name, our, their in zip(parameters, *gradients, strict=True):
        expected = torch.zeros_like(parameters[name]) if their is None else their
        assert_close(name, torch.zeros_like(expected) if our is None else our, expected, SAME_FP32)


def test_pair_that_does_not_fit_is_left_out() -> None:
    rng = np.random.default_rng(0)
    rows = pack_rows([[random_pair(length, rng) for length in (6, 5, 2)]], replace(TEXT, row_tokens=8), 4)
    assert rows.pairs[0].tolist() == [0] * 6 + [2] * 2
    assert rows.positions[0].tolist() == [4, 5, 6, 7, 8, 9, 4, 5]


def test_only_answer_and_end_are_learned() -> None:
    pair = make_pair(lambda text: [ord(char) for char in text], "ab", "12", 2, TEXT)
    assert pair.ids.tolist() == [97, 98, 49, 50]
    assert pair.targets.tolist() == [98, 49, 50, 2]
    assert pair.weights.tolist() == [0, 1, 1, 0.5]


def test_units_and_marks_of_a_box_weigh_less() -> None:
    def encode(text: str) -> list[int]:
        return [ord(char) for char in text.replace("[[", "[").replace("]]", "]")]

    pair = make_pair(encode, "x", "[[012,345,678,999]]", 2, TEXT)
    coordinate = [1, 1, 0.25, 0.125]
    assert pair.weights.tolist() == [0.125, *coordinate * 4, 0.5]


def test_pictures_are_prepared_as_in_the_runtime() -> None:
    from PIL import Image

    from vlmdeploy.runtime.image import preprocess

    recipe = ImageRecipe(8, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    expected = np.stack([preprocess(Image.fromarray(picture), recipe) for picture in pixels])
    np.testing.assert_array_equal(normalized(torch.from_numpy(pixels), recipe).numpy(), expected)

"""Agreement: answers in padded batches equal those of one prompt at a time, of a checkpoint and of a bundle; and the
contract of `validate`."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image
from tokenizers import decoders, models

from tests.conftest import GoldenModels
from vlmdeploy.data.samples import Sample
from vlmdeploy.errors import DataError, PromptError
from vlmdeploy.layout import Ints
from vlmdeploy.model.vlm import VisionLanguageModel
from vlmdeploy.runtime.chat import Tokenizer, Turn
from vlmdeploy.runtime.image import load_image, preprocess
from vlmdeploy.runtime.image_limits import ImageLimits
from vlmdeploy.score.answerers import BundleAnswerer, IdsAndImages, QuestionMaker, agreement, validate
from vlmdeploy.score.metrics import Prediction
from vlmdeploy.score.predictions import PredictionsAnswerer
from vlmdeploy.score.torch_answerer import TorchAnswerer
from vlmdeploy.spec.model import ModelSpec

NEW_TOKENS = 6


@pytest.fixture(scope="module")
def model(golden_model: GoldenModels) -> VisionLanguageModel:
    return golden_model("cogvlm-tiny")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Ids are 3 + byte."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    bytewise = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    bytewise.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return Tokenizer(bytewise)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Questions of many lengths about three pictures, rows without a picture among them."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name in "abc":
        Image.fromarray(rng.integers(0, 256, (40, 80, 3), np.uint8)).save(folder / f"{name}.png")
    asked = []
    for place, name in enumerate("aaabbbbcca-ab--c"):
        turns = (Turn("What is it?", "A sign."),) * (place % 2) + (Turn("Why? " * (place % 5)),)
        path = None if name == "-" else folder / f"{name}.png"
        asked.append(Sample(path, turns, ("vqa", "caption")[place % 3 == 0], "any", "a sign"))
    return asked


class OneByOne:
    """A runtime session that stands on the PyTorch reference."""

    def __init__(self, model: VisionLanguageModel, tokenizer: Tokenizer) -> None:
        self.model = model
        self.manifest: ModelSpec = model.spec
        self.tokenizer = tokenizer

    prompts_at_once = 1

    def generate_ids_batch(self, prompts: Sequence[IdsAndImages], max_new_tokens: int = 16) -> list[Ints]:
        ((ids, images),) = prompts
        pixels = None if images is None else torch.from_numpy(images)
        new_ids = self.model.generate(torch.from_numpy(ids)[None], pixels, max_new_tokens=max_new_tokens)
        return [new_ids[0].numpy()]

    def close(self) -> None:
        """Nothing is held."""


class SideBySide(OneByOne):
    """As a bundle with a routed decoder: several prompts at once; a prompt that is longer than `longest` is refused."""

    prompts_at_once = 3
    longest = 10**6

    def generate_ids_batch(self, prompts: Sequence[IdsAndImages], max_new_tokens: int = 16) -> list[Ints]:
        self.calls = [*getattr(self, "calls", []), len(prompts)]
        if max(len(ids) for ids, _ in prompts) > self.longest:
            raise PromptError("a prompt is too long")
        one = super().generate_ids_batch
        return [answer for prompt in prompts for answer in one([prompt], max_new_tokens)]


def test_bundle_answers_as_many_questions_at_once_as_it_takes(
    model: VisionLanguageModel, tokenizer: Tokenizer, samples: list[Sample]
) -> None:
    session = SideBySide(model, tokenizer)
    answers = list(BundleAnswerer(session, 2).answers(samples))
    assert answers == list(BundleAnswerer(OneByOne(model, tokenizer), 2).answers(samples))
    assert session.calls == [3] * 5 + [1]


def test_wrong_question_of_several_is_named(
    model: VisionLanguageModel, tokenizer: Tokenizer, samples: list[Sample]
) -> None:
    long = Sample(None, (Turn("How long? " * 20),), "vqa", "any", "very")
    session = SideBySide(model, tokenizer)
    session.longest = 150
    with pytest.raises(PromptError, match=r"^question 'How long\? .*: a prompt is too long"):
        list(BundleAnswerer(session, 1).answers([samples[9], long, samples[9]]))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_batches_answer_like_single_prompts(
    model: VisionLanguageModel, tokenizer: Tokenizer, samples: list[Sample], batch_size: int
) -> None:
    batched = list(TorchAnswerer(model, tokenizer, batch_size, NEW_TOKENS).answers(samples))
    single = list(BundleAnswerer(OneByOne(model, tokenizer), NEW_TOKENS).answers(samples))
    assert batched == single
    assert [prediction.sample for prediction in batched] == samples
    assert len({prediction.ids for prediction in batched}) > len(samples) // 2, "answers hardly depend on the prompt"
    assert {prediction.size_px for prediction in batched} == {(80, 40), None}


def test_every_picture_of_a_block_is_encoded_once(
    model: VisionLanguageModel, tokenizer: Tokenizer, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = model.encode_images

    def counted(images: torch.Tensor) -> torch.Tensor:
        encoded.append(len(images))
        return encode(images)

    monkeypatch.setattr(model, "encode_images", counted)
    list(TorchAnswerer(model, tokenizer, batch_size=2, max_new_tokens=1).answers(samples))
    assert encoded == [2, 1]


def test_an_answer_ends_before_its_stop_id(
    model: VisionLanguageModel, tokenizer: Tokenizer, samples: list[Sample]
) -> None:
    """One of the answer's own tokens is declared a stop id."""
    whole = next(TorchAnswerer(model, tokenizer, max_new_tokens=NEW_TOKENS).answers(samples)).ids
    tokens = replace(model.spec.tokens, stop_ids=(2, whole[3]))
    maker = QuestionMaker(replace(model.spec, tokens=tokens), tokenizer)
    prediction = maker.prediction(maker.question(samples[0]), whole)
    assert prediction.ids == whole[: whole.index(whole[3])]


def test_a_full_context_ends_the_answer(
    model: VisionLanguageModel, tokenizer: Tokenizer, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [prediction.ids for prediction in TorchAnswerer(model, tokenizer, 64, NEW_TOKENS).answers(samples)]
    lengths = [len(QuestionMaker(model.spec, tokenizer).question(sample).ids) for sample in samples]
    context = max(lengths) + 2
    monkeypatch.setattr(model, "spec", with_context(model.spec, context))
    cut = [prediction.ids for prediction in TorchAnswerer(model, tokenizer, 64, NEW_TOKENS).answers(samples)]
    assert cut == [ids[: context - length] for ids, length in zip(whole, lengths, strict=True)] != whole


def test_a_prompt_that_fills_the_context_is_an_error(
    model: VisionLanguageModel, tokenizer: Tokenizer, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "spec", with_context(model.spec, 40))
    with pytest.raises(PromptError, match="no room to answer"):
        list(TorchAnswerer(model, tokenizer).answers(samples))


def with_context(spec: ModelSpec, tokens: int) -> ModelSpec:
    return replace(spec, decoder=replace(spec.decoder, context_tokens=tokens))


def test_prompts_follow_the_rows_template_then_the_given_one(
    model: VisionLanguageModel, tokenizer: Tokenizer, samples: list[Sample]
) -> None:
    def prompt(template: str | None, row_template: str | None) -> str:
        sample = Sample(None, (Turn("Why?"),), "vqa", "vqa", "", template=row_template)
        ids = QuestionMaker(model.spec, tokenizer, template).question(sample).ids
        assert ids[0] == model.spec.tokens.bos_id
        return tokenizer.decode(ids.tolist()[1:])

    assert prompt(None, None) == "Question: Why? Answer:"
    assert prompt("vqa", None) == "Question: Why? Short answer:"
    assert prompt("vqa", "base") == "Why?"
    with pytest.raises(PromptError, match=r'template "poem" .* it has: '):
        prompt("poem", None)


def test_a_picture_of_another_size_than_the_data_says_is_not_asked_about(
    model: VisionLanguageModel, tokenizer: Tokenizer, samples: list[Sample]
) -> None:
    maker, sample = QuestionMaker(model.spec, tokenizer), replace(samples[0], size_px=(80, 40))
    assert maker.question(sample).picture is not None
    with pytest.raises(DataError, match=r"a\.png: is 80 x 40 pixels, but .* picture of 160 x 80"):
        maker.question(replace(sample, size_px=(160, 80)))
    with pytest.raises(DataError, match=r"a\.png: is 80 x 40 pixels, but .* has the box \[0, 0, 90, 10\]"):
        maker.question(replace(sample, task="rec", boxes=((0, 0, 90, 10),)))


def test_a_picture_that_was_decoded_smaller_has_the_size_that_the_data_says(
    model: VisionLanguageModel, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (800, 400)).save(tmp_path / "a.jpg")
    small = partial(load_image, limits=ImageLimits(0.1))
    monkeypatch.setattr("vlmdeploy.score.answerers.load_image", small)
    monkeypatch.setattr("vlmdeploy.score.predictions.load_image", small)
    sample = Sample(tmp_path / "a.jpg", (Turn("Where?"),), "rec", "rec", None, ((0, 0, 800, 400),), size_px=(800, 400))
    picture = QuestionMaker(model.spec, tokenizer).question(sample).picture
    assert picture is not None and picture.size_px == (800, 400)
    (tmp_path / "answers.jsonl").write_text('{"index": "", "prediction": "[[000,000,999,999]]"}')
    [prediction] = PredictionsAnswerer(tmp_path / "answers.jsonl").answers([sample])
    assert prediction.size_px == (800, 400)


def test_a_question_holds_its_pictures_pixels(
    model: VisionLanguageModel, tokenizer: Tokenizer, samples: list[Sample]
) -> None:
    maker = QuestionMaker(model.spec, tokenizer)
    for sample in samples:
        picture = maker.question(sample).picture
        assert (picture is None) == (sample.image is None)
        if picture is not None and sample.image is not None:
            assert np.array_equal(picture.pixels, preprocess(load_image(sample.image), model.spec.image))


class Says:
    """Answers every question with the same text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.asked = 0

    def answers(self, samples: Iterable[Sample]) -> Iterator[Prediction]:
        for sample in samples:
            self.asked += 1
            yield Prediction(sample, self.text, tuple(self.text.encode()))


def test_validate_scores_and_tells_its_progress(samples: list[Sample]) -> None:
    seen: list[int] = []
    validation = validate(Says("A sign"), samples, seen.append)
    assert seen == list(range(1, len(samples) + 1))
    assert validation.scores["vqa"]["exact_match"].value == 1.0
    assert validation.scores["caption"]["token_f1"].count == sum(sample.task == "caption" for sample in samples)


def test_nothing_is_answered_when_a_sample_cannot_be_scored(samples: list[Sample]) -> None:
    answerer = Says("7")
    with pytest.raises(DataError, match="no metric"):
        validate(answerer, [*samples, replace(samples[0], task="ocr")])
    with pytest.raises(DataError, match="no samples"):
        validate(answerer, [])
    assert answerer.asked == 0


def test_agreement_counts_equal_answers(samples: list[Sample]) -> None:
    a, b = validate(Says("7"), samples), validate(Says("8"), samples)
    mixed = replace(a, predictions=(*a.predictions[:4], *b.predictions[4:]))
    assert agreement(a, a).value == 1.0
    assert (agreement(a, mixed).value, agreement(a, mixed).count) == (4 / len(samples), len(samples))
    with pytest.raises(DataError, match="nothing to compare"):
        agreement(a, validate(Says("7"), samples[1:]))


def test_a_missing_picture_is_named(model: VisionLanguageModel, tokenizer: Tokenizer, tmp_path: Path) -> None:
    sample = Sample(tmp_path / "gone.png", (Turn("Why?"),), "vqa", "vqa", "")
    with pytest.raises(DataError, match=r"gone\.png: no such file"):
        validate(TorchAnswerer(model, tokenizer), [sample])

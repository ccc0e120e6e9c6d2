"""The input of verification: a drawn picture, a prompt of seeded ids, ids to decode, and a second turn."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlmdeploy.layout import Ints, prompt_of
from vlmdeploy.manifest import ImageRecipe, Manifest, TokenRules
from vlmdeploy.runtime.generate import Prompt, make_prompt
from vlmdeploy.runtime.image import preprocess
from vlmdeploy.spec.model import ModelSpec

PICTURE_SIZE = (96, 72)  # width, height: neither square nor the model's
PROMPT_TOKENS = 16
DECODE_TOKENS = 4
TURN_TOKENS = 5


@dataclass(frozen=True)
class InputRules:
    """What input preparation needs to know about a checkpoint or a bundle."""

    image: ImageRecipe
    tokens: TokenRules
    vocab_size: int
    context_tokens: int

    @classmethod
    def of_bundle(cls, manifest: Manifest) -> "InputRules":
        """The rules of a bundle."""
        return cls(manifest.image, manifest.tokens, manifest.embedding.vocab_size, manifest.context_tokens)

    @classmethod
    def of_spec(cls, spec: ModelSpec) -> "InputRules":
        """The rules of a checkpoint."""
        return cls(spec.image, spec.tokens, spec.decoder.vocab_size, spec.decoder.context_tokens)

    def prompt(self, ids: Ints, picture: Image.Image | None) -> Prompt:
        """The prompt of these ids and this picture. Raises PromptError."""
        pixels = None if picture is None else preprocess(picture, self.image)[None]
        return make_prompt(ids, pixels, self.tokens, self.vocab_size, self.image.size_px)


@dataclass(frozen=True)
class GateSample:
    """A picture uint8 [height, width, 3], its prompt, ids to decode one by one, and ids of a second turn to read in one
    call over the filled cache."""

    picture: NDArray[np.uint8]
    prompt: Prompt
    decode_ids: Ints
    turn_ids: Ints

    @property
    def ids(self) -> Ints:
        """All ids in order."""
        return np.concatenate((self.prompt.ids, self.decode_ids, self.turn_ids))


def draw_sample(rules: InputRules, seed: int) -> GateSample:
    """A seeded picture and prompt, with a shorter text if the context is small."""
    random = np.random.default_rng(seed)
    room = rules.context_tokens - 1 - rules.tokens.rows_per_image
    text = random.integers(0, rules.vocab_size, max(1, min(PROMPT_TOKENS, room - DECODE_TOKENS - TURN_TOKENS)))
    ids = prompt_of(text, rules.tokens, num_images=1)
    picture = draw_picture(random)
    after = random.integers(0, rules.vocab_size, min(DECODE_TOKENS + TURN_TOKENS, room - len(text)))
    prompt = rules.prompt(ids, Image.fromarray(picture))
    return GateSample(picture, prompt, after[:DECODE_TOKENS], after[DECODE_TOKENS:])


def draw_picture(random: np.random.Generator) -> NDArray[np.uint8]:
    """Soft colour waves, a bright disc and some noise, so that every patch differs: uint8 [height, width, 3]."""
    width, height = PICTURE_SIZE
    y, x = np.mgrid[0:height, 0:width] / np.array([height, width]).reshape(2, 1, 1)
    waves = [np.sin(2 * np.pi * (fx * x + fy * y + phase)) for fx, fy, phase in random.uniform(0.3, 3.0, (3, 3))]
    disc = ((x - 0.6) ** 2 + (y - 0.4) ** 2 < 0.04)[..., None]
    picture = 128 + 80 * np.stack(waves, -1) + 90 * disc + random.normal(0, 12, (height, width, 3))
    return np.asarray(np.clip(picture, 0, 255), np.uint8)

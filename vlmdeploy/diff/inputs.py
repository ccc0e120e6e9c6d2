"""The common input of both models: the user's picture and text, or the gate's drawn ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmdeploy.diff.staged_checkpoint import StagedModel
from vlmdeploy.errors import PromptError
from vlmdeploy.export.gate.sample import draw_sample
from vlmdeploy.layout import Ints
from vlmdeploy.runtime.chat import prompt_ids, read_messages
from vlmdeploy.runtime.generate import Prompt
from vlmdeploy.runtime.image import load_image

DRAWN = "drawn"


@dataclass(frozen=True)
class DiffInput:
    """A prompt and its source. image: a path, "drawn", or None; text: the user's, or None for drawn ids."""

    prompt: Prompt
    image: str | None
    text: str | None
    seed: int

    def as_json(self) -> dict[str, Any]:
        """Its entry in the JSON document."""
        mask, seed = self.prompt.vision_mask, self.seed if self.text is None else None
        counts = {"tokens": len(mask), "vision_rows": int(mask.sum()), "language_rows": int((~mask).sum())}
        return {"image": self.image, "prompt": self.text, "seed": seed, **counts}


def make_input(a: StagedModel, b: StagedModel, image: str | None, text: str | None, seed: int) -> DiffInput:
    """The input of two models of one geometry. A text without an image makes a prompt without one.

    Raises PromptError and DataError.
    """
    shorter = min((a, b), key=lambda model: model.rules.context_tokens)
    picture = None if image is None else load_image(image)
    if text is not None:
        ids = _text_ids((a, b), image, text)
        if len(ids) > shorter.rules.context_tokens:
            raise PromptError(
                f"--prompt makes {len(ids)} tokens (an image takes {a.rules.tokens.rows_per_image}), the context of "
                f"{shorter.name} holds {shorter.rules.context_tokens}: shorten it"
            )
        return DiffInput(a.rules.prompt(ids, picture), _name(image), text, seed)
    drawn = _drawn_prompt(shorter, seed)
    if picture is None:
        return DiffInput(drawn, DRAWN, None, seed)
    return DiffInput(a.rules.prompt(drawn.ids, picture), _name(image), None, seed)


def _name(image: str | None) -> str | None:
    """A picture's name in the document, without the data of a URL."""
    return "data URL" if image is not None and image.lower().startswith("data:") else image


def _drawn_prompt(shorter: StagedModel, seed: int) -> Prompt:
    """The prompt of the gate's sample."""
    held, least = shorter.rules.context_tokens, shorter.rules.tokens.rows_per_image + 2
    if held < least:
        raise PromptError(f"{shorter.name}: its context holds {held} tokens, expected {least}: a picture and a word")
    return draw_sample(shorter.rules, seed).prompt


def _text_ids(models: Sequence[StagedModel], image: str | None, text: str) -> Ints:
    """The ids of a question by the first model's template; the models' tokenizers must agree."""
    template, tokens = models[0].template, models[0].rules.tokens
    pictures: list[dict[str, Any]] = [] if image is None else [{"type": "image", "image": image}]
    messages = [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]
    conversation = read_messages(messages, tokens.max_images)

    tokenizers = [(model, tokenizer) for model in models if (tokenizer := model.tokenizer()) is not None]
    found = [(model, prompt_ids(conversation, template, tokens, tokenizer)) for model, tokenizer in tokenizers]
    if not found:
        names = " and ".join(model.name for model in models)
        raise PromptError(f"--prompt needs a tokenizer, and {names} hold none: leave it out to compare on drawn ids")
    for model, ids in found[1:]:
        if not np.array_equal(ids, found[0][1]):
            raise PromptError(
                f"--prompt is {len(found[0][1])} ids by the tokenizer of {found[0][0].name} and other ones "
                f"({len(ids)}) by that of {model.name}: leave it out to compare on drawn ids"
            )
    return found[0][1]

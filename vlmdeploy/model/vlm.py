"""The whole model: replace placeholders by image rows, run the decoder, compute logits.

The reference for everything exported. It routes token by token, like the authors' code.
"""

import torch
from torch import Tensor, nn

from vlmdeploy.errors import PromptError
from vlmdeploy.model.batch import Layout, derive_layout
from vlmdeploy.model.connector import Connector
from vlmdeploy.model.decoder import Cache, Decoder, causal_mask
from vlmdeploy.model.vision import VisionEncoder
from vlmdeploy.spec.model import ModelSpec


class VisionLanguageModel(nn.Module):
    """A vision-language model built from its spec; `load_model` fills it with a checkpoint's weights."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.vision = VisionEncoder(spec.vision)
        self.connector = Connector(spec.connector)
        self.embedding = nn.Embedding(spec.decoder.vocab_size, spec.decoder.hidden)
        self.decoder = Decoder(spec.decoder)
        self.lm_head = nn.Linear(spec.decoder.hidden, spec.decoder.vocab_size, bias=False)

    def encode_images(self, images: Tensor) -> Tensor:
        """Preprocessed pixels [images, 3, S, S] -> decoder rows [images, rows, hidden], boundary rows included."""
        return self.connector(self.vision(images.to(self.embedding.weight.dtype)))

    def embed(self, input_ids: Tensor, token_type_ids: Tensor, images: Tensor | None) -> Tensor:
        """The input of decoder layer 0, [batch, seq, hidden]: embeddings, and image rows where the type is 1."""
        return self.join(input_ids, token_type_ids, None if images is None else self.encode_images(images))

    def join(self, input_ids: Tensor, token_type_ids: Tensor, image_rows: Tensor | None) -> Tensor:
        """Like `embed`, from encoded pictures [images, rows, hidden]; pictures may repeat."""
        x = self.embedding(input_ids)
        if image_rows is None:
            return x
        rows, places = image_rows.flatten(0, 1), token_type_ids == 1
        if int(places.sum()) != len(rows):
            found = f"{len(image_rows)} images give {len(rows)} rows"
            raise PromptError(f"{found}, but {int(places.sum())} places have type 1")
        return x.masked_scatter(places.unsqueeze(-1), rows.to(x.dtype))

    def forward(
        self,
        input_ids: Tensor,
        images: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits [batch, seq, vocab] float32 of every position; ignore those of padded positions.

        input_ids, token_type_ids, position_ids, attention_mask int64 [batch, seq]; images float32 [images, 3, S, S]
        fill the image runs in row order. Missing inputs are derived by the family's rules. Raises PromptError.
        """
        layout = derive_layout(self.spec, input_ids, images, token_type_ids, position_ids, attention_mask)
        return self.logits(self.run(input_ids, images, layout, Cache.empty(self.spec.decoder.num_layers)))

    def run(self, input_ids: Tensor, images: Tensor | None, layout: Layout, cache: Cache) -> Tensor:
        """Normed hidden states [batch, seq, hidden] of a prompt; fills the cache."""
        return self.prefill(self.embed(input_ids, layout.token_type_ids, images), layout, cache)

    def prefill(self, x: Tensor, layout: Layout, cache: Cache) -> Tensor:
        """Normed hidden states [batch, seq, hidden] of an embedded prompt x of that shape; fills the cache."""
        step = self.decoder.step(layout.position_ids, layout.vision_mask, causal_mask(layout.attention_mask))
        return self.decoder(x, step, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [..., vocab] of normed hidden states [..., hidden]."""
        return self.lm_head(hidden).float()

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        images: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 16,
    ) -> Tensor:
        """Generate greedily, int64 [batch, new]. A row ends with its stop id; the pad id fills the rest."""
        layout = derive_layout(self.spec, input_ids, images, token_type_ids, None, attention_mask)
        return self.continue_greedily(self.embed(input_ids, layout.token_type_ids, images), layout, max_new_tokens)

    @torch.no_grad()
    def continue_greedily(self, x: Tensor, layout: Layout, max_new_tokens: int) -> Tensor:
        """Like `generate`, for an embedded prompt x [batch, seq, hidden]."""
        if max_new_tokens < 1:
            raise PromptError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
        cache = Cache.empty(self.spec.decoder.num_layers)
        hidden = self.prefill(x, layout, cache)
        best = self.logits(_last_real(hidden, layout.attention_mask)).argmax(-1)
        positions, mask = layout.position_ids[:, -1:], layout.attention_mask
        stops = torch.tensor(self.spec.tokens.stop_ids, device=x.device)
        new_ids, ended = [best], torch.isin(best, stops)
        while len(new_ids) < max_new_tokens and not bool(ended.all()):
            positions, mask = positions + 1, torch.cat((mask, torch.ones_like(positions)), 1)
            step = self.decoder.step(positions, None, causal_mask(mask, past=mask.shape[1] - 1))
            hidden = self.decoder(self.embedding(best[:, None]), step, cache)
            best = self.logits(hidden[:, -1]).argmax(-1).masked_fill(ended, self.spec.tokens.pad_id)
            ended = ended | torch.isin(best, stops)
            new_ids.append(best)
        return torch.stack(new_ids[:max_new_tokens], 1)


def _last_real(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """The hidden state of each row's last unmasked position, [batch, hidden]."""
    index = torch.arange(attention_mask.shape[1], device=hidden.device)
    last = (attention_mask * index).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]

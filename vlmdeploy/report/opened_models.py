"""The models of a report, opened: bundles in the runtime, checkpoints in PyTorch; and checks that all are versions of
one model."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import vlmdeploy
from vlmdeploy.bundle import has_manifest, read_manifest
from vlmdeploy.data.samples import Sample
from vlmdeploy.errors import BackendError, BundleError, ConfigError
from vlmdeploy.layout import Ints, lay_out
from vlmdeploy.manifest import TOKENIZER_NAME, Manifest
from vlmdeploy.overriding import override
from vlmdeploy.report.distributions import DistributionModel, Floats, GivenAnswer
from vlmdeploy.report.document import ReportedModel
from vlmdeploy.runtime.session import Session
from vlmdeploy.score.answerers import Answerer, BundleAnswerer, QuestionMaker
from vlmdeploy.score.metrics import Prediction

SIZES = ("decoder layers", "KV heads", "hidden width", "vocabulary", "image side", "rows of an image")
FINGERPRINT_ROWS = 64  # of the embedding table
FARTHEST_EMBEDDING = 0.35  # relative error of these rows: int4 codes with groups of 128 stay below 0.15


@dataclass(frozen=True)
class Identity:
    """What two comparable models share: family, sizes (see SIZES), tokenizer and, nearly, the embedding.

    tokenizer: its JSON, "" if there is none; embedding: some rows, float32 [rows, hidden].
    """

    family: str
    sizes: tuple[int, ...]
    tokenizer: str
    embedding: Floats


class OpenedModel(Answerer, DistributionModel):
    """A model that answers questions and gives logits.

    maker: makes its prompts; context_tokens: the longest prompt and answer together; vocab_size: of a distribution.
    """

    path: Path
    maker: QuestionMaker
    context_tokens: int
    vocab_size: int
    _answerer: Answerer

    @override
    def answers(self, samples: Iterable[Sample]) -> Iterator[Prediction]:
        return self._answerer.answers(samples)

    @override
    def answer_logits(self, given: GivenAnswer) -> Floats:
        ids = np.concatenate((given.prompt, given.answer[:-1]))
        logits = self._logits(ids, given.pixels, len(given.answer))
        if not np.isfinite(logits).all():
            question = given.sample.turns[-1].user
            raise BackendError(
                f"{self.path}: logits of the answer to {question[:80]!r} are not finite: nothing to compare"
            )
        return logits

    @abstractmethod
    def _logits(self, ids: Ints, pixels: Floats | None, last: int) -> Floats:
        """Logits of the last positions, float32 [last, vocab]."""

    def close(self) -> None:
        """Release the engine; PyTorch frees weights with the object."""


@dataclass(frozen=True)
class OpenOptions:
    """How models are opened and asked. follow_links: of checkpoints, out of their folders."""

    template: str | None = None
    tokenizer: Path | None = None
    threads: int | None = None
    provider: str | None = None
    max_new_tokens: int = 64
    follow_links: bool = False


def open_model(path: Path, options: OpenOptions) -> OpenedModel:
    """Open a bundle or a checkpoint. Raises what opening raises."""
    return OpenedBundle(path, options) if has_manifest(path) else OpenedCheckpoint(path, options)


class OpenedBundle(OpenedModel):
    """A bundle in the runtime."""

    def __init__(self, path: Path, options: OpenOptions) -> None:
        self.path = path
        self.session: Session = vlmdeploy.open(path, provider=options.provider, threads=options.threads)
        manifest = self.session.manifest
        self.context_tokens, self.vocab_size = manifest.context_tokens, manifest.embedding.vocab_size
        self.maker = QuestionMaker(manifest, self.session.tokenizer, options.template)
        self._answerer = BundleAnswerer(self.session, options.max_new_tokens, options.template)

    def _logits(self, ids: Ints, pixels: Floats | None, last: int) -> Floats:
        return self.session.logits(ids, pixels, last=last)

    @override
    def close(self) -> None:
        self.session.close()


class OpenedCheckpoint(OpenedModel):
    """A checkpoint in PyTorch."""

    def __init__(self, path: Path, options: OpenOptions) -> None:
        from vlmdeploy.model.tokenizer import checkpoint_tokenizer, import_tokenizer
        from vlmdeploy.runtime.chat import Tokenizer
        from vlmdeploy.score.torch_answerer import TorchAnswerer

        source = checkpoint_tokenizer(path, options.tokenizer, options.follow_links)
        tokenizer = Tokenizer(import_tokenizer(source))
        self.path = path
        self.model = vlmdeploy.load_model(path, follow_links=options.follow_links)
        decoder = self.model.spec.decoder
        self.context_tokens, self.vocab_size = decoder.context_tokens, decoder.vocab_size
        self.maker = QuestionMaker(self.model.spec, tokenizer, options.template)
        self._answerer = TorchAnswerer(
            self.model, tokenizer, max_new_tokens=options.max_new_tokens, template=options.template
        )

    def _logits(self, ids: Ints, pixels: Floats | None, last: int) -> Floats:
        import torch

        types = lay_out(ids, self.model.spec.tokens, 0 if pixels is None else len(pixels)).types
        images = None if pixels is None else torch.from_numpy(pixels)
        with torch.no_grad():
            logits = self.model(torch.from_numpy(ids)[None], images, token_type_ids=torch.from_numpy(types)[None])
        last_logits: Floats = logits[0, -last:].numpy()
        return last_logits


def subject_of(path: Path, name: str, follow_links: bool = False) -> ReportedModel:
    """Describe a model from its files. Raises BundleError, ConfigError and WeightsError."""
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if has_manifest(path):
        return _bundle_subject(path, name, read_manifest(path), size)
    from vlmdeploy.model.checkpoint import Checkpoint

    checkpoint = Checkpoint(path, follow_links)
    kind = "gptq" if checkpoint.is_quantized else "none"
    return ReportedModel(
        name, str(path), "checkpoint", checkpoint.spec.family, None, None, {"all": "fp32 in PyTorch"}, {}, kind, (),
        checkpoint.fingerprint(), {}, size,
    )  # fmt: skip


def _bundle_subject(path: Path, name: str, manifest: Manifest, size: int) -> ReportedModel:
    if not manifest.has_tokenizer:
        raise BundleError(f"{path}: an ids-only bundle cannot be asked questions: export it with --tokenizer FILE")
    made = manifest.made_by
    return ReportedModel(
        name, str(path), "bundle", manifest.family, manifest.target, manifest.provider, manifest.precision,
        manifest.group_sizes, made.quantization, made.notes, made.checkpoint_sha256, made.versions, size,
    )  # fmt: skip


def identity_of(path: Path, options: OpenOptions) -> Identity:
    """Read a model's identity from its files. Raises ConfigError, WeightsError and BundleError."""
    return _bundle_identity(path) if has_manifest(path) else _checkpoint_identity(path, options)


def _bundle_identity(path: Path) -> Identity:
    from vlmdeploy.runtime.embedding import EmbeddingTable
    from vlmdeploy.runtime.integrity import check_bundle

    files = check_bundle(path)
    manifest = files.manifest
    cache, info = manifest.cache, manifest.embedding
    image, tokens = manifest.image, manifest.tokens
    sizes = (cache.num_layers, cache.kv_heads, info.hidden, info.vocab_size, image.size_px, tokens.rows_per_image)
    rows = EmbeddingTable(files)[_fingerprint_rows(info.vocab_size)]
    text = files.read(TOKENIZER_NAME).decode() if manifest.has_tokenizer else ""
    return Identity(manifest.family, sizes, text, rows)


def _checkpoint_identity(path: Path, options: OpenOptions) -> Identity:
    from vlmdeploy.model.checkpoint import Checkpoint
    from vlmdeploy.model.tokenizer import find_tokenizer, import_tokenizer

    checkpoint = Checkpoint(path, options.follow_links)
    spec, decoder = checkpoint.spec, checkpoint.spec.decoder
    widths = (decoder.num_layers, decoder.num_kv_heads, decoder.hidden, decoder.vocab_size)
    wanted = _fingerprint_rows(decoder.vocab_size)
    rows = np.concatenate([checkpoint.rows("embedding.weight", row, row + 1).numpy() for row in wanted.tolist()])
    source = find_tokenizer(options.tokenizer or path, options.follow_links)
    text = "" if source is None else import_tokenizer(source).to_str(pretty=True)
    return Identity(spec.family, (*widths, spec.image.size_px, spec.tokens.rows_per_image), text, rows)


def _fingerprint_rows(vocab_size: int) -> Ints:
    return np.unique(np.linspace(0, vocab_size - 1, FINGERPRINT_ROWS).astype(np.int64))


def check_same_model(first: Path, one: Identity, second: Path, other: Identity) -> None:
    """Raise ConfigError, naming the first difference, unless both are versions of one model."""
    advice = "compare versions of one model only"
    if one.family != other.family:
        raise ConfigError(f"{second}: is a {other.family}, {first} a {one.family}: {advice}")
    for name, wanted, found in zip(SIZES, one.sizes, other.sizes, strict=True):
        if wanted != found:
            raise ConfigError(f"{second}: {name} {found}, and {wanted} in {first}: {advice}")
    if one.tokenizer and other.tokenizer and one.tokenizer != other.tokenizer:
        raise ConfigError(f"{second}: its tokenizer is not that of {first}: answers would not compare token by token")
    size = float(np.linalg.norm(one.embedding))
    distance = float(np.linalg.norm(one.embedding - other.embedding)) / max(1e-30, size)
    if not distance < FARTHEST_EMBEDDING:
        raise ConfigError(
            f"{second}: its embedding table differs from that of {first} by {distance:.2f} of its size, more than "
            f"rounding explains ({FARTHEST_EMBEDDING}): was it made from another checkpoint?"
        )

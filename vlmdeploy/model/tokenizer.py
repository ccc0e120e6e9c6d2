"""Read a checkpoint's tokenizer: tokenizer.json, or a SentencePiece tokenizer.model, converted with identical ids.

Converts only SentencePiece models like Llama's and Vicuna's: BPE without text normalization, by the rules of
sentencepiece's bpe_model.cc and normalizer.cc. Rejects others rather than approximating them.
"""

import importlib
import math
import re
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from vlmdeploy.errors import ConfigError
from vlmdeploy.input_files import MOST_JSON_BYTES, find_inside, read_input, why_unreadable
from vlmdeploy.tokenizer_file import read_tokenizer

SPACE_MARK = "\N{LOWER ONE EIGHTH BLOCK}"  # ▁, how SentencePiece writes a space
MANY = 1 << 16  # more spaces than any answer starts with
FILE_NAMES = ("tokenizer.json", "tokenizer.model")
LONGEST_PIECE = 512  # characters, the most that SentencePiece trains
TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n")


def find_tokenizer(folder_or_file: Path, follow_links: bool = False) -> Path | None:
    """The tokenizer file itself, or the one in a folder, tokenizer.json first; None if there is none.

    Raises ConfigError if the path does not exist, or the folder's file is a link out of it without `follow_links`.
    """
    if not folder_or_file.is_dir():
        if problem := why_unreadable(folder_or_file):
            raise ConfigError(f"tokenizer {folder_or_file}: {problem}, expected a file or a folder with one")
        return folder_or_file
    found = (find_inside(folder_or_file, name, ConfigError, follow_links) for name in FILE_NAMES)
    return next((path for path in found if path is not None), None)


def checkpoint_tokenizer(ckpt: Path, tokenizer: Path | None, follow_links: bool = False) -> Path:
    """The tokenizer file of a checkpoint: the given one, else the one in its folder. Raises ConfigError."""
    source = find_tokenizer(tokenizer or ckpt, follow_links)
    if source is None:
        raise ConfigError(f"{ckpt}: holds no tokenizer.json and no tokenizer.model: give --tokenizer FILE")
    return source


def import_tokenizer(source: Path) -> tokenizers.Tokenizer:
    """Import a tokenizer.json or SentencePiece file. Raises ConfigError if it is neither or not supported."""
    content = read_input(source, ConfigError, MOST_JSON_BYTES, "a tokenizer")
    if not content:
        raise ConfigError(f"tokenizer {source}: is empty (0 bytes)")
    if TIKTOKEN_LINE.match(content):
        raise ConfigError(f"tokenizer {source}: holds tiktoken ranks, expected tokenizer.json or a SentencePiece model")
    if content.lstrip()[:1] == b"{":
        return read_tokenizer(content, f"tokenizer {source}", ConfigError)
    return _convert(_parse_sentencepiece(content, source), source)


def _parse_sentencepiece(content: bytes, source: Path) -> Any:
    """The SentencePiece ModelProto, a protobuf message."""
    try:
        schema = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
        protobuf = importlib.import_module("google.protobuf.message")
    except ImportError as error:
        needed = "reading a SentencePiece model needs the packages sentencepiece and protobuf"
        raise ConfigError(f"tokenizer {source}: {needed}; install vlmdeploy[toolchain] ({error})") from error
    try:
        model = schema.ModelProto.FromString(content)
    except protobuf.DecodeError as error:
        raise _no_tokenizer(content, source) from error
    if not model.pieces:
        raise _no_tokenizer(content, source)
    return model


def _no_tokenizer(content: bytes, source: Path) -> ConfigError:
    expected = "expected tokenizer.json or a SentencePiece model"
    return ConfigError(f"tokenizer {source}: starts with {content[:16]!r}, {expected}")


def _convert(model: Any, source: Path) -> tokenizers.Tokenizer:
    _check_pieces(model, source)
    _check_supported(model, source)
    kinds = model.SentencePiece.Type
    special = [piece.piece for piece in model.pieces if piece.type in (kinds.CONTROL, kinds.UNKNOWN)]
    bpe = models.BPE(
        vocab={piece.piece: token_id for token_id, piece in enumerate(model.pieces)},
        merges=_merges(model),
        unk_token=model.trainer_spec.unk_piece,
        fuse_unk=True,
        byte_fallback=any(piece.type == kinds.BYTE for piece in model.pieces),
    )
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.normalizer = _normalizer(model.normalizer_spec)
    tokenizer.decoder = _decoder(model.normalizer_spec)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


def _check_pieces(model: Any, source: Path) -> None:
    """Raise ConfigError unless the pieces are texts with a score, one of them for what is unknown."""
    kinds = model.SentencePiece.Type
    for token_id, piece in enumerate(model.pieces):
        is_text = isinstance(piece.piece, str)  # the parser gives bytes where it is not UTF-8
        if not is_text or not 0 < len(piece.piece) <= LONGEST_PIECE or not math.isfinite(piece.score):
            expected = f"a text of 1 to {LONGEST_PIECE} characters with a score"
            raise ConfigError(f"tokenizer {source}: piece {token_id} is {piece.piece[:40]!r}, expected {expected}")
    unknown = [piece.piece for piece in model.pieces if piece.type == kinds.UNKNOWN]
    if unknown != [model.trainer_spec.unk_piece]:
        expected = f"{model.trainer_spec.unk_piece!r:.40} alone"
        raise ConfigError(f"tokenizer {source}: its unknown pieces are {unknown!r:.80}, expected {expected}")
    named = {piece.piece for piece in model.pieces if piece.type == kinds.BYTE}
    if named and named != {f"<0x{value:02X}>" for value in range(256)}:
        raise ConfigError(f"tokenizer {source}: has {len(named)} byte pieces, expected <0x00> to <0xFF>")


def _check_supported(model: Any, source: Path) -> None:
    """Reject every feature that the conversion would change."""
    trainer, normalizer, kinds = model.trainer_spec, model.normalizer_spec, model.SentencePiece.Type
    model_type = trainer.ModelType.Name(trainer.model_type)
    odd_pieces = [piece.piece for piece in model.pieces if piece.type in (kinds.USER_DEFINED, kinds.UNUSED)]
    problems = {
        f"model type {model_type}": model_type != "BPE",
        f'text normalization "{str(normalizer.name)[:40]}"': bool(normalizer.precompiled_charsmap),
        "spaces that are not escaped": not normalizer.escape_whitespaces,
        "the space mark as a suffix": trainer.treat_whitespace_as_suffix,
        f"user-defined or unused pieces such as {odd_pieces[:1]!r:.80}": bool(odd_pieces),
        "two pieces of the same name": len({piece.piece for piece in model.pieces}) < len(model.pieces),
    }
    found = [problem for problem, is_there in problems.items() if is_there]
    if found:
        expected = "only BPE models without text normalization, as of Llama and Vicuna, can be converted"
        raise ConfigError(f"tokenizer {source}: has {found[0]}; {expected}; give a tokenizer.json instead")


def _merges(model: Any) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best score first.

    SentencePiece stores no merges: it joins the neighbours whose joined piece scores best. Special and byte pieces
    never result from text.
    """
    normal = model.SentencePiece.Type.NORMAL
    ids = {piece.piece: token_id for token_id, piece in enumerate(model.pieces) if piece.type == normal}
    ranked = []
    for joined, token_id in ids.items():
        for cut in range(1, len(joined)):
            left, right = joined[:cut], joined[cut:]
            if left in ids and right in ids:
                ranked.append((-model.pieces[token_id].score, token_id, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _normalizer(rules: Any) -> normalizers.Normalizer:
    """Turn spaces into marks and add one before the first word; first trim runs and ends if the model says so."""
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE_MARK)]
    if rules.remove_extra_whitespaces:
        runs = tokenizers.Regex(" {2,}")
        steps = [normalizers.Replace(tokenizers.Regex(r"\A +"), ""), normalizers.Replace(runs, " "), *steps]
        steps.append(normalizers.Replace(tokenizers.Regex(rf"{SPACE_MARK}+\z"), ""))
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE_MARK))
    return normalizers.Sequence(steps)


def _decoder(rules: Any) -> decoders.Decoder:
    """Turn marks into spaces and byte pieces into UTF-8; drop the leading mark, or all leading ones if trimmed."""
    leading_spaces = MANY if rules.remove_extra_whitespaces else int(rules.add_dummy_prefix)
    strip = decoders.Strip(" ", leading_spaces, 0)
    return decoders.Sequence([decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), strip])

"""Reference: converted tokenizers against the sentencepiece package, on models trained here. Contract: which files are
read, and what is said about the others."""

import importlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from vlmdeploy.errors import BundleError, ConfigError
from vlmdeploy.model.tokenizer import find_tokenizer, import_tokenizer
from vlmdeploy.runtime.chat import StreamDecoder, Tokenizer

SENTENCES = (
    "the cat sat on the mat and ate a fish while it was raining outside . How many digits are there ? Where is the "
    "largest number in this picture ? banana bandana aaaa aaaaaa abab 12 123 1000 007 a<s o<s e</s h</s x> 你好 世界 "
    "你 好 这是 图片"
)
FRAGMENTS = [
    *"abcdehnt ita  \t\n\r你好龍😀é▁<>/s0129",
    "the",
    "ban",
    "aaa",
    "</s>",
    "<s>",
    "<unk>",
    "<0x0A>",
    "  ",
    "\r\n",
]
LLAMA = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}


def trained(model_type: str = "bpe", vocab_size: int = 400, **options: Any) -> bytes:
    """A small SentencePiece model of the Llama kind, or with other options."""
    random, buffer = np.random.default_rng(0), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(random.choice(SENTENCES.split(), 12)) for _ in range(300)),
        model_writer=buffer,
        model_type=model_type,
        vocab_size=vocab_size,
        split_digits=True,
        minloglevel=2,
        num_threads=1,
        **{**LLAMA, **options},
    )
    return buffer.getvalue()


def random_texts(count: int) -> list[str]:
    random = np.random.default_rng(1)
    texts = ["".join(random.choice(FRAGMENTS, random.integers(0, 25))) for _ in range(count)]
    return ["", " ", "  ", "\n", *texts]


@pytest.fixture(scope="module")
def llama_model() -> bytes:
    return trained()


def written(folder: Path, content: bytes) -> Path:
    path = folder / "tokenizer.model"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True},
        {"remove_extra_whitespaces": True, "add_dummy_prefix": False},
        {"split_by_whitespace": False},
        {"split_by_unicode_script": False},  # gives the piece "<s", with which ">" must not join to a special token
        {"byte_fallback": False, "vocab_size": 140},
    ],
    ids=str,
)
def test_converted_ids_equal_those_of_sentencepiece(options: dict[str, Any], tmp_path: Path) -> None:
    content = trained(**options)
    original = sentencepiece.SentencePieceProcessor(model_proto=content)
    converted = Tokenizer(import_tokenizer(written(tmp_path, content)))
    for text in random_texts(500):
        assert converted.encode(text) == original.encode(text), repr(text)


def test_decoded_text_equals_that_of_sentencepiece(llama_model: bytes, tmp_path: Path) -> None:
    original = sentencepiece.SentencePieceProcessor(model_proto=llama_model)
    converted = Tokenizer(import_tokenizer(written(tmp_path, llama_model)))
    for text in random_texts(300):
        ids, stream = converted.encode(text), StreamDecoder(converted)
        assert converted.decode(ids) == original.decode(ids), repr(text)
        assert "".join([*map(stream.add, ids), stream.finish()]) == original.decode(ids), repr(text)


def test_special_ids_and_vocabulary_are_the_models(llama_model: bytes, tmp_path: Path) -> None:
    original = sentencepiece.SentencePieceProcessor(model_proto=llama_model)
    converted = import_tokenizer(written(tmp_path, llama_model))
    assert [converted.token_to_id(token) for token in ("<unk>", "<s>", "</s>")] == [0, 1, 2]
    assert converted.decode([1, original.piece_to_id("▁the"), 2]) == "the", "special tokens are left out of a text"
    pieces = [original.id_to_piece(token_id) for token_id in range(len(original))]
    assert [converted.id_to_token(token_id) for token_id in range(converted.get_vocab_size())] == pieces


def test_a_converted_tokenizer_survives_its_file(llama_model: bytes, tmp_path: Path) -> None:
    converted = import_tokenizer(written(tmp_path, llama_model))
    converted.save(str(tmp_path / "tokenizer.json"))
    again = import_tokenizer(tmp_path / "tokenizer.json")
    for text in random_texts(50):
        assert again.encode(text).ids == converted.encode(text).ids


def test_a_folders_tokenizer_is_found_json_first(tmp_path: Path) -> None:
    assert find_tokenizer(tmp_path) is None
    model = written(tmp_path, b"")
    assert find_tokenizer(tmp_path) == model == find_tokenizer(model)
    (tmp_path / "tokenizer.json").touch()
    assert find_tokenizer(tmp_path) == tmp_path / "tokenizer.json"
    with pytest.raises(ConfigError, match="elsewhere: no such file, expected a file or a folder"):
        find_tokenizer(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"hello world", "starts with b'hello world'"),
        (b'{"version": 1', "not JSON"),
        (b'{"version": 1}', "not a valid tokenizer.json"),
        (b"IQ== 0\nIg== 1\n", "tiktoken ranks"),
    ],
)
def test_files_that_are_no_tokenizer_are_named(content: bytes, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"tokenizer.model: .*{expected}"):
        import_tokenizer(written(tmp_path, content))


JSON: dict[str, Any] = {
    "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "post_processor": None,
    "decoder": None, "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
}  # fmt: skip

SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": " " * 10}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}}, "has Precompiled"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Precompiled"}]}}, "has Precompiled"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "has FixedLength"),
        (
            {"normalizer": {"type": "Sequence", "normalizers": [SPACES, SPACES]}},
            "has parts that make a text more than 64",
        ),
        ({"decoder": {"type": "Sequence", "decoders": [SPACES, SPACES]}}, "has parts that make a text more than 64"),
        ({"normalizer": {"type": "Prepend", "prepend": " " * 64}}, "has parts that make a text more than 64 times"),
        ({"model": JSON["model"] | {"continuing_subword_prefix": "##"}}, "has BPE with a continuing_subword_prefix"),
        ({"model": JSON["model"] | {"unk_token": "zz"}}, "not a valid tokenizer.json"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "zz"}}, "not a valid tokenizer.json"),
        ({"model": {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]]}}, "not a valid tokenizer.json"),
        ({"model": JSON["model"] | {"merges": ["a zz"]}}, "not a valid tokenizer.json"),
        ({"model": 3}, "not a valid tokenizer.json"),
    ],
    ids=str,
)
def test_parts_that_the_library_trusts_are_refused(changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    """Values that the library does not check ended the process, asked for 4 GB, or failed at the first prompt: those of
    a checkpoint, and those of a bundle."""
    content = json.dumps(JSON | changes)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=f"tokenizer.json: {expected}"):
        import_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(BundleError, match=f"^bundle/tokenizer.json: {expected}"):
        Tokenizer.from_bytes(content.encode(), "bundle/tokenizer.json")


def test_a_panic_of_the_library_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Errors in the library's Rust code are no Exception: one was shown as a traceback."""
    panic = type("PanicException", (BaseException,), {})

    def from_buffer(content: bytes) -> Any:
        raise panic("index out of bounds")

    monkeypatch.setattr("tokenizers.Tokenizer.from_buffer", from_buffer)
    (tmp_path / "tokenizer.json").write_text(json.dumps(JSON))
    with pytest.raises(ConfigError, match=r"tokenizer\.json: not a valid tokenizer\.json \(index out of bounds\)"):
        import_tokenizer(tmp_path / "tokenizer.json")


def test_files_that_are_none_are_not_waited_for(tmp_path: Path) -> None:
    """A FIFO was opened as a tokenizer, or counted as absent in a folder."""
    os.mkfifo(tmp_path / "tokenizer.model")
    with pytest.raises(ConfigError, match=r"tokenizer\.model: is a FIFO or pipe"):
        find_tokenizer(tmp_path / "tokenizer.model")
    with pytest.raises(ConfigError, match=r"tokenizer\.model: is a FIFO or pipe"):
        import_tokenizer(tmp_path / "tokenizer.model")


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (
            lambda model: model.pieces[300].ClearField("piece"),
            "piece 300 is '', expected a text of 1 to 512 characters",
        ),
        (
            lambda model: setattr(model.pieces[300], "piece", "x" * 100_000),
            "piece 300 is 'x{40}', expected a text of 1",
        ),
        (lambda model: setattr(model.pieces[300], "score", float("nan")), "piece 300 is .*, expected a text"),
        (lambda model: setattr(model.pieces[0], "type", 1), r"its unknown pieces are \[\], expected '<unk>' alone"),
        (lambda model: setattr(model.pieces[5], "type", 2), "its unknown pieces are .*, expected '<unk>' alone"),
        (lambda model: setattr(model.trainer_spec, "unk_piece", "zz"), "expected 'zz' alone"),
        (lambda model: setattr(model.pieces[20], "type", 1), "has 255 byte pieces, expected <0x00> to <0xFF>"),
        (lambda model: model.ClearField("pieces"), "expected tokenizer.json or"),
    ],
    ids=["no text", "long", "score", "no unknown", "two unknown", "another unknown", "bytes", "none"],
)
def test_pieces_that_cannot_be_converted_are_told(
    edit: Callable[[Any], Any], expected: str, llama_model: bytes, tmp_path: Path
) -> None:
    """Changed bytes in a model ended in TypeErrors and UnicodeDecodeErrors; a long piece was cut for hours."""
    model = importlib.import_module("sentencepiece.sentencepiece_model_pb2").ModelProto.FromString(llama_model)
    edit(model)
    with pytest.raises(ConfigError, match=f"tokenizer.model: .*{expected}"):
        import_tokenizer(written(tmp_path, model.SerializeToString()))


def test_a_piece_that_is_no_text_is_told(llama_model: bytes, tmp_path: Path) -> None:
    """The parser gives bytes where a text is not UTF-8, which no tokenizer takes."""
    with pytest.raises(ConfigError, match=r"tokenizer\.model: piece [0-9]+ is b'"):
        import_tokenizer(written(tmp_path, llama_model.replace("图片".encode(), b"\xff" * 6)))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"model_type": "unigram", "vocab_size": 320}, "model type UNIGRAM"),
        ({"normalization_rule_name": "nmt_nfkc"}, 'text normalization "nmt_nfkc"'),
        ({"user_defined_symbols": ["<box>"]}, "<box>"),
        ({"treat_whitespace_as_suffix": True}, "suffix"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_models_that_cannot_be_converted_exactly_are_refused(
    options: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=expected):
        import_tokenizer(written(tmp_path, trained(**options)))

"""Contract: which messages are prompts and which are refused; prompts equal the golden ones. Agreement: text decoded
as it streams equals the text decoded at once."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as LibraryTokenizer

from tests.golden_cases import CHECKPOINTS, GOLDEN
from vlmdeploy.errors import BundleError, PromptError
from vlmdeploy.families.cogvlm import TEMPLATES
from vlmdeploy.layout import lay_out
from vlmdeploy.manifest import ChatTemplate, Piece, TokenRules
from vlmdeploy.runtime.chat import (
    IMAGE_MARK,
    Conversation,
    StreamDecoder,
    Tokenizer,
    Turn,
    prompt_ids,
    read_messages,
    render,
)

PROMPT_CASES = [
    (checkpoint, case)
    for checkpoint in CHECKPOINTS
    for case in json.loads((GOLDEN / checkpoint / "prompt_cases.json").read_text())
]
TEMPLATE = {template.name: template for template in TEMPLATES}
RULES = TokenRules(bos_id=1, pad_id=0, placeholder_id=0, stop_ids=(2,), rows_per_image=3, max_images=1)
QUESTION = {"role": "user", "content": "What?"}
ANSWER = {"role": "assistant", "content": "That."}
IMAGE = {"type": "image", "image": "a.png"}


def sentencepiece_kind() -> LibraryTokenizer:
    """Byte fallback and a space mark before the first word, like Llama and Vicuna."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"helowrd",
        "he",
        "▁he",
        "世",
        "\ufffd",
    ]
    merges = [("h", "e"), ("▁", "he")]
    vocabulary = {word: token_id for token_id, word in enumerate(words)}
    tokenizer = LibraryTokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁"), normalizers.Prepend("▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in words[:3]])
    return tokenizer


def byte_level_kind() -> LibraryTokenizer:
    """Bytes as characters, split by a pattern, like Llama-3; special tokens stand after the vocabulary."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "Ġhe"]
    vocabulary = {word: token_id for token_id, word in enumerate(words)}
    tokenizer = LibraryTokenizer(models.BPE(vocabulary, [("h", "e"), ("Ġ", "he")], ignore_merges=True))
    split = pre_tokenizers.Split(Regex(r" ?\w+|\s+|[^\s\w]+"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<|eot_id|>"])
    return tokenizer


TOKENIZERS = {"sentencepiece": sentencepiece_kind, "byte level": byte_level_kind}


@pytest.fixture(params=TOKENIZERS)
def library_tokenizer(request: pytest.FixtureRequest) -> LibraryTokenizer:
    return TOKENIZERS[request.param]()


def conversation_of(case: dict[str, Any]) -> Conversation:
    history = [(("user", question), ("assistant", answer)) for question, answer in case["history"]]
    spoken = [entry for turn in history for entry in turn] + [("user", case["query"])]
    return read_messages([{"role": role, "content": text} for role, text in spoken], max_images=1)


@pytest.mark.parametrize(
    ("checkpoint", "case"), PROMPT_CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_prompts_equal_the_golden_ones(checkpoint: str, case: dict[str, Any]) -> None:
    expected = [case["prompt"]] if case["prompt"] else []
    assert render(conversation_of(case).turns, TEMPLATE[case["template"]]) == expected


def test_vqa_writes_past_answers_as_short_answers() -> None:
    turns = read_messages([QUESTION, ANSWER, QUESTION], 0).turns
    assert render(turns, TEMPLATE["vqa"]) == ["Question: What? Short answer: That.\nQuestion: What? Short answer:"]


def test_base_ignores_past_turns() -> None:
    assert render(read_messages([QUESTION, ANSWER, QUESTION], 0).turns, TEMPLATE["base"]) == ["What?"]


def test_token_pieces_stay_ids_between_texts() -> None:
    past = (Piece("token", token_id=7), Piece("user"), Piece("text", "|"), Piece("assistant"))
    template = ChatTemplate("roles", past, (Piece("token", token_id=8), Piece("text", "\n"), Piece("user")))
    turns = (Turn("q", "a"), Turn(""))
    assert render(turns, template) == [7, "q|a", 8, "\n"]


def test_parts_are_collected_in_order() -> None:
    picture = Image.new("RGB", (1, 1))
    url = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    parts: list[dict[str, Any]] = [{"type": "text", "text": "a "}, IMAGE, {"type": "text", "text": "b"}, url]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": parts},
        ANSWER,
        {"role": "user", "content": [{"type": "image", "image": picture}]},
    ]
    conversation = read_messages(messages, max_images=3)
    assert conversation.turns == (Turn("a b", "That.", images=(2, 3)), Turn("", images=(0,)))
    assert conversation.images == ("a.png", "data:image/png;base64,", picture)


def test_image_url_may_name_a_file_if_the_caller_says_so() -> None:
    """Whoever could send messages could have any file of the machine opened."""
    assert read_messages(part(type="image_url", image_url={"url": "a.png"}), 1, allow_local=True).images == ("a.png",)
    assert read_messages(part(type="image", image="a.png"), 1).images == ("a.png",)


LLAVA = ChatTemplate(
    "chat",
    past_turn=(
        Piece("text", "USER: "), Piece("user"), Piece("text", " ASSISTANT: "), Piece("assistant"),
        Piece("token", token_id=2),
    ),
    last_turn=(Piece("text", "USER: "), Piece("user"), Piece("text", " ASSISTANT:")),
    image=(Piece("image"), Piece("text", "\n")),
    image_place="turn_start",
    system=(Piece("system"), Piece("text", " ")),
    default_system="Be kind.",
)  # fmt: skip


def test_images_stand_at_the_start_of_their_turns_behind_the_system_text() -> None:
    turns = (Turn("what?", "a cat", images=(5, 5)), Turn("and this?", images=(4,)))
    expected = ["Be kind. USER: ", IMAGE_MARK, "\n", IMAGE_MARK, "\nwhat? ASSISTANT: a cat", 2]
    assert render(turns, LLAVA) == [*expected, "USER: ", IMAGE_MARK, "\nand this? ASSISTANT:"]
    assert render(turns[:1], LLAVA, system="Be brief.")[0] == "Be brief. USER: "


def test_images_stand_where_the_user_put_them() -> None:
    around = (Piece("text", "<"), Piece("image"), Piece("text", ">"))
    template = replace(LLAVA, image=around, image_place="here", system=())
    expected = ["USER: <", IMAGE_MARK, ">a <", IMAGE_MARK, "> b<", IMAGE_MARK, "> ASSISTANT:"]
    assert render((Turn("a  b", images=(0, 2, 4)),), template) == expected


class Letters(Tokenizer):
    """One id for every letter."""

    def __init__(self) -> None: ...

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def test_prompt_ids_hold_a_placeholder_for_every_row_of_every_image() -> None:
    rules = replace(RULES, placeholder_id=9, max_images=0, image_place="anywhere", positions="index")
    content = [{"type": "text", "text": "ab"}, IMAGE, IMAGE]
    messages: list[dict[str, Any]] = [{"role": "system", "content": "S"}, {"role": "user", "content": content}]
    ids = prompt_ids(read_messages(messages, max_images=0), LLAVA, rules, Letters())
    expected = [1, *map(ord, "S USER: "), 9, 9, 9, ord("\n"), 9, 9, 9, *map(ord, "\nab ASSISTANT:")]
    assert ids.tolist() == expected
    assert lay_out(ids, rules, num_images=2).types.sum() == 6


def test_a_template_without_a_place_for_a_system_message_refuses_it() -> None:
    with pytest.raises(PromptError, match="no place for one"):
        render((Turn("q"),), replace(LLAVA, system=()), system="Be kind.")


@pytest.mark.parametrize("place", [1, 2])
def test_a_system_message_stands_first(place: int) -> None:
    messages: list[dict[str, Any]] = [QUESTION, ANSWER, QUESTION]
    messages.insert(place, {"role": "system", "content": "late"})
    with pytest.raises(PromptError, match=f"message {place} is a system message, expected it before all others"):
        read_messages(messages, max_images=1)


def part(**entries: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [entries]}]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "empty"),
        ("hello", "messages are a str"),
        (["hello"], "message 0 is a str"),
        ([{"role": "system", "content": "Be kind."}], "empty, expected at least one from the user"),
        ([{"role": "system", "content": [IMAGE]}, QUESTION], "message 0, part 0: an image from the system"),
        ([{"role": "tool", "content": ""}], "role 'tool'"),
        ([{"content": ""}], "role None"),
        ([ANSWER], "message 0 is from the assistant, expected user"),
        ([QUESTION, QUESTION], "message 1 is from the user, expected assistant"),
        ([QUESTION, ANSWER], "last message is from the assistant"),
        ([{"role": "user"}], "content is a NoneType"),
        ([{"role": "user", "content": ["text"]}], "message 0, part 0: a str"),
        (part(type="video", video="a.mp4"), "type 'video'"),
        (part(text="no type"), "type None"),
        (part(type="text"), "text is a NoneType"),
        (part(type="image"), "image is a NoneType"),
        (part(type="image_url", image_url="a.png"), "expected .*image_url"),
        (part(type="image_url", image_url={"url": "a.png"}), "part 0: image_url is no data URL.*allow_local=True"),
        (part(type="image_url", image_url={"url": "file:///etc/passwd"}), "part 0: image_url is no data URL"),
        (part(type=10**5000), "type a number of thousands of digits"),
        ([{"role": 10**5000}], "role a number of thousands of digits"),
        ([{"role": "user", "content": "\udcff"}], "not valid UTF-8 at character 0"),
        (
            [QUESTION, {"role": "assistant", "content": [IMAGE]}, QUESTION],
            "message 1, part 0: an image from the assistant",
        ),
        ([{"role": "user", "content": [IMAGE, IMAGE]}], "second image slot"),
    ],
)
def test_bad_messages_are_refused(messages: Any, expected: str) -> None:
    with pytest.raises(PromptError, match=expected):
        read_messages(messages, max_images=1)


def test_prompt_ids_are_bos_placeholders_and_text() -> None:
    tokenizer = Tokenizer(sentencepiece_kind())
    conversation = read_messages([{"role": "user", "content": [IMAGE, {"type": "text", "text": "he"}]}], max_images=1)
    ids = prompt_ids(conversation, TEMPLATE["base"], RULES, tokenizer)
    assert ids.dtype == np.int64
    assert ids.tolist() == [1, 0, 0, 0, *tokenizer.encode("he")]


def test_an_empty_query_with_base_ends_with_the_image() -> None:
    conversation = read_messages([{"role": "user", "content": [IMAGE]}], max_images=1)
    assert prompt_ids(conversation, TEMPLATE["base"], RULES, Tokenizer(sentencepiece_kind())).tolist() == [1, 0, 0, 0]


def test_token_pieces_separate_the_texts_that_are_encoded() -> None:
    tokenizer = Tokenizer(byte_level_kind())
    template = ChatTemplate("roles", (), (Piece("text", "h"), Piece("token", token_id=99), Piece("user")))
    ids = prompt_ids(Conversation((Turn("e"),)), template, RULES, tokenizer)
    assert ids.tolist() == [1, *tokenizer.encode("h"), 99, *tokenizer.encode("e")]


@pytest.mark.parametrize("text", ["</s>", "a<s>b", "</s></s>", " </s> ", "<|eot_id|>", "<unk>", "<0x0A>"])
def test_special_tokens_in_a_text_stay_plain_text(library_tokenizer: LibraryTokenizer, text: str) -> None:
    special = set(library_tokenizer.get_added_tokens_decoder())
    tokenizer = Tokenizer(library_tokenizer)
    assert not special & set(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_merges_are_read_as_newer_versions_write_them(library_tokenizer: LibraryTokenizer) -> None:
    """The lowest version of tokenizers that was allowed knew merges as "a b" only: it could not open a bundle that was
    exported where a newer one was installed."""
    content = json.loads(library_tokenizer.to_str())
    merges = content["model"]["merges"]
    content["model"]["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    loaded = Tokenizer.from_bytes(json.dumps(content).encode(), "tokenizer.json")
    assert loaded.encode("he hello") == Tokenizer(library_tokenizer).encode("he hello")


def test_special_tokens_are_left_out_of_decoded_text(library_tokenizer: LibraryTokenizer) -> None:
    tokenizer, stop_id = Tokenizer(library_tokenizer), library_tokenizer.token_to_id("</s>")
    assert stop_id is not None
    assert tokenizer.decode([*tokenizer.encode("he"), stop_id]) == "he"


def test_errors_of_the_library_are_ours() -> None:
    """They are no more specific than Exception, and a panic of its Rust code is not even that."""
    words = LibraryTokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]"))
    with pytest.raises(PromptError, match=r"the tokenizer cannot read the text \(.+\)$"):
        Tokenizer(words).encode("b")


def test_a_long_text_is_never_cut() -> None:
    library_tokenizer = sentencepiece_kind()
    library_tokenizer.enable_truncation(4)
    library_tokenizer.enable_padding(length=8)
    assert len(Tokenizer(library_tokenizer).encode("h" * 20)) == 21
    assert len(Tokenizer(library_tokenizer).encode("h")) == 2


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = StreamDecoder(tokenizer)
    return [*(stream.add(token_id) for token_id in ids), stream.finish()]


@pytest.mark.parametrize(
    "text", ["hello world", " he  he ", "世界 😀👍🏽 é", "\n\n he\t\n", "\ufffd", "", "he\ufffdhe 世"]
)
def test_streamed_text_equals_the_whole(library_tokenizer: LibraryTokenizer, text: str) -> None:
    tokenizer = Tokenizer(library_tokenizer)
    assert "".join(streamed(tokenizer, tokenizer.encode(text))) == text


def test_random_ids_stream_to_the_same_text_as_decoded_at_once(library_tokenizer: LibraryTokenizer) -> None:
    """Broken UTF-8, special tokens, lone space marks and ids beyond the vocabulary included."""
    tokenizer, vocab = Tokenizer(library_tokenizer), library_tokenizer.get_vocab_size() + 2
    random = np.random.default_rng(0)
    for _ in range(400):
        ids = np.where(
            random.random(12) < 0.5, random.integers(0, vocab, 12), vocab - 1 - random.integers(0, 16, 12)
        ).tolist()
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids), ids


def test_spaces_within_a_text_survive_a_decoder_that_trims_all_leading_ones() -> None:
    library_tokenizer = sentencepiece_kind()
    steps = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1000, 0)]
    library_tokenizer.decoder = decoders.Sequence(steps)
    tokenizer = Tokenizer(library_tokenizer)
    assert "".join(streamed(tokenizer, tokenizer.encode("  h   he"))) == "h   he"


def test_half_a_character_is_held_back_and_whole_ones_are_not(library_tokenizer: LibraryTokenizer) -> None:
    tokenizer = Tokenizer(library_tokenizer)
    *pieces, rest = streamed(tokenizer, tokenizer.encode("he 😀 he he"))
    assert all("\ufffd" not in piece for piece in pieces)
    assert pieces[0] == "he" and rest == ""


def test_an_answer_cut_within_a_character_ends_with_the_mark_for_it(library_tokenizer: LibraryTokenizer) -> None:
    tokenizer = Tokenizer(library_tokenizer)
    ids = tokenizer.encode("he😀")[:-1]
    assert streamed(tokenizer, ids)[-1].startswith("\ufffd")


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"[" * 10_000])
def test_a_tokenizer_that_cannot_be_read_is_named(content: bytes) -> None:
    with pytest.raises(BundleError, match=r"bundle/tokenizer\.json: not "):
        Tokenizer.from_bytes(content, "bundle/tokenizer.json")


def test_a_tokenizer_survives_its_file(library_tokenizer: LibraryTokenizer) -> None:
    loaded = Tokenizer.from_bytes(library_tokenizer.to_str().encode(), "tokenizer.json")
    assert loaded.encode("he </s> 世") == Tokenizer(library_tokenizer).encode("he </s> 世")

"""The digits model's tokenizer: whole words, single digits, and bytes for everything else.

Writes tokenizer.json (Hugging Face `tokenizers`) with Llama's conventions: a leading-space mark on words, byte
fallback, <unk> = 0 (also padding and image placeholder), <s> = 1, </s> = 2. A word is one token or it is bytes: there
are no merges, so text splits the same way whether a prompt and its answer are encoded together or apart.
"""

import argparse
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

SPACE = "\u2581"
SPECIAL = ("<unk>", "<s>", "</s>")
WORDS = (
    "Question Answer Short answer "
    "What digit is in Where the Which digits left to right How many largest sum of Is there a "
    "leftmost rightmost Describe image yes no The from"
)
"""The words of questions.py's questions and answers and of the chat and vqa templates."""
AFTER_NEWLINE = ("Question",)
"""Words that also open a line: a later turn of a chat follows its newline without a space."""
MARKS = ("]]", ",", ";", ".", "?", ":", "\n")


def vocabulary() -> list[str]:
    """All tokens in the order of their ids."""
    digits = [str(digit) for digit in range(10)]
    spaced = [SPACE + piece for piece in (*WORDS.split(), *digits, "[[")]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    return [*SPECIAL, *fallback, SPACE, *MARKS, *digits, *spaced, *AFTER_NEWLINE]


def build_tokenizer() -> Tokenizer:
    """A tokenizer that gives back any text unchanged; a coordinate is three tokens, a box 17."""
    ids = {token: index for index, token in enumerate(vocabulary())}
    model = models.BPE(vocab=ids, merges=[], unk_token=SPECIAL[0], byte_fallback=True, ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    pieces = Regex(rf"{SPACE}?(?:\[\[|[0-9]|\p{{L}}+)|\]\]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, behavior="isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    return tokenizer


def main() -> None:
    """Write the tokenizer."""
    parser = argparse.ArgumentParser(description="Write the digits model's tokenizer.json.")
    default = Path(__file__).with_name("tokenizer.json")
    parser.add_argument("--out", type=Path, default=default, help="file to write (default: beside this script)")
    out: Path = parser.parse_args().out
    tokenizer = build_tokenizer()
    tokenizer.save(str(out))
    print(f"{out}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()

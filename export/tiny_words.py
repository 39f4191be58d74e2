"""A tokenizer for tiny checkpoints: a word for each byte that text in UTF-8 has, and special ones."""

from __future__ import annotations

from collections.abc import Mapping

NEVER = {0xC0, 0xC1, *range(0xF5, 0x100)}  # bytes that no text in UTF-8 has
PRINTED = {*range(33, 127), *range(161, 173), *range(174, 256)}


def tokenizer(words: Mapping[str, int]) -> str:
    """The text of a tokenizer.json; `words` are the special ones, whose ids are those of no byte."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # Bytes without a letter of their own have one from 256 on, as in GPT-2's bytes_to_unicode.
    others = iter(range(256, 512))
    letters = {byte: chr(byte if byte in PRINTED else next(others)) for byte in range(256)}
    bytes_ = {letters[byte]: id for id, byte in enumerate(b for b in range(256) if b not in NEVER)}
    made = Tokenizer(models.BPE({**bytes_, **words}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(word, special=True) for word in sorted(words, key=words.__getitem__)])
    return str(made.to_str())

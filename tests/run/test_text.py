"""Text as it comes: no broken character, nothing of a stop text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_tokenizer import BEGIN, END, WORDS, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers

from llmexport.run.errors import RunError
from llmexport.run.text import Stream, encode, read_tokenizer

SAID = "the fox é 狐 🦊 rests"


def sentencepiece() -> Tokenizer:
    """One as Llama 2 has: a space is a letter, and a letter that it does not know is its bytes."""
    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    model = models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def pieces(tokenizer: Tokenizer, ids: list[int], *stop: str) -> list[str]:
    stream = Stream(tokenizer, stop)
    given = []
    for token in ids:
        given.append(stream.put(token))
        if stream.stopped:
            break
    given.append(stream.end())
    assert "".join(given) == stream.text
    return given


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), sentencepiece()], ids=["bytes", "sentencepiece"])
def test_pieces_are_whole_characters_and_make_the_text(tokenizer: Tokenizer) -> None:
    given = pieces(tokenizer, encode(tokenizer, SAID, special=False))
    assert "".join(given) == SAID
    assert "狐" in given
    assert sum(map(bool, given)) > 10, "a text that comes at the end is no stream"


@pytest.mark.parametrize("seed", range(20))
def test_any_tokens_give_what_decoding_them_at_once_gives(seed: int) -> None:
    tokenizer = tiny_tokenizer()
    ids = np.random.default_rng(seed).integers(0, WORDS, 60).tolist()
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_tokens_that_are_bytes_and_no_text_are_given_in_the_end() -> None:
    tokenizer = sentencepiece()
    fox = encode(tokenizer, "fox", special=False)
    assert "".join(pieces(tokenizer, [*fox, 1 + 0xE7, 1 + 0xFF, *fox])) == "fox\ufffd\ufffd fox"
    assert "".join(pieces(tokenizer, [*fox, 1 + 0xE7])) == "fox\ufffd"


def test_special_tokens_are_no_text() -> None:
    tokenizer = tiny_tokenizer()
    ids = [tokenizer.token_to_id(BEGIN), *encode(tokenizer, "fox", special=False), tokenizer.token_to_id(END)]
    assert "".join(pieces(tokenizer, ids)) == "fox"


@pytest.mark.parametrize("stop", ["lazy", "laz", " lazy", "y dog"])
def test_a_stop_text_ends_the_text_before_it(stop: str) -> None:
    said = "over the lazy dog"
    ids = encode(tiny_tokenizer(), said, special=False)
    given = pieces(tiny_tokenizer(), ids, "nowhere", stop)
    assert "".join(given) == said[: said.index(stop)]


def test_what_only_begins_like_a_stop_text_is_given_in_the_end() -> None:
    tokenizer = tiny_tokenizer()
    given = pieces(tokenizer, encode(tokenizer, "the la", special=False), "lazy")
    assert "".join(given) == "the la"
    assert given[-1] == "la"


def test_a_stop_text_of_half_a_character_at_the_end_is_found() -> None:
    tokenizer = tiny_tokenizer()
    half = encode(tokenizer, "ab狐", special=False)[:-1]
    assert pieces(tokenizer, half)[-1] == "\ufffd"
    assert "".join(pieces(tokenizer, half, "\ufffd")) == "ab"


def test_a_trainers_truncation_and_padding_are_not_followed(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    said = "over the lazy dog"
    assert encode(read_tokenizer(tmp_path), said, special=True) == encode(tiny_tokenizer(), said, special=True)


def test_a_folder_without_a_tokenizer_is_told_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"has no tokenizer\.json: make one with transformers"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(
        RunError, match=r"has tokenizer\.model and no tokenizer\.json: make .*or give token ids with --ids"
    ):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff", b'{"model": 1}', b"[" * 10_000])
def test_a_damaged_tokenizer_is_one_line(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(RunError, match=r"tokenizer\.json is none that tokenizers reads") as error:
        read_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_a_prompt_that_is_no_text_is_one_line() -> None:
    with pytest.raises(RunError, match="no text in UTF-8"):
        encode(tiny_tokenizer(), "\udcff", special=True)

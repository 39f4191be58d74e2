"""From text to tokens and back, by the checkpoint's own tokenizer.json."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer

from llmexport.run.companions import read_bytes
from llmexport.run.errors import RunError

FILE = "tokenizer.json"
# What checkpoints have in its place.
OTHERS = ("*.model", "vocab.json", "vocab.txt", "*.tiktoken", "tekken.json")


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of an export. Raises RunError if it has none."""
    data = read_bytes(folder / FILE)
    if data is None:
        others = [path.name for pattern in OTHERS for path in folder.glob(pattern)]
        has = f"has {', '.join(others)} and no {FILE}" if others else f"has no {FILE}"
        raise RunError(
            f"{folder} {has}: make one with transformers, AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained("
            "FOLDER), and copy it there, or give token ids with --ids"
        )
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises no other type
        raise RunError(f"{folder / FILE} is none that tokenizers reads ({error}): copy it again") from error
    # Settings of a trainer, which transformers does not follow either.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def encode(tokenizer: Tokenizer, text: str, *, special: bool) -> list[int]:
    """The tokens of a text; `special`: with those that the tokenizer puts around it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RunError("the prompt is no text in UTF-8: give it in UTF-8") from error
    return tokenizer.encode(text, add_special_tokens=special).ids


class Stream:
    """The text of tokens as they come: whole characters, and nothing from a stop text on.

    What may be the beginning of a stop text is held back until the next tokens tell.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Iterable[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = [s for s in stop if s]
        self._before: list[int] = []  # the tokens whose text was given last, and which what follows is decoded with
        self._new: list[int] = []
        self._held = ""
        self.text = ""
        self.stopped = False

    def put(self, token: int) -> str:
        """What the token adds to the text."""
        self._new.append(token)
        more = self._decoded()
        # The end of what is no whole character yet; and a token may have no text of its own.
        if not more or more.endswith("\ufffd"):
            return ""
        self._before, self._new = self._new, []
        return self._take(more)

    def end(self) -> str:
        """What was held back, an unfinished character as U+FFFD."""
        if self.stopped:
            return ""
        last = self._take(self._decoded())
        rest, self._held = self._held, ""
        self.text += rest
        return last + rest

    def _decoded(self) -> str:
        # tokenizers' DecodeStream raises where tokens that are bytes make no UTF-8 (0.23).
        decode = functools.partial(self._tokenizer.decode, skip_special_tokens=True)
        return decode(self._before + self._new)[len(decode(self._before)) :]

    def _take(self, more: str) -> str:
        self._held += more
        ends = [at for s in self._stop if (at := self._held.find(s)) >= 0]
        if ends:
            self.stopped, given, self._held = True, self._held[: min(ends)], ""
        else:
            kept = max((n for s in self._stop for n in range(1, len(s)) if self._held.endswith(s[:n])), default=0)
            split = len(self._held) - kept
            given, self._held = self._held[:split], self._held[split:]
        self.text += given
        return given

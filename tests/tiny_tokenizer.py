"""A tokenizer of 256 words, among them every byte that text in UTF-8 has, in files as transformers saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

WORDS = 256
NEVER = {0xC0, 0xC1, *range(0xF5, 0x100)}  # bytes that no text in UTF-8 has
BEGIN, END, USER, ASSISTANT = SPECIAL = ("<s>", "</s>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n"
    "{%- if message.role == 'user' %}<|user|>{% else %}<|assistant|>{% endif %}{{ message.content }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}<|assistant|>{% generation %}{% endgeneration %}{% endif %}"
)


def tiny_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS, initial_alphabet=_alphabet(), special_tokens=list(SPECIAL), show_progress=False
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog, then the fox rests"] * 3, trainer)
    assert tokenizer.get_vocab_size() == WORDS
    return tokenizer


def _alphabet() -> list[str]:
    """The character that stands for each byte in byte-level BPE (GPT-2's bytes_to_unicode)."""
    plain, others = {*range(33, 127), *range(161, 173), *range(174, 256)}, iter(range(256, 512))
    letters = {b: chr(b if b in plain else next(others)) for b in range(256)}
    return [letter for b, letter in letters.items() if b not in NEVER]


def add_tokenizer(folder: Path, **config: Any) -> Tokenizer:
    """Writes tokenizer.json and tokenizer_config.json into a folder; `config` replaces keys of the latter."""
    tokenizer = tiny_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    end = {"__type": "AddedToken", "content": END, "lstrip": False, "rstrip": False, "single_word": False}
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(said | {"chat_template": TEMPLATE} | config))
    return tokenizer

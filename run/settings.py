"""How a checkpoint asks to be sampled: `generation_config.json`, read as transformers' GenerationConfig."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmexport.export.exported import Export
from llmexport.run.companions import read_json
from llmexport.run.errors import RunError
from llmexport.run.sampling import Sampling

FILE, EOS = "generation_config.json", "eos_token_id"
# What transformers takes where the file says nothing.
TOP_K = 50
# What these ask for is not done here.
NOT_DONE = (
    *("num_beams", "no_repeat_ngram_size", "encoder_repetition_penalty", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("bad_words_ids", "min_length", "min_new_tokens", "suppress_tokens", "begin_suppress_tokens", "sequence_bias"),
    *("forced_bos_token_id", "forced_eos_token_id", "guidance_scale", "exponential_decay_length_penalty", "top_h"),
    *("penalty_alpha", "dola_layers"),
)
NEUTRAL: tuple[Any, ...] = (None, 0, 1, False, [], {})


@dataclass(frozen=True)
class Settings:
    """eos: the tokens that end a text. stop: texts that do. notes: sentences on what is not done as asked."""

    sampling: Sampling
    eos: frozenset[int]
    stop: tuple[str, ...]
    notes: tuple[str, ...]


def read_settings(
    export: Export, *, temperature: float | None = None, top_k: int | None = None, top_p: float | None = None
) -> Settings:
    """What the files of an export ask for, where the arguments do not say otherwise: each of them asks for chance."""
    data = read_json(export.folder / FILE)
    said = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    asked: dict[str, Any] = {n: v for n, v in said.items() if v is not None}
    chance = _number(data, "do_sample", 0) > 0 or any(asked.values())
    sampling = Sampling(
        repetition_penalty=_number(data, "repetition_penalty", 1.0),
        temperature=_number(data, "temperature", 1.0),
        top_k=int(_number(data, "top_k", TOP_K)),
        top_p=_number(data, "top_p", 1.0),
        min_p=_number(data, "min_p", 0.0),
    )
    sampling = dataclasses.replace(sampling, **asked)
    if not chance:
        sampling = dataclasses.replace(sampling, temperature=0.0)
    _check(sampling)
    end: Any = next((d[EOS] for d in (data, export.text_config, export.config) if d.get(EOS) is not None), [])
    stop = data.get("stop_strings") or []
    left = [f"{n} {data[n]}" for n in NOT_DONE if data.get(n) not in NEUTRAL]
    notes = (f"{FILE} asks for {', '.join(left)}, which generate does not do",) if left else ()
    return Settings(sampling, _ids(end), tuple([stop] if isinstance(stop, str) else stop), notes)


def start_token(export: Export) -> int:
    """The token that a decoder begins with beside an encoder. Raises RunError if nobody says it."""
    said = (read_json(export.folder / FILE), export.text_config)
    tokens = [d[n] for n in ("decoder_start_token_id", "bos_token_id") for d in said if isinstance(d.get(n), int)]
    if not tokens:
        raise RunError(f"neither {FILE} nor config.json says decoder_start_token_id, which the decoder begins with")
    return int(tokens[0])


def _number(data: Mapping[str, Any], name: str, absent: float) -> float:
    value = data.get(name)
    if value is None:
        return absent
    if not isinstance(value, (int, float)):
        raise RunError(f"{FILE} says {name} {value!r}, which is no number: mend it")
    return value


def _ids(value: Any) -> frozenset[int]:
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) for i in ids):
        raise RunError(f"{EOS} is {value!r}, which is no token id: mend {FILE}")
    return frozenset(ids)


def _check(sampling: Sampling) -> None:
    for name, holds, range_ in (
        ("temperature", sampling.temperature >= 0, "0 or more"),
        ("top_k", sampling.top_k >= 0, "0 or more"),
        ("top_p", 0 < sampling.top_p <= 1, "above 0 and at most 1"),
        ("min_p", 0 <= sampling.min_p <= 1, "from 0 to 1"),
        ("repetition_penalty", sampling.repetition_penalty > 0, "above 0"),
    ):
        if not holds:
            raise RunError(f"{name} is {getattr(sampling, name)}: make it {range_}, or mend {FILE}")

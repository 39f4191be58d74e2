"""Reads `config.json` so that no key that can change the numbers is passed over in silence."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from llmexport.export.errors import ExportError
from llmexport.export.spec import LinearScaling, Llama3Scaling

# Keys that do not change what the exported graph computes: training, generation, bookkeeping.
# fmt: off
HARMLESS = frozenset(
    {
        "_name_or_path", "add_cross_attention", "architectures", "attention_dropout", "bad_words_ids",
        "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward", "cross_attention_hidden_size",
        "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping",
        "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty", "finetuning_task",
        "forced_bos_token_id", "forced_eos_token_id", "id2label", "initializer_range", "is_decoder",
        "is_encoder_decoder", "label2id", "length_penalty", "max_length", "max_position_embeddings",
        "min_length", "model_type", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
        "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "pad_token_id",
        "prefix", "pretraining_tp", "problem_type", "remove_invalid_values", "repetition_penalty",
        "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params",
        "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p",
        "torch_dtype", "torchscript", "transformers_version", "typical_p", "use_bfloat16", "use_cache",
    }
)
# fmt: on
_REQUIRED = object()


class Config:
    """The keys of one `config.json`, each read once by name; `finish` refuses those that nobody read."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._data = dict(data)
        self._read: set[str] = set()

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        self._read.add(key)
        if self._data.get(key) is None:
            if default is _REQUIRED:
                raise ExportError(f"config.json has no {key!r}: is it the config of a whole checkpoint?")
            return default
        return self._data[key]

    def window(self, key: str, absent: int | None) -> int | None:
        """An attention window in tokens; null means none, and a config without the key means `absent`."""
        self._read.add(key)
        if self._data.get(key, absent) is None:
            return None
        return self.integer(key, absent)

    def integer(self, key: str, default: Any = _REQUIRED, least: int = 1) -> int:
        return _integer(key, self.get(key, default), least)

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """A positive number."""
        return _positive(key, self.get(key, default))

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        if type(value) is not bool:
            raise ExportError(f"config.json: {key} is {show(value)}, expected true or false")
        return value

    def choice(self, key: str, choices: Mapping[str, Any], default: Any = _REQUIRED) -> Any:
        """What `choices` says of the value; refuses any other value."""
        value = self.get(key, default)
        if not isinstance(value, str) or value not in choices:
            known = ", ".join(map(repr, choices))
            raise ExportError(f"config.json: {key} is {show(value)}, this architecture knows {known}")
        return choices[value]

    def expect(self, key: str, value: Any) -> None:
        """Refuses a value other than the one that this architecture's blocks are written for."""
        found = self.get(key, value)
        if found != value or type(found) is not type(value):
            raise ExportError(f"config.json: {key} is {show(found)}, only {show(value)} is supported here")

    def rope(self, default_theta: float) -> tuple[float, Llama3Scaling | LinearScaling | None]:
        """Base and scaling of RoPE, from `rope_parameters` (transformers 5) or `rope_theta`/`rope_scaling`."""
        new, old = self.get("rope_parameters", {}), self.get("rope_scaling", {})
        if not isinstance(new, dict) or not isinstance(old, dict):
            raise ExportError("config.json: rope_parameters and rope_scaling must be objects")
        if new and old and new != old:
            raise ExportError("config.json has both rope_parameters and rope_scaling, and they differ: remove one")
        rope = dict(new or old)
        theta = _positive("rope_theta", rope.pop("rope_theta", self.get("rope_theta", default_theta)))
        kinds = [k for k in (rope.pop("rope_type", None), rope.pop("type", None)) if k is not None] or ["default"]
        if any(k != kinds[0] for k in kinds):
            raise ExportError(f"config.json: RoPE is said to be of types {show(kinds)}: choose one")
        scaling: Llama3Scaling | LinearScaling | None = None
        if kinds[0] == "llama3":
            scaling = Llama3Scaling(
                factor=_positive("RoPE's factor", rope.pop("factor", None)),
                low_frequency=_positive("RoPE's low_freq_factor", rope.pop("low_freq_factor", None)),
                high_frequency=_positive("RoPE's high_freq_factor", rope.pop("high_freq_factor", None)),
                original_positions=_integer(
                    "RoPE's original_max_position_embeddings", rope.pop("original_max_position_embeddings", None)
                ),
            )
        elif kinds[0] == "linear":
            scaling = LinearScaling(factor=_positive("RoPE's factor", rope.pop("factor", None)))
        elif kinds[0] != "default":
            raise ExportError(f"config.json: RoPE of type {show(kinds[0])} is not supported (llama3 and linear are)")
        if rope:
            raise ExportError(f"config.json: RoPE has keys that are not understood: {', '.join(map(_name, rope))}")
        return theta, scaling

    def finish(self) -> None:
        """Raises ExportError if a key that could change the numbers was never read."""
        unread = sorted(k for k in self._data.keys() - self._read - HARMLESS if self._data[k] is not None)
        if unread:
            keys = ", ".join(f"{_name(k)}={show(self._data[k])}" for k in unread)
            raise ExportError(
                f"config.json has keys that this architecture does not understand: {keys}. "
                "Exporting without them could give a wrong model; if they change nothing, remove them"
            )


def show(value: Any) -> str:
    """A value from a file, on one line and cut in length and depth."""
    return reprlib.repr(value)


def _name(key: str) -> str:
    return key if key.isidentifier() else show(key)


def _integer(key: str, value: Any, least: int = 1) -> int:
    if type(value) is not int or not least <= value < 2**63:
        kind = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ExportError(f"config.json: {key} is {show(value)}, expected {kind}")
    return value


def _positive(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
        raise ExportError(f"config.json: {key} is {show(value)}, expected a positive number")
    return float(value)

"""Reads `config.json` so that no key that can change the numbers is passed over in silence."""

from __future__ import annotations

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

    def integer(self, key: str, default: Any = _REQUIRED) -> int:
        """A positive integer."""
        value = self.get(key, default)
        if type(value) is not int or value <= 0:
            raise ExportError(f"config.json: {key} is {value!r}, expected a positive integer")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        return _number(key, self.get(key, default))

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        if type(value) is not bool:
            raise ExportError(f"config.json: {key} is {value!r}, expected true or false")
        return value

    def choice(self, key: str, choices: Mapping[str, Any], default: Any = _REQUIRED) -> Any:
        """What `choices` says of the value; refuses any other value."""
        value = self.get(key, default)
        if value not in choices:
            known = ", ".join(map(repr, choices))
            raise ExportError(f"config.json: {key} is {value!r}, this architecture knows {known}")
        return choices[value]

    def expect(self, key: str, value: Any) -> None:
        """Refuses a value other than the one that this architecture's blocks are written for."""
        found = self.get(key, value)
        if found != value or type(found) is not type(value):
            raise ExportError(f"config.json: {key} is {found!r}, only {value!r} is supported here")

    def rope(self, default_theta: float) -> tuple[float, Llama3Scaling | LinearScaling | None]:
        """Base and scaling of RoPE, from `rope_parameters` (transformers 5) or `rope_theta`/`rope_scaling`."""
        new, old = self.get("rope_parameters", {}), self.get("rope_scaling", {})
        if not isinstance(new, dict) or not isinstance(old, dict):
            raise ExportError("config.json: rope_parameters and rope_scaling must be objects")
        rope = {**old, **new}
        theta = _number("rope_theta", rope.pop("rope_theta", self.get("rope_theta", default_theta)))
        kinds = {rope.pop("rope_type", None), rope.pop("type", None)} - {None}
        if len(kinds) > 1:
            raise ExportError(f"config.json: RoPE is said to be of types {sorted(map(str, kinds))}, choose one")
        kind = kinds.pop() if kinds else "default"
        scaling: Llama3Scaling | LinearScaling | None = None
        if kind == "llama3":
            scaling = Llama3Scaling(
                factor=_positive(rope, "factor"),
                low_frequency=_positive(rope, "low_freq_factor"),
                high_frequency=_positive(rope, "high_freq_factor"),
                original_positions=int(_positive(rope, "original_max_position_embeddings")),
            )
        elif kind == "linear":
            scaling = LinearScaling(factor=_positive(rope, "factor"))
        elif kind != "default":
            raise ExportError(f"config.json: RoPE scaling of type {kind!r} is not supported (llama3, linear are)")
        if rope:
            raise ExportError(f"config.json: RoPE has keys that are not understood: {', '.join(sorted(rope))}")
        return theta, scaling

    def finish(self) -> None:
        """Raises ExportError if a key that could change the numbers was never read."""
        unread = sorted(k for k in self._data.keys() - self._read - HARMLESS if self._data[k] is not None)
        if unread:
            keys = ", ".join(f"{k}={self._data[k]!r}" for k in unread)
            raise ExportError(
                f"config.json has keys that this architecture does not understand: {keys}. "
                "Exporting without them could give a wrong model; if they change nothing, remove them"
            )


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ExportError(f"config.json: {key} is {value!r}, expected a number")
    return float(value)


def _positive(rope: dict[str, Any], key: str) -> float:
    value = _number(f"RoPE's {key}", rope.pop(key, None))
    if value <= 0:
        raise ExportError(f"config.json: RoPE's {key} is {value}, expected a positive number")
    return value

"""Models that keep no keys and values, called as those that do: what they carry takes their place."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Carrying:
    """Base of them. Random keys and values, as of a past that nobody computed, cannot be given to one."""

    def __call__(self, *args: Any, **given: Any) -> Any:
        raise NotImplementedError(type(self).__name__)


class Again(Carrying):
    """A model without a cache: it carries the row's tokens so far, of which each step computes all anew."""

    def __init__(self, model: Any) -> None:
        self._model, self.dtype = model, model.dtype

    def __call__(
        self,
        past_key_values: Mapping[str, Tensor] | None = None,
        use_cache: bool = True,
        attention_mask: Tensor | None = None,
        **given: Any,
    ) -> Any:
        """`attention_mask` is that of the row so far, as a cache wants it."""
        step = {k: v for k, v in given.items() if isinstance(v, Tensor)}
        row = {k: torch.cat((*([past_key_values[k]] if past_key_values else []), v), 1) for k, v in step.items()}
        made = self._model(**{**given, **row}, attention_mask=attention_mask)
        tokens = next(iter(step.values())).shape[1]
        return SimpleNamespace(logits=made.logits[:, -tokens:], past_key_values=row)


class RowByRow(Carrying):
    """A model that knows nothing of padding: each row is run alone and without it, and there are zeros in its places.

    `state` is what it calls what it carries, in its call and in its output.
    """

    def __init__(self, model: Any, state: str) -> None:
        self._model, self._state, self.dtype = model, state, model.dtype

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        past_key_values: Mapping[int, Any] | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
    ) -> Any:
        real, states, logits = attention_mask[:, -input_ids.shape[1] :].bool(), dict(past_key_values or {}), {}
        for row, own in enumerate(real):
            if own.any():
                carried = {self._state: states.get(row), "use_cache": use_cache, "logits_to_keep": logits_to_keep}
                made = self._model(input_ids[row : row + 1, own], **carried)
                states[row], logits[row] = getattr(made, self._state), made.logits[0]
        places = real[:, -logits_to_keep:]
        some = next(iter(logits.values()))
        found = some.new_zeros(*places.shape, some.shape[-1])
        for row, said in logits.items():
            found[row, places[row]] = said[len(said) - int(places[row].sum()) :]
        return SimpleNamespace(logits=found, past_key_values=states)

"""References of models that transformers has no class for, or a wrong one, each made from a checkpoint's tensors by
their published names.

A module here is what `Reference.made_by` names. It has `SOURCE`, what its numbers are of, and `make(config, tensors,
dtype, attention)`, which takes out of `tensors` all that it reads. What it gives is called as the models of
transformers are. No module here reads what exports: each splits and computes by itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmexport.validate.references.described import Described
from llmexport.validate.references.relaid import Unread

__all__ = ["Described", "Unread", "make", "source"]


def source(name: str) -> str:
    """What a module's numbers are of, for people; nothing where there is no such module."""
    return _module(name).SOURCE if name else ""


def make(
    name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype, attention: str | None
) -> Any:
    """The model of a checkpoint. Raises Unread if it has tensors that the reference does not know, or lacks some."""
    left = {n: t for n, t in tensors.items() if not n.endswith("rotary_emb.inv_freq")}
    try:
        model = _module(name).make(config, left, dtype, attention)
    except KeyError as error:
        raise Unread(f"the checkpoint lacks {error.args[0]}, which {source(name)} reads") from error
    if left:
        raise Unread(f"the checkpoint has {', '.join(sorted(left)[:3])}, which {source(name)} does not read")
    return model


def _module(name: str) -> Any:
    return importlib.import_module(f"llmexport.validate.references.{name}")

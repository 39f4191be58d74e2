"""`config.json` and `generation_config.json`, by which optimum's ORTModelForCausalLM runs an export's folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmexport.export.errors import ExportError
from llmexport.export.kv_cache import KvCache, kv_cache
from llmexport.export.rope import KINDS, ORIGINAL
from llmexport.export.spec import Graph

CONFIG, GENERATION = "config.json", "generation_config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What says how a head's size and the number of those of keys are told for a type of model that optimum does not know.
CACHE = (
    'shape = model.input_shapes["{name}"]; model.num_key_value_heads, model.embed_size_per_head = shape[1], shape[3]'
)


def files(
    graph: Graph, config: Mapping[str, Any], generation: Mapping[str, Any], keys: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """The files, and sentences on what the runtime does with this model. Raises ExportError if it cannot run it.

    config.json is that of the text model; `keys` are what its class calls RoPE's, where that is its own.
    """
    cache = kv_cache(graph)
    if cache.others:
        raise ExportError(f"which carries {', '.join(cache.others)} beside keys and values")
    if cache.slots:
        raise ExportError("whose static cache it does not write in place")
    if any(p.use == "positions" and len(p.shape) > 2 for p in graph.assembly.inputs):
        raise ExportError("which takes several positions for each token")
    written = {CONFIG: with_old_rope(config, keys)}
    if not generation and (ids := {key: config[key] for key in IDS if config.get(key) is not None}):
        written[GENERATION] = ids
    return written, [] if _expected(cache, config) else [_told(cache)]


def with_old_rope(config: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    """The same config in words that transformers 4 has for RoPE, and that 5 reads too: 4 passes over
    `rope_parameters` without a word."""
    told, new = dict(config), config.get("rope_parameters")
    if not new:
        return told
    del told["rope_parameters"]
    if new.keys() == set(KINDS):
        sliding, new = (new[kind] for kind in KINDS)
        if {k: v for k, v in sliding.items() if v is not None}.keys() - {"rope_type", "rope_theta"}:
            raise ExportError("whose sliding attention has a RoPE that transformers 4 cannot be told")
        told["rope_local_base_freq"] = sliding["rope_theta"]
    scaling = {k: v for k, v in new.items() if v is not None}
    kind = scaling.pop("rope_type", "default")
    told |= {keys.get(k, k): scaling.pop(k) for k in ("rope_theta", "partial_rotary_factor") if k in scaling}
    if kind == "longrope":
        # Who has this type says the length at the top, and calls the type otherwise.
        told |= {k: scaling.pop(k) for k in (ORIGINAL,) if k in scaling}
        told["rope_scaling"] = {"type": kind, **scaling}
    elif kind != "default":
        told["rope_scaling"] = {"rope_type": kind, **scaling}
    return told


def _expected(cache: KvCache, config: Mapping[str, Any]) -> bool:
    """Whether the cache is what optimum takes it to be, whatever the type: a key for each head, all sharing hidden."""
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    return cache.heads == heads and cache.heads * cache.head_size == hidden


def _told(cache: KvCache) -> str:
    line = CACHE.format(name=cache.past[0] % 0)
    return (
        "optimum knows the sizes of the cache for some types of model: where generate stops at `Got invalid "
        f"dimensions`, run after from_pretrained: {line}"
    )

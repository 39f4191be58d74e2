"""`genai_config.json`, by which onnxruntime-genai runs an export's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from llmexport.export.assembly import parts
from llmexport.export.errors import ExportError
from llmexport.export.kv_cache import KvCache, kv_cache
from llmexport.export.spec import Attention, Block, Embedding, Graph, Use

FILE = "genai_config.json"
# The two runners, by the rank of the positions that they feed: a number for each token, or mRoPE's three.
DECODER, MROPE = "decoder", "qwen3_5_moe_text"
# mRoPE's runner takes a token for an image or for padding by its id, within a single text too, and those that nobody
# names are 0: ids that no token has leave each text as it is, and end a batch of unequal texts with an error.
NO_TOKENS = dict.fromkeys(("pad_token_id", "image_token_id", "video_token_id", "vision_start_token_id"), -1)
# What it carries beside keys and values, by names of its own.
STATES = {"past_key_values.%d.conv_state", "past_key_values.%d.recurrent_state"}
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SEARCH = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
INPUTS: Mapping[str, Use] = MappingProxyType(
    {"input_ids": "tokens", "attention_mask": "padding", "position_ids": "positions"}
)
CONTEXT = 4096  # tokens, where a config does not say for how many it is made


def files(graph: Graph, config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The file, and sentences on what the runtime does with this model. Raises ExportError if it cannot run it."""
    blocks = [part.block for step in graph.assembly.steps for part in parts(step)]
    [table] = [b for b in blocks if isinstance(b, Embedding)]
    vocabulary, context = table.vocabulary, config.get("max_position_embeddings") or table.placed or None
    ids, notes = _ids(vocabulary, config, generation), list[str]()
    if "eos_token_id" not in ids:
        notes.append(f"no config says eos_token_id, without which onnxruntime-genai stops: write it into {FILE}")
    if context is None:
        context = CONTEXT
        notes.append(f"config.json says no max_position_embeddings: {FILE} says {CONTEXT}, as context_length")
    cache, mrope = kv_cache(graph), any(p.use == "positions" and len(p.shape) > 2 for p in graph.assembly.inputs)
    if mrope or cache.slots or any(p.use == "span_start" for b in blocks for p in b.inputs):
        notes.append(
            "onnxruntime-genai pads a batch on the right, which this model's graph does not take: "
            "give it one text at a time, or texts of one length"
        )
    model = {
        "type": MROPE if mrope else DECODER,
        "vocab_size": vocabulary,
        "context_length": context,
        **(ids | NO_TOKENS if mrope else ids),
        "decoder": _decoder(graph, cache, blocks),
    }
    asked = {key: generation[key] for key in SEARCH if generation.get(key) is not None}
    # The slots of a cache that is written in place are as many as tokens of the longest text.
    length = cache.slots or context
    search = {"do_sample": False, **asked, "max_length": length, "past_present_share_buffer": bool(cache.slots)}
    return {FILE: {"model": model, "search": search}}, notes


def _decoder(graph: Graph, cache: KvCache, blocks: Sequence[Block]) -> dict[str, Any]:
    """The graph's ports and sizes."""
    if unknown := {*cache.others} - STATES:
        raise ExportError(f"which carries {', '.join(sorted(unknown))}")
    fed = {p.use: p.name for p in graph.assembly.inputs if p.name not in graph.carried}
    [logits] = [p.name for p in graph.assembly.outputs if p.use == "logits"]
    return {
        "filename": f"{graph.name}.onnx",
        "head_size": cache.head_size,
        "hidden_size": next(b.hidden for b in blocks if isinstance(b, Embedding)),
        "num_attention_heads": max(b.heads for b in blocks if isinstance(b, Attention)),
        "num_key_value_heads": cache.heads,
        "num_hidden_layers": cache.layers,
        "session_options": {"provider_options": []},
        "inputs": {
            **{name: fed[use] for name, use in INPUTS.items() if use in fed},
            **dict(zip(("past_key_names", "past_value_names"), cache.past, strict=True)),
        },
        "outputs": {
            "logits": logits,
            **dict(zip(("present_key_names", "present_value_names"), cache.present, strict=True)),
        },
    }


def _ids(vocabulary: int, config: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    """The tokens with a part in generation, of those that there are. Where none is said to pad, one that ends does."""
    ids: dict[str, Any] = {}
    for key in IDS:
        said = config.get(key) if generation.get(key) is None else generation[key]
        known = [i for i in (said if isinstance(said, list) else [said]) if type(i) is int and 0 <= i < vocabulary]
        if known:
            ids[key] = known if isinstance(said, list) else known[0]
    ends = ids.get("eos_token_id")
    if ends is not None and "pad_token_id" not in ids:
        ids["pad_token_id"] = ends[0] if isinstance(ends, list) else ends
    return ids

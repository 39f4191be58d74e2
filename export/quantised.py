"""Quantised checkpoints that cannot be exported: by what they are quantised, from the config or from the tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmexport.export.errors import ExportError
from llmexport.export.values import show, show_name
from llmexport.plugins.regular import read_regular

CURE = (
    "take the unquantised model that it was made from, or dequantise it "
    "(transformers: from_pretrained(...).dequantize(), then save_pretrained)"
)
# Where tools other than transformers describe what they did, and the key within.
FILES = {"hf_quant_config.json": "quantization", "quantize_config.json": "", "quant_config.json": ""}
WORD = re.compile(r"[A-Za-z0-9_.-]{1,40}")


@dataclass(frozen=True)
class Layout:
    """A way to store a matrix NAME.weight: `mark` ends the name of a tensor that only this way has, `beside` are the
    endings in its place of those that lie with it."""

    what: str
    mark: str
    beside: tuple[str, ...]


# The first that fits is meant.
LAYOUTS = (
    Layout("bitsandbytes, 4 bits", ".quant_map", ("", ".absmax")),
    Layout("bitsandbytes, 8 bits", ".SCB", (".weight",)),
    Layout("compressed-tensors, NVFP4", "_packed", ("_scale", "_global_scale")),
    Layout("compressed-tensors, packed integers", "_packed", ("_scale",)),
    Layout("GPTQ", ".qweight", (".qzeros", ".scales", ".g_idx")),
    Layout("AWQ or GPTQ", ".qweight", (".qzeros", ".scales")),
    Layout("ModelOpt, 4 bits", "_scale_2", ("", "_scale")),
    Layout("a scale for each block", "_scale_inv", ("",)),
    Layout("a scale beside each matrix", "_scale", ("",)),
    Layout("MLX", ".scales", (".weight", ".biases")),
    Layout("MXFP4", "_blocks", ("_scales",)),
)


def refusal(where: str, what: str, known: str = "") -> ExportError:
    """`where` the quantisation is spoken of, `what` it is, and the one that is `known` where this is asked for."""
    exported = f"only unquantised weights{' or ' * bool(known)}{known} can be exported here"
    return ExportError(f"{where} says that the weights are quantised ({what}), {exported}: {CURE}")


def describe(found: Any) -> str:
    """What a quantization_config says, in words: method, format, bits, groups."""
    if not isinstance(found, Mapping):
        return show(found)
    producer, inner = found.get("producer"), _weights(found)
    method = found.get("quant_method") or (producer.get("name") if isinstance(producer, Mapping) else None)
    if not method and {"bits", "group_size"} <= found.keys() <= {"bits", "group_size", "mode"}:
        method = "mlx"
    names = ("quant_algo", "format", "fmt", "checkpoint_format", "bnb_4bit_quant_type")
    said = [_word(n) for n in (method, *map(found.get, names)) if n]
    loaded = 4 if found.get("load_in_4bit") is True else 8 if found.get("load_in_8bit") is True else None
    if bits := found.get("bits") or found.get("w_bit") or inner.get("num_bits") or loaded:
        said.append(f"{_word(bits)} bits")
    if group := found.get("group_size") or found.get("q_group_size") or inner.get("group_size"):
        said.append("one group" if group == -1 else f"groups of {_word(group)}")
    if isinstance(block := found.get("weight_block_size"), list):
        said.append(f"blocks of {' x '.join(map(_word, block[:3]))}")
    return ", ".join(dict.fromkeys(said)) or f"by what is not said: {show(found)}"


def found(failed: Collection[str], unused: Collection[str], stored: Mapping[str, Any], folder: Path) -> str | None:
    """How the tensors that do not fit are quantised, as a sentence; None if nothing speaks for that.

    `failed` are the names of tensors that are missing or not as they should be, `unused` of those that nobody wants.
    """
    near = tuple(n.removesuffix(".weight") for n in failed)
    # Experts that should be one tensor may lie one by one in a folder of that name.
    around = tuple(f"{n.rpartition('.')[0]}." for n in near)
    tries = (_layout((n for n in unused if n.startswith(starts)), stored) for starts in (near, around))
    match = next((m for m in tries if m), None)
    if match is None:
        return None
    layout, name = match
    # The matrix itself lies beside the mark, or is what the mark ends.
    matrix = name.removesuffix(layout.mark) + layout.beside[0] if layout.beside[0] in ("", ".weight") else name
    words = ", ".join((layout.what, f"stored as {stored[matrix].dtype}", *_beside(folder)))
    if layout.what == "MXFP4":
        return (
            f"the checkpoint holds {show_name(name)}: its experts are in MXFP4, of which this config.json says nothing "
            "that is read here: download config.json again; MXFP4 is exported of gpt_oss"
        )
    return (
        f"the checkpoint's weights are quantised ({words}), as {show_name(name)} shows, "
        f"only unquantised ones can be exported here: {CURE}"
    )


def _layout(names: Iterator[str], stored: Mapping[str, Any]) -> tuple[Layout, str] | None:
    held = list(names)
    for layout in LAYOUTS:
        for name in held:
            if name.endswith(layout.mark) and all(name.removesuffix(layout.mark) + b in stored for b in layout.beside):
                return layout, name
    return None


def _beside(folder: Path) -> Iterator[str]:
    """What the files of other tools say, if they are there and read as they should."""
    for file, key in FILES.items():
        data = read_file(folder / file)
        inner = data.get(key) if key else data
        if isinstance(inner, dict) and inner:
            yield f"{file}: {describe({**inner, 'producer': data.get('producer')})}"


def read_file(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none, as it only adds to what the tensors tell."""
    try:
        data = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _weights(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the first group of compressed-tensors says of weights."""
    groups = found.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
    inner = first.get("weights") if isinstance(first, Mapping) else None
    return inner if isinstance(inner, Mapping) else {}


def _word(value: Any) -> str:
    return value if isinstance(value, str) and WORD.fullmatch(value) else show(value)

"""What transformers makes of an exported model's weights."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from llmexport.export import archs
from llmexport.export.checkpoint import INDEX
from llmexport.export.exported import Export
from llmexport.export.packed import repack
from llmexport.export.packed.read import spare
from llmexport.export.packed.scheme import without
from llmexport.export.trace import torch_dtype
from llmexport.export.values import one_line
from llmexport.validate import references
from llmexport.validate.carrying import Again, RowByRow
from llmexport.validate.feeds import sees
from llmexport.validate.runners import to_torch

OLDEST_TRANSFORMERS = (5, 20)  # whose numbers the tests hold the architectures against


def unable() -> str:
    """Why the transformers that is installed, if one is, cannot be the reference; or nothing."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed: pip install transformers"
    installed = importlib.metadata.version("transformers")
    if tuple(int(n) for n in re.findall(r"\d+", installed)[:2]) < OLDEST_TRANSFORMERS:
        oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
        return (
            f"transformers {installed} is installed, before {oldest} it is wrong for some architectures without a "
            f"word: pip install 'transformers>={oldest}'"
        )
    return ""


class Refused(Exception):
    """transformers does not take a config that we take."""


def _config(kind: Any, data: dict[str, Any]) -> Any:
    try:
        return kind.from_dict(data)
    except Exception as error:
        raise Refused(f"transformers does not take this config: {one_line(error)}") from error


def _without_text(config: dict[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the same model whose text has no layers."""
    key = next(k for k, v in config.items() if isinstance(v, dict) and text.items() >= v.items())
    # These speak of each layer.
    kept = {k: v for k, v in config[key].items() if k not in ("layer_types", "moe_layers", "no_rope_layers")}
    return {**config, key: {**kept, "num_hidden_layers": 0}}


def load(export: Export, attention: str | None) -> Any:
    """The model, which is called as those of transformers that keep a cache, whatever it carries. Raises Refused where
    there is none of this config or of these weights."""
    model = _made(export, attention) if export.reference.made_by else _loaded(export, attention)
    if export.reference.state:
        return RowByRow(model, export.reference.state)
    carries = any(g.carried for g in export.graphs)
    return Again(model) if carries and not export.reference.cached else model


def _loaded(export: Export, attention: str | None) -> Any:
    """The model as transformers loads it."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    # It lists the vision tensors that the text model leaves.
    transformers.utils.logging.set_verbosity_error()
    model = getattr(transformers, export.reference.model_class, None)
    if model is None:
        have = f"transformers {transformers.__version__}"
        raise Refused(f"{have} has no {export.reference.model_class}: pip install -U transformers")
    if older := {*map(str, export.config.get("architectures") or ())} & {*export.reference.aliases}:
        raise Refused(f"transformers takes no config of {older.pop()}, whose keys have other names")
    weights, whole = export.checkpoint(), any(map(sees, export.graphs))
    # Whose numbers or whose experts lie as transformers does not read them.
    relaid = bool(weights.matrices) or (export.reference.joined and any(_apart(weights.tensors, export)))
    with tempfile.TemporaryDirectory(prefix="llmexport-") as name:
        folder = Path(name)
        if not relaid:
            (folder / "config.json").write_text(json.dumps(export.config))
            # What an export wrote anew is in the shards as well, by names that transformers would take for others.
            index = {t.name: t.file for t in weights.tensors.values() if t.file != repack.FILE}
            (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
            for file in {*index.values()}:
                (folder / file).symlink_to((export.folder / file).resolve())
        # transformers writes into the dictionaries that it is given.
        config = copy.deepcopy(dict(export.config if whole else export.text_config))
        if whole and not any(p.use == "logits" for g in export.graphs for p in g.assembly.outputs):
            # What sees is asked alone, and a text model beside it, which it never calls, would fill the memory.
            config = _without_text(config, export.text_config)
        # The class of the whole checkpoint has the checkpoint's own names.
        names = {f"^{re.escape(there)}": here for here, there in export.renamed.items()} if not whole else {}
        names |= _newer_names(model, _config(model.config_class, copy.deepcopy(config)), archs.load(export.arch).older)
        source: dict[str, Any] = {"pretrained_model_name_or_path": folder}
        if relaid:
            # Of the weights that they mean, which is no transformers' own reading of them.
            config = without(config)
            source = {"pretrained_model_name_or_path": None, "state_dict": _tensors(export)}
        elif "quantization_config" in config:
            # Weights in 4 bits are computed with in the runner's dtype, as in our export.
            source["quantization_config"] = transformers.utils.quantization_config.Mxfp4Config(dequantize=True)
        loaded = model.from_pretrained(
            **source,
            config=_config(model.config_class, config),
            key_mapping=names or None,
            dtype=torch_dtype(export.dtype),
            attn_implementation=attention,
        )
        return (loaded.to(torch_dtype(export.dtype)) if export.reference.recast else loaded).eval()


def _newer_names(model: Any, config: Any, older: Mapping[str, str]) -> dict[str, str]:
    """How names of old releases are to be read, by patterns: those that the model of transformers does not have."""
    if not older:
        return {}
    with torch.device("meta"):
        known = tuple(model(config).state_dict())
    return {f"{re.escape(old)}$": new for new, old in older.items() if not any(n.endswith(old) for n in known)}


def _made(export: Export, attention: str | None) -> Any:
    """The model that a module of references makes of the weights in the export."""
    tensors, dtype = _tensors(export), torch_dtype(export.dtype)
    try:
        # Those are numbers already.
        return references.make(export.reference.made_by, without(export.text_config), tensors, dtype, attention)
    except references.Unread as error:
        raise Refused(str(error)) from error


def _tensors(export: Export) -> dict[str, Tensor]:
    """The weights of an export by their names in 16 bits, those in few bits as the numbers that they mean."""
    checkpoint = export.checkpoint()
    read = (w for g in export.graphs for step in g.step_weights.values() for w in step.values())
    used = {n for names in read for n in ([names] if isinstance(names, str) else names)}
    held = spare(checkpoint, used).union(*(m.tensors for m in checkpoint.matrices.values()))
    made = {n: to_torch(checkpoint.values(n)) for n in checkpoint.matrices}
    stored: dict[str, list[str]] = {}
    for tensor in checkpoint.tensors.values():
        if tensor.name not in held and tensor.file != repack.FILE:
            stored.setdefault(tensor.file, []).append(tensor.name)
    for file, names in stored.items():
        with safe_open(export.folder / file, "pt") as opened:
            made |= {n: opened.get_tensor(n) for n in names}
    return _joined(made, export) if export.reference.joined else made


def _apart(names: Iterable[str], export: Export) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """Of these the names of experts' matrices, each with its stack's and with its place there: expert and matrix."""
    held = [*names]
    for stack, parts in archs.load(export.arch).stacks.items():
        for place, part in enumerate(parts):
            pattern = re.escape(part).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{e\}", r"(?P<e>\d+)")
            for name in [n for n in held if n.endswith(part.rpartition("}")[2])]:
                if at := re.search(f"{pattern}$", name):
                    yield name, name[: at.start()] + stack.replace("{i}", at["i"]), (int(at["e"]), place)


def _joined(tensors: dict[str, Tensor], export: Export) -> dict[str, Tensor]:
    """The same with each stack in the place of its matrices."""
    found: dict[str, dict[tuple[int, int], Tensor]] = {}
    for name, joined, place in _apart(tensors, export):
        found.setdefault(joined, {})[place] = tensors.pop(name)
    for name, held in found.items():
        whole = torch.stack([held[key] for key in sorted(held)])
        experts = max(e for e, _ in held) + 1
        tensors[name] = whole.reshape(experts, -1, whole.shape[-1]).mT.contiguous()
    return tensors

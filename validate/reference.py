"""transformers, the reference that nobody here wrote, on an exported model's weights."""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import importlib.util
import json
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from llmexport.export import archs
from llmexport.export.checkpoint import INDEX
from llmexport.export.exported import Export
from llmexport.export.spec import Use
from llmexport.export.trace import torch_dtype
from llmexport.export.values import one_line
from llmexport.validate import references
from llmexport.validate.feeds import Feed, beside, earlier, sees
from llmexport.validate.pictures import Pictures, Sight, sight, stands_for
from llmexport.validate.runners import to_numpy, to_torch
from llmexport.validate.source import of_source
from llmexport.validate.stages import Stage

if TYPE_CHECKING:
    from transformers import Cache

# What transformers calls the tokens, and what is known of them, in the calls of all models.
KEYWORDS: dict[Use, str] = {
    "tokens": "input_ids",
    "positions": "position_ids",
    "padding": "attention_mask",
    "token_types": "token_type_ids",
}
# The same of the text that an encoder reads, and of a decoder's tokens beside it.
SOURCE_KEYWORDS: dict[Use, str] = {"tokens": "input_ids", "padding": "attention_mask"}
STEP_KEYWORDS: dict[Use, str] = {"tokens": "decoder_input_ids", "padding": "decoder_attention_mask"}
# What it calls pictures of a packed row, by the tokens that stand for them: images, then frames of videos.
PIXELS, GRIDS = ("pixel_values", "pixel_values_videos"), ("image_grid_thw", "video_grid_thw")
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


class Transformers:
    """The model as transformers runs it, from the weights in the export: the reference that nobody here wrote.

    It carries its own cache from stage to stage, and begins a crossing with the random keys and values that our
    runners read; a model without a cache there runs the whole row at every stage. A multimodal model is given pictures
    as its processor gives them, and counts their positions itself. `fast`: it computes attention as it chooses to.
    Raises Refused where it cannot say what is right.
    """

    def __init__(self, export: Export, *, fast: bool = False, last: bool = False) -> None:
        if refusal := unable():
            raise Refused(refusal)
        if unknown := [p.name for p in beside(export)]:
            raise Refused(f"nobody knows what transformers calls {', '.join(unknown)}")
        self.seconds = 0.0
        self._export = export
        self._model = _load(export, None if fast else export.reference.attention)
        carried = {n for g in export.graphs for n in g.carried}
        ports = [p for g in export.graphs for p in g.assembly.inputs if p.name not in carried]
        # A model without RoPE reads no positions.
        self._source = {SOURCE_KEYWORDS[p.use]: p for p in ports if of_source(p) and p.use in SOURCE_KEYWORDS}
        words = STEP_KEYWORDS if self._source else KEYWORDS
        self._given = {words[p.use]: p for p in ports if not of_source(p) and p.use in words}
        self._encoded: Any = None
        self._cached = bool(carried) and export.reference.cached
        # What of the row so far a model without a cache is given again.
        again = [k for k, p in self._given.items() if p.use != "padding"]
        self._again = again if carried and not self._cached else []
        self._row: dict[str, Tensor] = {}
        self._last = last or export.gives_last_logits
        # A model with an encoder gives the logits of all tokens.
        self._kept = {"logits_to_keep": 1} if self._last and not self._source else {}
        self._cache: Cache | None = None
        self._states: dict[int, Any] = {}  # what it carries of each row, where that is no cache
        self._sight = sight(export.blocks)
        self._features = next((p.name for g in export.graphs for p in g.assembly.outputs if p.use == "features"), "")

    def run(self, stage: Stage) -> Feed:
        """The outputs that the export's reference names, and the features of pictures; nothing of a crossing where no
        cache can be given to it."""
        made: Feed = {}
        if stage.begins and stage.past and isinstance(self._model, references.Described):
            return made
        if self._sight and stage.pictures:
            made[self._features] = self._seen(stage.pictures)
        if self._given:
            made |= self._read(stage)
        return made

    def _read(self, stage: Stage) -> Feed:
        if self._export.reference.state:
            return self._rows(stage)
        given = {keyword: to_torch(stage.at(port)) for keyword, port in self._given.items()}
        if self._sight and stage.pictures:
            given |= _as_processed(self._sight, stage.ids, stage.pictures, self._model.dtype)
            if self._sight.sections:
                del given[KEYWORDS["positions"]]
        start = time.perf_counter()
        if self._source:
            given |= self._of_source(stage)
        if stage.begins:
            if self._again and stage.past:
                raise Refused("transformers keeps no cache of this model that could hold random keys and values")
            self._cache = self._filled(stage) if stage.past else None
            self._row = {}
        if self._again:
            given |= self._whole(given)
        run = self._model
        if self._cached:
            run = functools.partial(run, past_key_values=self._cache, use_cache=True)
        with torch.inference_mode():
            made = run(**given, **self._kept)
        self.seconds = time.perf_counter() - start
        self._cache = made.past_key_values if self._cached else None
        own = (
            slice(-stage.ids.shape[1], None)
            if self._again
            else slice(-1 if self._last and self._source else None, None)
        )
        return {port: to_numpy(getattr(made, name)[:, own]) for port, name in self._export.reference.outputs.items()}

    def _whole(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """The row up to the stage's last token, where the stage's own tokens are given."""
        self._row = {k: torch.cat((*([self._row[k]] if k in self._row else []), given[k]), 1) for k in self._again}
        return self._row

    def _rows(self, stage: Stage) -> Feed:
        """Row by row and without padding, in whose places there are zeros."""
        carries, made = self._export.reference.state, {}
        if stage.begins:
            self._states = {}
        start = time.perf_counter()
        with torch.inference_mode():
            for row, real in enumerate(stage.real):
                if real.any():
                    carried = {carries: self._states.get(row), "use_cache": True}
                    made[row] = self._model(to_torch(stage.ids[row : row + 1, real]), **carried, **self._kept)
        self.seconds = time.perf_counter() - start
        self._states |= {row: getattr(its, carries) for row, its in made.items()}
        found: Feed = {}
        for port, name in self._export.reference.outputs.items():
            rows = {row: to_numpy(getattr(its, name)) for row, its in made.items()}
            found[port] = _in_places(stage.real, rows, last=bool(self._kept))
        return found

    def _of_source(self, stage: Stage) -> dict[str, Any]:
        """What the decoder is given of the text, which the encoder reads where a stage begins."""
        read = {keyword: to_torch(stage.at(port)) for keyword, port in self._source.items()}
        if stage.begins:
            with torch.inference_mode():
                self._encoded = self._model.get_encoder()(**read)
        padding = SOURCE_KEYWORDS["padding"]
        return {"encoder_outputs": self._encoded, padding: read[padding]}

    def _seen(self, pictures: Pictures) -> np.ndarray:
        """The features of pictures, one after the other, as wide as the text model."""
        grids = {} if pictures.grids is None else {"image_grid_thw": to_torch(pictures.grids)}
        with torch.inference_mode():
            made = self._model.get_image_features(to_torch(pictures.pixels).to(self._model.dtype), **grids)
            if projector := getattr(self._model, "multi_modal_projector", None):
                # Llama 4 projects what this returns where it puts it into the text.
                return to_numpy(projector(made.last_hidden_state).flatten(0, -2))
            return to_numpy(torch.cat(made.pooler_output))

    def _filled(self, stage: Stage) -> Cache:
        """A cache as after the tokens whose keys and values a crossing begins with."""
        import transformers

        # The config of a model with an encoder speaks of the encoder's layers.
        cache = transformers.DynamicCache(**({} if self._source else {"config": self._model.config}))
        for graph in self._export.graphs:
            values = earlier(graph, self._export.dtype, stage.sizes)
            layers = [s for s in graph.assembly.steps if s.block.states]
            for i, step in enumerate(layers):
                # All other states are zero, as where the cache begins.
                held = [values[n] for s in step.block.states if (n := step.reads[s.past.name]) in values]
                if held:
                    cache.update(*map(to_torch, held), i)
        return transformers.EncoderDecoderCache(cache, transformers.DynamicCache()) if self._source else cache


def _in_places(real: np.ndarray, rows: Mapping[int, np.ndarray], last: bool) -> np.ndarray:
    """What rows [1, tokens, ...] say of real tokens, in the places of those; `last`: of the last place alone."""
    places = real[:, -1:] if last else real
    some = next(iter(rows.values()))
    made = np.zeros((*places.shape, *some.shape[2:]), some.dtype)
    for row, own in rows.items():
        made[row, places[row]] = own[0, own.shape[1] - places[row].sum() :]
    return made


def _without_text(config: dict[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the same model whose text has no layers."""
    key = next(k for k, v in config.items() if isinstance(v, dict) and text.items() >= v.items())
    # These speak of each layer.
    kept = {k: v for k, v in config[key].items() if k not in ("layer_types", "moe_layers", "no_rope_layers")}
    return {**config, key: {**kept, "num_hidden_layers": 0}}


def _as_processed(seen: Sight, ids: np.ndarray, pictures: Pictures, dtype: torch.dtype) -> dict[str, Tensor]:
    """Pictures as the processors of transformers give them: frames of videos apart from images."""
    pixels = to_torch(pictures.pixels).to(dtype)
    if pictures.grids is None:
        return {"pixel_values": pixels}
    grids, kinds = to_torch(pictures.grids), torch.tensor(stands_for(seen, ids, pictures))
    patches = kinds.repeat_interleave(grids.prod(1))
    given = {"mm_token_type_ids": torch.zeros(ids.shape, dtype=torch.int64)}
    for i, (token, pixel_name, grid_name) in enumerate(zip(seen.tokens, PIXELS, GRIDS, strict=True)):
        given["mm_token_type_ids"] += (i + 1) * to_torch(ids == token)
        if (kinds == token).any():
            given |= {pixel_name: pixels[patches == token], grid_name: grids[kinds == token]}
    return given


def _load(export: Export, attention: str | None) -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    # It lists the vision tensors that the text model leaves.
    transformers.utils.logging.set_verbosity_error()
    if made_by := export.reference.made_by:
        return _made(export, made_by, attention)
    model = getattr(transformers, export.reference.model_class, None)
    if model is None:
        have = f"transformers {transformers.__version__}"
        raise Refused(f"{have} has no {export.reference.model_class}: pip install -U transformers")
    if older := {*map(str, export.config.get("architectures") or ())} & {*export.reference.aliases}:
        raise Refused(f"transformers takes no config of {older.pop()}, whose keys have other names")
    weights, whole = export.checkpoint(), any(map(sees, export.graphs))
    with tempfile.TemporaryDirectory(prefix="llmexport-") as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(export.config))
        index = {t.name: t.file for t in weights.tensors.values()}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
        for shard in weights.shards:
            (folder / shard.file).symlink_to((export.folder / shard.file).resolve())
        # transformers writes into the dictionaries that it is given.
        config = copy.deepcopy(dict(export.config if whole else export.text_config))
        if whole and not any(p.use == "logits" for g in export.graphs for p in g.assembly.outputs):
            # What sees is asked alone, and a text model beside it, which it never calls, would fill the memory.
            config = _without_text(config, export.text_config)
        # The class of the whole checkpoint has the checkpoint's own names.
        names = {f"^{re.escape(there)}": here for here, there in export.renamed.items()} if not whole else {}
        names |= _newer_names(model, _config(model.config_class, copy.deepcopy(config)), archs.load(export.arch).older)
        # Weights in 4 bits are computed with in the runner's dtype, as in our export.
        packed = (
            transformers.utils.quantization_config.Mxfp4Config(dequantize=True)
            if "quantization_config" in config
            else None
        )
        loaded = model.from_pretrained(
            folder,
            config=_config(model.config_class, config),
            key_mapping=names or None,
            **({"quantization_config": packed} if packed else {}),
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


def _made(export: Export, made_by: str, attention: str | None) -> Any:
    """The model that a module of references makes of the weights in the export."""
    stored: dict[str, list[str]] = {}
    for tensor in export.checkpoint().tensors.values():
        stored.setdefault(tensor.file, []).append(tensor.name)
    tensors: dict[str, Tensor] = {}
    for file, names in stored.items():
        with safe_open(export.folder / file, "pt") as opened:
            tensors |= {n: opened.get_tensor(n) for n in names}
    try:
        return references.make(made_by, export.text_config, tensors, torch_dtype(export.dtype), attention)
    except references.Unread as error:
        raise Refused(str(error)) from error

"""transformers, the reference that nobody here wrote, on an exported model's weights."""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llmexport.export.exported import Export
from llmexport.export.spec import Use
from llmexport.validate.carrying import Carrying
from llmexport.validate.feeds import Feed, beside, earlier
from llmexport.validate.loading import Refused, load, unable
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


class Transformers:
    """The model as transformers runs it, from the weights in the export: the reference that nobody here wrote.

    It carries its own cache from stage to stage, and begins a crossing with the random keys and values that our
    runners read. A multimodal model is given pictures as its processor gives them, and counts their positions itself.
    `fast`: it computes attention as it chooses to. Raises Refused where it cannot say what is right.
    """

    def __init__(self, export: Export, *, fast: bool = False, last: bool = False) -> None:
        if refusal := unable():
            raise Refused(refusal)
        if unknown := [p.name for p in beside(export)]:
            raise Refused(f"nobody knows what transformers calls {', '.join(unknown)}")
        self.seconds = 0.0
        self._export = export
        self._model = load(export, None if fast else export.reference.attention)
        carried = {n for g in export.graphs for n in g.carried}
        ports = [p for g in export.graphs for p in g.assembly.inputs if p.name not in carried]
        # A model without RoPE reads no positions.
        self._source = {SOURCE_KEYWORDS[p.use]: p for p in ports if of_source(p) and p.use in SOURCE_KEYWORDS}
        words = STEP_KEYWORDS if self._source else KEYWORDS
        self._given = {words[p.use]: p for p in ports if not of_source(p) and p.use in words}
        self._encoded: Any = None
        self._cached = bool(carried)
        self._last = last or export.gives_last_logits
        # A model with an encoder gives the logits of all tokens.
        self._kept = {"logits_to_keep": 1} if self._last and not self._source else {}
        self._cache: Cache | None = None
        self._sight = sight(export.blocks)
        self._features = next((p.name for g in export.graphs for p in g.assembly.outputs if p.use == "features"), "")

    def run(self, stage: Stage) -> Feed:
        """The outputs that the export's reference names, and the features of pictures; nothing of a crossing where no
        cache can be given to it."""
        made: Feed = {}
        if stage.begins and stage.past and isinstance(self._model, Carrying):
            return made
        if self._sight and stage.pictures:
            made[self._features] = self._seen(stage.pictures)
        if self._given:
            made |= self._read(stage)
        return made

    def _read(self, stage: Stage) -> Feed:
        given = {keyword: to_torch(stage.at(port)) for keyword, port in self._given.items()}
        if self._sight and stage.pictures:
            given |= _as_processed(self._sight, stage.ids, stage.pictures, self._model.dtype)
            if self._sight.sections:
                del given[KEYWORDS["positions"]]
        start = time.perf_counter()
        if self._source:
            given |= self._of_source(stage)
        if stage.begins:
            _forget_lengths(self._model)
            self._cache = self._filled(stage) if stage.past else None
        run = self._model
        if self._cached:
            run = functools.partial(run, past_key_values=self._cache, use_cache=True)
        with torch.inference_mode():
            made = run(**given, **self._kept)
        self.seconds = time.perf_counter() - start
        self._cache = made.past_key_values if self._cached else None
        own = slice(-1 if self._last and self._source else None, None)
        return {port: to_numpy(getattr(made, name)[:, own]) for port, name in self._export.reference.outputs.items()}

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
            return to_numpy(torch.cat([*made.pooler_output]))

    def _filled(self, stage: Stage) -> Cache:
        """A cache as after the tokens whose keys and values a crossing begins with."""
        import transformers

        # The config of a model with an encoder speaks of the encoder's layers.
        cache: Any = transformers.DynamicCache(**({} if self._source else {"config": self._model.config}))
        for graph in self._export.graphs:
            values = earlier(graph, self._export.dtype, stage.sizes)
            layers = [s for s in graph.assembly.steps if s.block.states]
            for i, step in enumerate(layers):
                # All other states are zero, as where the cache begins.
                held = [values[n] for s in step.block.states if (n := step.reads[s.past.name]) in values]
                if held:
                    cache.update(*map(to_torch, held), i)
        return transformers.EncoderDecoderCache(cache, transformers.DynamicCache()) if self._source else cache


def _forget_lengths(model: Any) -> None:
    """The angles of dynamic RoPE are those of the longest text that a model of transformers has read so far."""
    for module in model.modules() if isinstance(model, torch.nn.Module) else ():
        for name in [n for n in vars(module) if n.endswith("max_seq_len_cached")]:
            setattr(module, name, 0)


def _as_processed(seen: Sight, ids: np.ndarray, pictures: Pictures, dtype: torch.dtype) -> dict[str, Tensor]:
    """Pictures as the processors of transformers give them: frames of videos apart from images."""
    pixels = to_torch(pictures.pixels).to(dtype)
    if pictures.grids is None:
        types = {KEYWORDS["token_types"]: to_torch(np.isin(ids, seen.tokens).astype(np.int64))} if seen.mutual else {}
        return {"pixel_values": pixels, **types}
    grids, kinds = to_torch(pictures.grids), torch.tensor(stands_for(seen, ids, pictures))
    patches = kinds.repeat_interleave(grids.prod(1))
    given = {"mm_token_type_ids": torch.zeros(ids.shape, dtype=torch.int64)}
    for i, (token, pixel_name, grid_name) in enumerate(zip(seen.tokens, PIXELS, GRIDS, strict=True)):
        given["mm_token_type_ids"] += (i + 1) * to_torch(ids == token)
        if (kinds == token).any():
            given |= {pixel_name: pixels[patches == token], grid_name: grids[kinds == token]}
    return given

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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmexport.export.checkpoint import INDEX
from llmexport.export.exported import Export
from llmexport.export.spec import Use
from llmexport.export.trace import torch_dtype
from llmexport.export.values import one_line
from llmexport.validate.feeds import Feed, beside, earlier
from llmexport.validate.runners import to_numpy, to_torch
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
    runners read. Raises Refused where it cannot say what is right.
    """

    def __init__(self, export: Export, *, attention: str | None = "eager", last: bool = False) -> None:
        if refusal := unable():
            raise Refused(refusal)
        if unknown := [p.name for p in beside(export)]:
            raise Refused(f"nobody knows what transformers calls {', '.join(unknown)}")
        self.seconds = 0.0
        self._export = export
        self._model = _load(export, attention)
        carried = {n for g in export.graphs for n in g.carried}
        ports = [p for g in export.graphs for p in g.assembly.inputs if p.name not in carried]
        # A model without RoPE reads no positions.
        self._given = {KEYWORDS[p.use]: p for p in ports if p.use in KEYWORDS}
        self._cached = bool(carried)
        self._kept = {"logits_to_keep": 1} if last or export.gives_last_logits else {}
        self._cache: Cache | None = None

    def run(self, stage: Stage) -> Feed:
        """The outputs that the export's reference names."""
        given = {keyword: to_torch(stage.at(port)) for keyword, port in self._given.items()}
        if stage.begins:
            self._cache = self._filled(stage) if stage.past else None
        run = self._model
        if self._cached:
            run = functools.partial(run, past_key_values=self._cache, use_cache=True)
        start = time.perf_counter()
        with torch.inference_mode():
            made = run(**given, **self._kept)
        self.seconds = time.perf_counter() - start
        self._cache = made.past_key_values if self._cached else None
        return {port: to_numpy(getattr(made, name)) for port, name in self._export.reference.outputs.items()}

    def _filled(self, stage: Stage) -> Cache:
        """A cache as after the tokens whose keys and values a crossing begins with."""
        import transformers

        cache = transformers.DynamicCache(config=self._model.config)
        for graph in self._export.graphs:
            values = earlier(graph, self._export.dtype, stage.sizes)
            layers = [s for s in graph.assembly.steps if s.block.states]
            for i, step in enumerate(layers):
                # All other states are zero, as where the cache begins.
                held = [values[n] for s in step.block.states if (n := step.reads[s.past.name]) in values]
                if held:
                    cache.update(*map(to_torch, held), i)
        return cache


def _load(export: Export, attention: str | None) -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    # It lists the vision tensors that the text model leaves.
    transformers.utils.logging.set_verbosity_error()
    model = getattr(transformers, export.reference.model_class, None)
    if model is None:
        have = f"transformers {transformers.__version__}"
        raise Refused(f"{have} has no {export.reference.model_class}: pip install -U transformers")
    weights = export.checkpoint()
    with tempfile.TemporaryDirectory(prefix="llmexport-") as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(export.config))
        index = {t.name: t.file for t in weights.tensors.values()}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
        for shard in weights.shards:
            (folder / shard.file).symlink_to((export.folder / shard.file).resolve())
        # transformers writes into the dictionaries that it is given.
        config = copy.deepcopy(dict(export.text_config))
        names = {f"^{re.escape(there)}": here for here, there in export.renamed.items()}
        # Weights in 4 bits are computed with in the runner's dtype, as in our export.
        packed = (
            transformers.utils.quantization_config.Mxfp4Config(dequantize=True)
            if "quantization_config" in config
            else None
        )
        return model.from_pretrained(
            folder,
            config=_config(model.config_class, config),
            key_mapping=names or None,
            **({"quantization_config": packed} if packed else {}),
            dtype=torch_dtype(export.dtype),
            attn_implementation=attention,
        ).eval()

"""transformers, the reference that nobody here wrote, on an exported model's weights."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import json
import re
import tempfile
import time
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from llmexport.export.checkpoint import INDEX
from llmexport.export.exported import Export
from llmexport.export.trace import torch_dtype
from llmexport.validate.runners import Feed, metadata, to_numpy, to_torch

if TYPE_CHECKING:
    from transformers import Cache

TOKENS = ("input_ids", "position_ids", "attention_mask")
CACHED_KEY = re.compile(r"past_key_values\.(\d+)\.key")
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
        raise Refused(f"transformers does not take this config: {' '.join(str(error).split())}") from error


class TransformersRunner(BaseRunner):  # type: ignore[misc]
    """The model as transformers runs it, from the weights in the export: the reference that nobody here wrote.

    It carries its own cache from step to step, begins a new one when the feed's past is empty, or from the keys and
    values that the feed holds; and gives logits only.
    """

    def __init__(self, manifest: Export) -> None:
        super().__init__(name="transformers")
        self._manifest = manifest

    def get_input_metadata_impl(self) -> TensorMetadata:
        return metadata(self._manifest, TOKENS)

    def activate_impl(self) -> None:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        # It lists the vision tensors that the text model leaves.
        transformers.utils.logging.set_verbosity_error()
        weights = self._manifest.checkpoint()
        with tempfile.TemporaryDirectory(prefix="llmexport-") as name:
            folder = Path(name)
            (folder / "config.json").write_text(json.dumps(self._manifest.config))
            index = {t.name: t.file for t in weights.tensors.values()}
            (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
            for shard in weights.shards:
                (folder / shard.file).symlink_to((self._manifest.folder / shard.file).resolve())
            reference = self._manifest.reference
            model = getattr(transformers, reference.model_class, None)
            if model is None:
                have = f"transformers {transformers.__version__}"
                raise Refused(f"{have} has no {reference.model_class}: pip install -U transformers")
            # transformers writes into the dictionaries that it is given.
            config = copy.deepcopy(dict(self._manifest.text_config))
            names = {f"^{re.escape(there)}": here for here, there in self._manifest.renamed.items()}
            # Weights in 4 bits are computed with in the runner's dtype, as in our export.
            packed = (
                transformers.utils.quantization_config.Mxfp4Config(dequantize=True)
                if "quantization_config" in config
                else None
            )
            self._model = model.from_pretrained(
                folder,
                config=_config(model.config_class, config),
                key_mapping=names or None,
                **({"quantization_config": packed} if packed else {}),
                dtype=torch_dtype(self._manifest.dtype),
                attn_implementation="eager",
            ).eval()

    def deactivate_impl(self) -> None:
        del self._model

    def infer_impl(self, feed_dict: Feed) -> OrderedDict[str, np.ndarray]:
        # A model without RoPE has no position_ids.
        given = {n: to_torch(feed_dict[n]) for n in TOKENS if n in feed_dict}
        if given["input_ids"].shape[1] == given["attention_mask"].shape[1]:
            self._cache = None
        elif any(n not in TOKENS for n in feed_dict):
            self._cache = self._filled(feed_dict)
        start = time.perf_counter()
        with torch.inference_mode():
            made = self._model(**given, past_key_values=self._cache, use_cache=True)
        self._cache = made.past_key_values
        self.inference_time = time.perf_counter() - start
        return OrderedDict(logits=to_numpy(made.logits))

    def _filled(self, feed: Feed) -> Cache:
        """A cache as after the tokens whose keys and values the feed holds."""
        import transformers

        cache = transformers.DynamicCache(config=self._model.config)
        for i in sorted(int(m[1]) for n in feed if (m := CACHED_KEY.fullmatch(n))):
            key, value = (to_torch(feed[f"past_key_values.{i}.{part}"]) for part in ("key", "value"))
            cache.update(key, value, i)
        return cache

"""A decoder as PyTorch runs it, operator by operator: what an export is timed beside."""

from __future__ import annotations

import numpy as np

from llmexport.export.exported import Export
from llmexport.run.session import ArraySession
from llmexport.validate.loading import Refused
from llmexport.validate.reference import Transformers
from llmexport.validate.runners import TorchRunner
from llmexport.validate.stages import Stage


class TransformersSession:
    """The model of transformers, with the attention that it takes by itself, and the last row of scores alone."""

    name = "transformers"

    def __init__(self, export: Export) -> None:
        self._model = Transformers(export, fast=True, last=True)
        self._logits = next(p.name for g in export.graphs for p in g.assembly.outputs if p.use == "logits")

    def run(self, stage: Stage) -> np.ndarray:
        return self._model.run(stage)[self._logits][:, -1].astype(np.float32)


class TorchSession(ArraySession):
    """Our PyTorch."""

    name = "ours"

    def __init__(self, export: Export) -> None:
        super().__init__(export)
        self.runners = {g.name: TorchRunner(export, g) for g in export.graphs}
        for runner in self.runners.values():
            runner.activate()


def eager(export: Export) -> TransformersSession | TorchSession:
    """transformers if it takes the model, else our PyTorch."""
    try:
        return TransformersSession(export)
    except Refused:
        return TorchSession(export)

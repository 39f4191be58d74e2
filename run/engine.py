"""The engines of an export as a session."""

from __future__ import annotations

import contextlib

import numpy as np

from llmexport.export import engine_record
from llmexport.export.errors import EngineError
from llmexport.export.exported import Export
from llmexport.run.session import ArraySession
from llmexport.validate.engine_form import EngineRunner, outside, unable
from llmexport.validate.stages import Stage


class EngineSession(ArraySession):
    """The engines of an export on the GPU here, in processes of their own.

    It is a context, and its processes end with it. Raises EngineError if they cannot run here.
    """

    def __init__(self, export: Export) -> None:
        super().__init__(export)
        if reason := unable(export):
            raise EngineError(reason)
        self.runners = {g.name: EngineRunner(export, g) for g in export.graphs}

    def __enter__(self) -> EngineSession:
        with contextlib.ExitStack() as stack:
            for runner in self.runners.values():
                stack.enter_context(runner)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stack.close()

    @property
    def what(self) -> str:
        record = engine_record.read(self._export.folder)
        return f"{record.backend} {record.version}"

    def run(self, stage: Stage) -> np.ndarray:
        if reason := outside(self._export, stage.sizes):
            raise EngineError(f"{reason}: build it with a larger --profile, or ask for less")
        return super().run(stage)

"""The engines of an export as a session."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping

from llmexport.export import engine_record
from llmexport.export.errors import EngineError
from llmexport.export.exported import Export
from llmexport.export.spec import FEATURES, IMAGES, SEQUENCE, SPLICED, TILES
from llmexport.run.session import MOST_FRAMES, MOST_PATCHES, ArraySession
from llmexport.validate.engine_form import EngineRunner, outside, unable
from llmexport.validate.pictures import sight
from llmexport.validate.stages import Stage


class EngineSession(ArraySession):
    """The engines of an export on the GPU here, in processes of their own.

    It is a context, and its processes end with it. Raises EngineError if they cannot run here.
    """

    def __init__(self, export: Export) -> None:
        super().__init__(export)
        if reason := unable(export):
            raise EngineError(reason)
        self._seeing = sight(export.blocks)
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

    @property
    def at_once(self) -> tuple[int, int]:
        profile, seen = engine_record.read(self._export.folder).profile, self._seeing
        frames = min((profile[n][2] for n in (IMAGES, TILES) if n in profile), default=MOST_FRAMES)
        takes = profile[FEATURES][2] * seen.merge**2 if seen and seen.merge and FEATURES in profile else MOST_PATCHES
        return min(takes, MOST_PATCHES), frames

    @functools.cached_property
    def tokens_at_once(self) -> int | None:
        profile = engine_record.read(self._export.folder).profile
        return profile[SEQUENCE][2] if SEQUENCE in profile else None

    def check(self, stage: Stage) -> None:
        for sizes in self._sizes(stage):
            if reason := outside(self._export, sizes):
                raise EngineError(f"{reason}: build it with a larger --profile, or ask for less")

    def _sizes(self, stage: Stage) -> Iterator[Mapping[str, int]]:
        """The sizes of a stage, with those of each call that sees some of its pictures."""
        seen, pictures = self._seeing, stage.pictures
        if seen is None or pictures is None:
            yield stage.sizes | (seen.sizes(None) if seen else {})
            return
        for piece in pictures.pieces(*self.at_once):
            yield stage.sizes | seen.sizes(piece) | {SPLICED: sum(seen.runs(pictures))}

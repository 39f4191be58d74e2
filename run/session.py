"""An export that goes on from token to token: what it carries stays in the runtime's own memory."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from llmexport.export import interrupt
from llmexport.export.exported import Export, ExportedGraph
from llmexport.export.graph_file import load
from llmexport.export.last_logits import last_logits
from llmexport.run.checks import check_decoder
from llmexport.run.errors import RunError
from llmexport.run.prompts import best_at_once, in_pieces, opening
from llmexport.validate.feeds import sees, states, without_pictures
from llmexport.validate.pictures import Pictures, sight
from llmexport.validate.runtime import OrtValue, SessionOptions, open_session, version
from llmexport.validate.stages import Stage, runs_at

# Of pictures at once: each patch scores all others, and an engine takes so many frames or tiles by default.
MOST_PATCHES, MOST_FRAMES = 1024, 16
BACKENDS = ("onnxruntime", "engine")
V = TypeVar("V")


class Choose(Protocol):
    """Picks the next token of each row [B], from its scores [B, V] and the tokens before [B, T]."""

    def __call__(self, scores: np.ndarray, ids: np.ndarray) -> np.ndarray: ...


class Session(Generic[V]):
    """A decoder that is run stage by stage, and carries what a stage leaves to the next; V is what it holds values in.

    Raises RunError if the export is none.
    """

    def __init__(self, export: Export) -> None:
        check_decoder(export)
        self._export = export
        self._carried: dict[str, dict[str, V]] = {}  # by graph, what the next stage reads
        self._held: dict[str, V] = {}  # what later graphs read

    @property
    def what(self) -> str:
        """What runs it, and its version."""
        raise NotImplementedError

    @functools.cached_property
    def tokens_at_once(self) -> int | None:
        """How many tokens of a row it is given in one call; None: all."""
        return None

    @property
    def at_once(self) -> tuple[int, int]:
        """How many patches, and how many frames or tiles, are seen in one call, unless a frame has more.

        Tiles take no more memory, which grows with the square of their patches, than so many patches of a picture.
        """
        seen = sight(self._export.blocks)
        tiles = MOST_PATCHES**2 // seen.places**2 if seen and seen.places else MOST_FRAMES
        return MOST_PATCHES, max(min(tiles, MOST_FRAMES), 1)

    def put(self, array: np.ndarray) -> V:
        raise NotImplementedError

    def get(self, value: V) -> np.ndarray:
        raise NotImplementedError

    def infer(self, graph: ExportedGraph, feed: Mapping[str, V]) -> Mapping[str, V]:
        """The outputs of a graph, by the names of its ports."""
        raise NotImplementedError

    def check(self, stage: Stage) -> None:
        """Raises a UserError on a stage that it does not take."""

    def run(self, stage: Stage) -> np.ndarray:
        """The scores of what follows the last token of each row [B, V], in fp32. A long stage is run in pieces."""
        pieces = in_pieces(self._export, stage, self.tokens_at_once) if self.tokens_at_once else [stage]
        for piece in pieces:
            self.check(piece)
        for piece in pieces:
            interrupt.check()
            last = self._run(piece)
        return last

    def _run(self, stage: Stage) -> np.ndarray:
        export, last = self._export, np.empty(0)
        if stage.begins:
            self._held = {}
            for graph in export.graphs:
                fresh = states(graph, export.dtype, stage.sizes)
                self._carried[graph.name] = {n: self.put(a) for n, a in fresh.items()}
        self._held |= {n: self.put(a) for n, a in without_pictures(export).items()}
        for graph in export.graphs:
            inputs, known = graph.assembly.inputs, self._held | self._carried[graph.name]
            if not runs_at(stage, graph):
                continue
            if stage.pictures is not None and sees(graph):
                self._held |= self._seen(graph, stage, stage.pictures)
                continue
            feed = {p.name: known[p.name] if p.name in known else self.put(stage.at(p)) for p in inputs}
            made = dict(self.infer(graph, feed))
            self._carried[graph.name] = {before: made.pop(after) for before, after in graph.carried.items()}
            for port in graph.assembly.outputs:
                if port.use == "logits":
                    last = self.get(made.pop(port.name))[:, -1]
            self._held |= made
        return last.astype(np.float32)

    def _seen(self, graph: ExportedGraph, stage: Stage, pictures: Pictures) -> dict[str, V]:
        """What a graph makes of all pictures, some at a time."""
        made: dict[str, list[np.ndarray]] = {p.name: [] for p in graph.assembly.outputs}
        for piece in pictures.pieces(*self.at_once):
            interrupt.check()
            some = dataclasses.replace(stage, pictures=piece)
            feed = {p.name: self.put(some.at(p)) for p in graph.assembly.inputs}
            for name, value in self.infer(graph, feed).items():
                made[name].append(self.get(value))
        return {name: self.put(np.concatenate(parts)) for name, parts in made.items()}


class RuntimeSession(Session[OrtValue]):
    """ONNX Runtime on the CPU, whose own memory the states stay in. Raises Mismatch if it does not take the model.

    threads: of one operator; 0: as many as ONNX Runtime thinks right. fused: as of open_session.
    """

    def __init__(self, export: Export, threads: int = 0, *, fused: bool = True) -> None:
        super().__init__(export)
        if export.dtype == "bfloat16":
            raise RunError("ONNX Runtime has no bfloat16 MatMul on a CPU: export with --dtype float32 or float16 too")
        models = {g.name: last_logits(load(export, g), g, export.dtype) for g in export.graphs}
        self._sessions = {n: open_session(m, export.folder, _options(threads), fused=fused) for n, m in models.items()}

    @property
    def what(self) -> str:
        return f"ONNX Runtime {version()}"

    @functools.cached_property
    def tokens_at_once(self) -> int:
        return best_at_once(self._export)

    def put(self, array: np.ndarray) -> OrtValue:
        return OrtValue.ortvalue_from_numpy(array, "cpu")

    def get(self, value: OrtValue) -> np.ndarray:
        return value.numpy()

    def infer(self, graph: ExportedGraph, feed: Mapping[str, OrtValue]) -> Mapping[str, OrtValue]:
        session, names = self._sessions[graph.name], [p.name for p in graph.assembly.outputs]
        if not any(p.use == "slots" for p in graph.assembly.outputs):
            return dict(zip(names, session.run_with_ort_values(names, feed), strict=True))
        binding, slots = session.io_binding(), dict[str, OrtValue]()
        before = {after: before for before, after in graph.carried.items()}
        for name, value in feed.items():
            binding.bind_ortvalue_input(name, value)
        for port in graph.assembly.outputs:
            if port.use == "slots":
                # A static cache is written in place.
                slots[port.name] = feed[before[port.name]]
                binding.bind_ortvalue_output(port.name, slots[port.name])
            else:
                binding.bind_output(port.name, "cpu")
        session.run_with_iobinding(binding)
        # Of the values that are made of arrays, ours alone keep these alive.
        return dict(zip(names, binding.get_outputs(), strict=True)) | slots


def _options(threads: int) -> SessionOptions:
    options = SessionOptions()
    options.intra_op_num_threads = threads
    # Every step has other shapes than the one before, and ONNX Runtime would keep a plan of its memory for each.
    options.enable_mem_pattern = False
    return options


class ArraySession(Session[np.ndarray]):
    """Holds what it carries as arrays, which Polygraphy's `runners` take and give, one of each graph."""

    runners: Mapping[str, Any]

    def put(self, array: np.ndarray) -> np.ndarray:
        return array

    def get(self, value: np.ndarray) -> np.ndarray:
        return value

    def infer(self, graph: ExportedGraph, feed: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        made: Mapping[str, np.ndarray] = self.runners[graph.name].infer(dict(feed), check_inputs=False)
        return made


@contextlib.contextmanager
def opened(export: Export, backend: str = "onnxruntime", threads: int = 0, **runtime: bool) -> Iterator[Session[Any]]:
    """A session of an export on one of BACKENDS; threads and `runtime`: of RuntimeSession."""
    if backend == "onnxruntime":
        yield RuntimeSession(export, threads, **runtime)
        return
    # Who runs no engine does not wait for Polygraphy.
    from llmexport.run.engine import EngineSession

    with EngineSession(export) as session:
        yield session


def decode(
    session: Session[Any],
    ids: np.ndarray,
    choose: Choose,
    again: int | None = None,
    *,
    begin: Callable[[np.ndarray], Stage] = opening,
    never: Collection[int] = (),
) -> Iterator[np.ndarray]:
    """The tokens [B] that follow a prompt [B, T], step by step, without end.

    again: the number of tokens after which all that is carried is computed anew, see `run_again_at`. begin: makes a
    stage of all tokens so far. never: the tokens that are not chosen, see `picture_tokens`.
    """
    stage = begin(ids)
    while True:
        interrupt.check()
        scores = session.run(stage)
        scores[:, [*never]] = -np.inf
        chosen = choose(scores, ids)
        yield chosen
        before = ids.shape[1]
        ids = np.concatenate((ids, chosen[:, None]), 1)
        stage = begin(ids) if before == again else stage.then("decode", "decode", chosen[:, None])


def greedy(scores: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The token of the highest score."""
    return scores.argmax(-1)

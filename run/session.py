"""An export that goes on from token to token: what it carries stays in the runtime's own memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import onnxruntime
from onnxruntime import OrtValue

from llmexport.export import interrupt
from llmexport.export.exported import Export
from llmexport.export.graph_file import load
from llmexport.export.last_logits import last_logits
from llmexport.export.spec import LongScaling, Rotary
from llmexport.run.errors import RunError
from llmexport.validate.feeds import along_step, beside, limits, states
from llmexport.validate.runtime import open_session
from llmexport.validate.stages import Stage


class Session(Protocol):
    """Whatever runs a decoder stage by stage and carries what a stage leaves to the next."""

    def run(self, stage: Stage) -> np.ndarray:
        """The scores of what follows the last token of each row [B, V], in fp32."""
        ...


class Choose(Protocol):
    """Picks the next token of each row [B], from its scores [B, V] and the tokens before [B, T]."""

    def __call__(self, scores: np.ndarray, ids: np.ndarray) -> np.ndarray: ...


class RuntimeSession:
    """ONNX Runtime on the CPU. Raises RunError, or Mismatch, if it cannot run the export."""

    def __init__(self, export: Export) -> None:
        check_decoder(export)
        if export.dtype == "bfloat16":
            raise RunError("ONNX Runtime has no bfloat16 MatMul on a CPU: export with --dtype float32 or float16 too")
        options = onnxruntime.SessionOptions()
        # Every step has other shapes than the one before, and ONNX Runtime would keep a plan of its memory for each.
        options.enable_mem_pattern = False
        self._export = export
        models = {g.name: last_logits(load(export, g), g, export.dtype) for g in export.graphs}
        self._sessions = {name: open_session(model, export.folder, options) for name, model in models.items()}
        self._carried: dict[str, dict[str, OrtValue]] = {}  # by graph, what the next stage reads
        self._held: dict[str, OrtValue] = {}  # what later graphs read

    def run(self, stage: Stage) -> np.ndarray:
        export, last = self._export, np.empty(0)
        if stage.begins:
            fresh = {g.name: states(g, export.dtype, stage.sizes) for g in export.graphs}
            self._held = {}
            self._carried = {name: {n: _value(a) for n, a in feed.items()} for name, feed in fresh.items()}
        for graph in export.graphs:
            inputs = graph.assembly.inputs
            if not (stage.begins or graph.carried or any(map(along_step, inputs))):
                continue
            session, known = self._sessions[graph.name], self._held | self._carried[graph.name]
            binding = session.io_binding()
            for port in inputs:
                value = known[port.name] if port.name in known else _value(stage.at(port))
                binding.bind_ortvalue_input(port.name, value)
            for port in graph.assembly.outputs:
                binding.bind_output(port.name, "cpu")
            session.run_with_iobinding(binding)
            made = dict(zip((p.name for p in graph.assembly.outputs), binding.get_outputs(), strict=True))
            self._carried[graph.name] = {before: made[after] for before, after in graph.carried.items()}
            self._held |= {n: v for n, v in made.items() if n not in graph.carried.values()}
            for port in graph.assembly.outputs:
                if port.use == "logits":
                    last = self._held.pop(port.name).numpy()[:, -1]
        return last.astype(np.float32)


def _value(array: np.ndarray) -> OrtValue:
    return OrtValue.ortvalue_from_numpy(array, "cpu")


def check_decoder(export: Export) -> None:
    """Raise RunError unless the export is a model that continues a text."""
    if export.block is not None:
        raise RunError(f"{export.folder} is one block, {export.block}, which gives no tokens: export the whole model")
    if not any(g.carried for g in export.graphs):
        raise RunError(f"{export.arch} is an encoder, which reads a text and continues none: give a decoder")
    if unknown := [p.name for p in beside(export)]:
        raise RunError(f"the export also reads {', '.join(unknown)}, which no prompt says: it cannot be run from text")


def row(ids: Sequence[int]) -> np.ndarray:
    """One prompt as a batch of one."""
    return np.array([ids], np.int64)


def opening(ids: np.ndarray) -> Stage:
    """The stage of a prompt [B, T] without padding."""
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    return Stage("prompt", "opening", ids, positions, np.ones_like(ids), np.zeros_like(ids))


def decode(session: Session, ids: np.ndarray, choose: Choose, again: int | None = None) -> Iterator[np.ndarray]:
    """The tokens [B] that follow a prompt [B, T], step by step, without end.

    again: the number of tokens after which all that is carried is computed anew, see `run_again_at`.
    """
    stage = opening(ids)
    while True:
        interrupt.check()
        chosen = choose(session.run(stage), ids)
        yield chosen
        before = ids.shape[1]
        ids = np.concatenate((ids, chosen[:, None]), 1)
        stage = opening(ids) if before == again else stage.then("decode", "decode", chosen[:, None])


def greedy(scores: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The token of the highest score."""
    return scores.argmax(-1)


def run_again_at(export: Export) -> int | None:
    """The number of tokens beyond which LongRoPE turns by other angles, also keys that are cached by then."""
    for block in export.blocks:
        if isinstance(block, Rotary) and isinstance(block.scaling, LongScaling):
            return block.scaling.original_positions
    return None


def check_prompt(export: Export, ids: Sequence[int]) -> None:
    """Raise RunError on a prompt that the model does not take."""
    if not ids:
        raise RunError("the prompt is empty, it has no token that the model could continue: give some text")
    words = limits(export.blocks)["tokens"]
    if outside := [i for i in ids if not 0 <= i < words]:
        raise RunError(
            f"the prompt has token {outside[0]}, the model knows 0 to {words - 1}: is the tokenizer the model's own?"
        )
    most = positions(export)
    if most and len(ids) > most:
        raise RunError(f"the prompt has {len(ids)} tokens, the model has positions for {most}: give a shorter one")


def positions(export: Export) -> int:
    """How many positions the model has, as its config says; 0 if that does not say."""
    said = export.text_config.get("max_position_embeddings")
    return said if isinstance(said, int) else 0

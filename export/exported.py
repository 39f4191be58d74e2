"""An export as a value: its graphs, its weights, and what they were made of."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmexport.export.checkpoint import Checkpoint, read_header
from llmexport.export.earlier import EXPORT
from llmexport.export.identity import SAYS, WAYS, Held, WeightFile
from llmexport.export.packed.matrix import Matrix
from llmexport.export.packed.read import matrices_of
from llmexport.export.spec import Block, Graph, Head, Reference, Step
from llmexport.export.stamp import check_stamp, read_errors
from llmexport.export.static import slots_of
from llmexport.export.stored_tensor import StoredTensor
from llmexport.graphs.fusion import Fused


@dataclass(frozen=True)
class ExportedGraph(Graph):
    """A graph, and what its file holds.

    step_weights: of each step, by the path in its block, the name of the tensor in the checkpoint, or of the tensors
    that it is made of. ops: how often each custom op occurs. fusions: by the name of the pass, what it did.
    sha256: of the file.
    """

    step_weights: Mapping[str, Mapping[str, str | tuple[str, ...]]]
    ops: Mapping[str, int]
    fusions: Mapping[str, Fused]
    sha256: str

    @property
    def file(self) -> str:
        return f"{self.name}.onnx"


@dataclass(frozen=True)
class Export:
    """An export, as its manifest says, and how its weight files were found (`held`, by name) when it was read.

    block: the name of the one block that it is, None for a whole model. dtype: what "T" stands for in its ports.
    config: the checkpoint's; `text_config` is the part of it that the model was built from. renamed: how the checkpoint
    renames the model's tensors, start of the name in the model's own class -> start there. reference: what of
    transformers it is compared with. versions: of the libraries that made it. companions: digests of the files beside
    the weights. inode: of the folder when it was made, by which a copy is known. digested: digests of every byte were
    recorded just now.
    """

    folder: Path
    arch: str
    block: str | None
    dtype: str
    target: str
    opset: int
    graphs: tuple[ExportedGraph, ...]
    weights: tuple[WeightFile, ...]
    config: Mapping[str, Any]
    text_config: Mapping[str, Any]
    renamed: Mapping[str, str]
    reference: Reference
    versions: Mapping[str, str | None]
    notes: tuple[str, ...]
    companions: Mapping[str, str]
    inode: int
    held: Mapping[str, Held] = field(default_factory=dict)
    digested: bool = False

    @property
    def files(self) -> list[str]:
        """All that it wrote into its folder."""
        graphs, weights = (g.file for g in self.graphs), (w.file for w in self.weights)
        return sorted({EXPORT, *graphs, *weights, *self.companions})

    @property
    def placed(self) -> str:
        """How the weight files came there, as "link", or "reflink+copy"."""
        return "+".join(sorted({w.placed for w in self.weights}, key=WAYS.index))

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps of all graphs."""
        return tuple(s for g in self.graphs for s in g.assembly.steps)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The distinct ones of all graphs, in order of first use."""
        return tuple(dict.fromkeys(s.block for s in self.steps))

    @property
    def max_tokens(self) -> int | None:
        """The slots of its static cache; None where the cache is dynamic, or there is none."""
        return slots_of(self.blocks)

    @property
    def window_slots(self) -> str:
        """Which slots of a static cache a layer with a window keeps, the last or all; "last" where the cache grows."""
        slide = any(p.use == "window" for b in self.blocks for p in b.inputs)
        return "last" if slide or not self.max_tokens else "all"

    @property
    def gives_last_logits(self) -> bool:
        """Whether its logits are those of the last token of each row alone."""
        return any(isinstance(b, Head) and b.last for b in self.blocks)

    def place(self, graph: str, step: str) -> str:
        """What people call a step: with its graph where there are several."""
        return step if len(self.graphs) == 1 else f"{graph}: {step}"

    def plain_matrices(self, checkpoint: Checkpoint) -> list[Matrix]:
        """Those in few bits that nodes make numbers of; an op reads the others as they are."""
        packed: set[str] = set()
        for graph in self.graphs:
            for step in graph.assembly.steps:
                given = graph.step_weights[step.name]
                roles = [path for path, s in step.block.stored.items() if s.role]
                packed.update(n for path in roles for n in given[path])
        return [m for n, m in checkpoint.matrices.items() if n not in packed]

    def checkpoint(self) -> Checkpoint:
        """The weights that lie in the export's folder."""
        tensors: dict[str, StoredTensor] = {}
        shards = []
        for weights in self.weights:
            held, shard = read_header(self.folder / weights.file)
            tensors |= held
            shards.append(shard)
        matrices = matrices_of(self.config, self.folder, tensors)
        return Checkpoint(self.folder, self.config, tensors, tuple(shards), matrices)

    def in_float32(self) -> Export:
        """The same model in fp32, where what it computes can be told from how it rounds."""
        return dataclasses.replace(self, dtype="float32")

    @property
    def checked(self) -> str:
        """How much of the weights was read to tell that they are those that were exported, for people."""
        ways = Counter(held.how for held in self.held.values())
        rest = "read for the first time and their digests recorded" if self.digested else "not read"
        said = [
            f"{ways[how]} of {len(self.held)} files: {text.format(rest=rest)}"
            for how, text in SAYS.items()
            if ways[how]
        ]
        return "; ".join(said) or "no weights"

    def check_untouched(self) -> None:
        """Raise ExportError if a weight file was written or replaced since it was held against the manifest."""
        for name, held in self.held.items():
            path = self.folder / name
            with read_errors(path):
                check_stamp(path, held.stamp, path)

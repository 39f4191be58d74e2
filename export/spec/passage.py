"""Where the tokens of a text stand that goes on in a blank (GLM)."""

from __future__ import annotations

from dataclasses import dataclass

from llmexport.export.spec.axis import BATCH
from llmexport.export.spec.block import (
    ATTENTION_MASK,
    INPUT_IDS,
    PADDING_LENGTH,
    PAST_LENGTH,
    PLACES,
    POSITION_IDS,
    SHOWN,
    Block,
    Port,
    State,
    state,
)


@dataclass(frozen=True)
class Passage(Block):
    """Two places of each token, and which tokens all see (GLM, arXiv 2103.10360; modeling_chatglm.py of ChatGLM-6B).

    Before the token `begins` is the context: its tokens stand at their positions and at 0, and those of the step that
    brings `begins` see each other. From it on all stand at the position of the blank, and are counted from 1. The blank
    is the first token of the first of `blanks` that a row has. The state is the position of the first of each of these
    tokens plus 1, and 0 before it. `static`: of a static cache.
    """

    begins: int
    blanks: tuple[int, ...]
    static: bool = False

    @property
    def inputs(self) -> tuple[Port, ...]:
        where = (PADDING_LENGTH, PAST_LENGTH) if self.static else (ATTENTION_MASK,)
        return (*where, INPUT_IDS, POSITION_IDS, *(s.past for s in self.states))

    @property
    def outputs(self) -> tuple[Port, ...]:
        return (PLACES, SHOWN, *(s.present for s in self.states))

    @property
    def states(self) -> tuple[State, ...]:
        shape = (BATCH, 1 + len(self.blanks))
        return (state("blanks", shape, shape, "int64", "recurrence"),)

"""What a graph is fed at the first stage of a prompt."""

from __future__ import annotations

from llmexport.export.spec import Graph
from llmexport.validate.feeds import Feed, states
from llmexport.validate.stages import Stage


def first_feed(graph: Graph, prompt: Stage, dtype: str = "float32") -> Feed:
    """By input of the graph; no other graph makes any of them."""
    carried = states(graph, dtype, prompt.sizes)
    return {p.name: carried[p.name] if p.name in carried else prompt.at(p) for p in graph.assembly.inputs}

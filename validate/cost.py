"""What it takes to run a model, known before it is run."""

from __future__ import annotations

import math

from llmexport.export.exported import Export
from llmexport.validate import stages


def multiply_adds(export: Export) -> int:
    """Of a prompt with every weight, of which a mixture of experts takes fewer."""
    numbers = sum(math.prod(t.shape) for t in export.checkpoint().tensors.values())
    return numbers * stages.prompt(export).ids.size

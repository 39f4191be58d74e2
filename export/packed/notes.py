"""What an export of a quantised checkpoint is to be known by, as sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator

from llmexport.export.checkpoint import Checkpoint
from llmexport.export.packed.matrix import Matrix
from llmexport.export.packed.module import ASIDE
from llmexport.export.packed.read import cache_scales
from llmexport.export.packed.stacked import ASIDE as BESIDE_STACKS
from llmexport.export.values import visible
from llmexport.export.weights import Parameter

NAMED = 3
ACTIVATIONS = (*(e for e in ASIDE if e != ".weight_shape"), *BESIDE_STACKS)


def notes(wanted: Collection[Parameter], checkpoint: Checkpoint) -> Iterator[str]:
    """Sentences on the matrices in few bits among what is `wanted`; none of a checkpoint without."""
    matrices = {n: m for p in wanted for n in p.sources if (m := checkpoint.matrices.get(n))}
    if not matrices:
        return
    kinds = Counter(map(_kind, matrices.values()))
    yield f"quantised as published: {', '.join(f'{n} {kind}' for kind, n in kinds.most_common())}"
    if any(n.endswith(ACTIVATIONS) for m in matrices.values() for n in m.beside):
        yield "activations are not quantised: what the checkpoint says of their scales is left out"
    if scales := list(cache_scales(checkpoint.tensors)):
        yield f"the cache is not quantised, its scales are left out: {_some(scales)}"
    yield from widened(wanted, checkpoint)
    if any(m.number.startswith("float8") for m in matrices.values()):
        yield (
            "ONNX Runtime has no product of these types on a CPU and widens them at each call: set the session option "
            '"session.disable_quant_qdq" to "1", so that it does when it loads the model'
        )


def widened(wanted: Collection[Parameter], checkpoint: Checkpoint) -> Iterator[str]:
    """A sentence on experts in few bits whose op does not read them so, if there are any."""
    if parts := {n for p in wanted if not p.role for n in p.parts} & checkpoint.matrices.keys():
        yield (
            f"{len(parts)} matrices of experts are dequantised when the model is loaded, and take the memory of "
            "unquantised ones then"
        )


def _kind(matrix: Matrix) -> str:
    """What it is of, and what shares a scale."""
    rows, columns = matrix.scales.block
    what = f"{'stacks of experts' if matrix.experts else 'matrices'} of {matrix.number}"
    if matrix.scales.block == matrix.shape:
        return f"{what}, one scale each"
    if matrix.experts and matrix.grid == (matrix.experts, 1):
        return f"{what}, one scale an expert"
    if rows > 1:
        return f"{what}, blocks of {rows} x {columns}"
    return f"{what}, {'one scale a row' if columns == matrix.shape[1] else f'groups of {columns}'}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(visible, names[:NAMED])) + more

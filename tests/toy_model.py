"""A model of two matrices that carries a cache, in numpy: for what runs engines and packs, with no engine at hand."""

from __future__ import annotations

import ml_dtypes  # noqa: F401  teaches np.dtype "bfloat16"
import numpy as np

from llmexport.validate.pack import BITS, Arrays, bits, widened

RANDOM = np.random.default_rng(0)
TABLE = RANDOM.standard_normal((31, 2, 8)).astype(np.float32)
HEAD = RANDOM.standard_normal((16, 31)).astype(np.float32)


def run(feed: Arrays, dtype: str) -> Arrays:
    """The outputs of its graph; of bfloat16 the bits, as in the feed. Each token sees those before it."""
    ids, past = feed["input_ids"], widened(feed["past"], dtype).astype(np.float32)
    assert ids.dtype == np.int64
    assert feed["past"].dtype.name == BITS.get(dtype, dtype)
    present = np.concatenate((past, TABLE[ids].transpose(0, 2, 1, 3)), 2)
    seen = np.tanh(present.cumsum(2)[:, :, past.shape[2] :].transpose(0, 2, 1, 3).reshape(*ids.shape, 16))
    return {n: bits(a.astype(np.dtype(dtype))) for n, a in (("logits", seen @ HEAD), ("present", present))}

"""Random checkpoints: norms lie about the number that makes them neutral, wherever they stand."""

import re

import numpy as np
import pytest

from llmexport.export import archs, random_checkpoint
from llmexport.export.checkpoint import open_checkpoint


@pytest.mark.parametrize("arch", archs.names())
def test_every_norm_lies_about_what_leaves_its_input_as_it_is(arch, tmp_path):
    random_checkpoint.write(archs.load(arch), tmp_path / "ck", dtype="float32")
    checkpoint = open_checkpoint(tmp_path / "ck")
    # GPT calls them ln_1 and ln_f, RWKV ln1.
    norms = {n: checkpoint.read(n) for n in checkpoint.tensors if re.search(r"(norm|\bln_?\w*)\.weight$", n.lower())}
    # Gemma and Qwen3.5 store the weight minus one, but for the gated norm of the delta net.
    less_one = {n for n in norms if arch.startswith(("gemma", "qwen3_5")) and "linear_attn.norm" not in n}
    # Of deviation 0.2, and 16 numbers or more each.
    far = {n: float(np.mean(w)) for n, w in norms.items() if abs(np.mean(w) - (n not in less_one)) > 0.25}
    assert far == {}
    assert norms or arch == "olmo"

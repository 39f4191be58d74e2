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
    # GPT calls them ln_1 and ln_f, RWKV ln1; Grok's weight is a scale.
    named = re.compile(r"(norm|\bln_?\w*)\.(weight|scale)$")
    norms = {n: checkpoint.read(n) for n in checkpoint.tensors if named.search(n.lower())}
    # Gemma 1 to 3 and Qwen's delta nets store the weight minus one, but for the gated norm of the delta net.
    minus_one = ("gemma", "gemma2", "gemma3_text", "qwen3_5", "qwen3_5_moe", "qwen3_next")
    less_one = {n for n in norms if arch in minus_one and "linear_attn.norm" not in n}
    # Of deviation 0.2, and 16 numbers or more each.
    # Of Gemma 4 the norm of q is the scale of the logits, too.
    norms = {n: w for n, w in norms.items() if not (arch == "gemma4_text" and "q_norm" in n)}
    far = {n: float(np.mean(w)) for n, w in norms.items() if abs(np.mean(w) - (n not in less_one)) > 0.25}
    assert far == {}
    assert norms or arch == "olmo"

"""Shortcuts through torch's exporter: they change no byte of a trace, and no block does without them."""

import onnx
import onnxscript.optimizer
import pytest
import torch
from onnxscript.rewriter import RewriteRule

from llmexport.export import archs, shortcuts
from llmexport.export.multimodal import tiny_config
from llmexport.export.onnx_file import read_model
from llmexport.export.spec import Block
from llmexport.export.trace import trace_block

# Blocks of operators that the exporter translates only with our table, or that it promotes types in.
BLOCKS = {
    ("llama", "layer"): "text",
    ("gemma2", "span"): "text",
    ("rwkv", "layer"): "text",
    ("rwkv7", "layer"): "text",
    ("chatglm_6b", "passage"): "text",
    ("baichuan", "head"): "text",
    ("qwen3_5", "splice"): "all",
    ("gemma3_text", "splice"): "all",
}


def found(arch: str, kind: str, part: str) -> Block:
    named = archs.load(arch)
    graphs = read_model(named, tiny_config(named, part), part=part).graphs
    return next(b for g in graphs for b in g.assembly.blocks if b.kind == kind)


@pytest.mark.parametrize(("arch", "kind"), BLOCKS)
def test_a_block_is_traced_once_not_again_decomposed(arch: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    export, calls = torch.onnx.export, []
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: calls.append(kind) or export(*args, **kwargs))
    trace_block(found(arch, kind, BLOCKS[arch, kind]), "float32")
    assert calls == [kind]


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("arch", "kind"), [("llama", "layer"), ("gemma2", "span"), ("rwkv7", "layer")])
def test_what_spares_time_changes_no_byte(arch: str, kind: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block = found(arch, kind, "text")
    quick = trace_block(block, dtype).SerializeToString(deterministic=True)
    # Without decomposition, as that gives values other names.
    monkeypatch.setattr(shortcuts, "SHORTCUTS", (shortcuts._as_captured,))
    assert trace_block(block, dtype).SerializeToString(deterministic=True) == quick


REWRITTEN = """
<ir_version: 10, opset_import: ["" : 23]>
pairs (float[2, 3] x) => (float[6] y) {
    a = Transpose <perm = [1, 0]> (x)
    b = Transpose <perm = [1, 0]> (a)
    c = Cast <to = 1> (b)
    shape = Constant <value_ints = [6]> ()
    d = Reshape (c, shape)
    e = Reshape (d, shape)
    y = Relu (e)
}
"""


def test_rewrites_are_the_same_though_few_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    match, tried, made = RewriteRule.match, [], []
    monkeypatch.setattr(RewriteRule, "match", lambda *args, **kwargs: tried.append(1) or match(*args, **kwargs))
    for ways in ((), (shortcuts._rules_of_the_operator,)):
        with shortcuts._taken(ways):
            made.append(onnxscript.optimizer.optimize(onnx.parser.parse_model(REWRITTEN)))
        made.append(len(tried))
        tried.clear()
    usual, tries, quick, fewer = made
    assert [n.op_type for n in usual.graph.node] == ["Reshape", "Relu"]
    assert quick.SerializeToString(deterministic=True) == usual.SerializeToString(deterministic=True)
    assert 0 < fewer < tries / 4


def test_a_torch_without_the_private_places_traces_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> list[shortcuts.Patch]:
        import torch.onnx._internal.exporter.no_such_place  # noqa: F401

        return []

    block = found("baichuan", "head", "text")
    usual = [n.op_type for n in trace_block(block, "float32").graph.node]
    lacking = lambda: [(torch, "no_such_place", None)]  # noqa: E731
    monkeypatch.setattr(shortcuts, "SHORTCUTS", (absent, lacking))
    assert [n.op_type for n in trace_block(block, "float32").graph.node] == usual

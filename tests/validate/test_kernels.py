"""Our kernels inside the whole model, on the CPU emulator: a right one passes, a wrong one is found and named."""

from __future__ import annotations

import ctypes
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from arch_cases import EVERY_TIME, FIRST, PRIMARY, SLOTS, Case, in_each_dtype, others_slow
from native import emulated_library, gpu_library
from published_configs import PUBLISHED

from llmexport.export import archs, manifest, onnx_file, random_checkpoint
from llmexport.export.checkpoint import open_checkpoint
from llmexport.plugins import emulated, host
from llmexport.plugins.causal_conv1d import causal_conv1d
from llmexport.plugins.errors import CacheError
from llmexport.plugins.rope import rope
from llmexport.plugins.spec import Attribute, all_ops
from llmexport.validate import kernels, ladder
from llmexport.validate.report import Rung

OWN_OPS = ("kimi_linear", "rwkv", "rwkv7")  # late families, each with an op that no other has
EVERY = in_each_dtype([c for c in FIRST if c.arch in (*EVERY_TIME - {"bert"}, *OWN_OPS)])
# The families that the project exists for, each in one dtype.
AT_ONCE = dict(zip(PRIMARY, ("bfloat16", "float32", "float16", "bfloat16", "float16"), strict=True))
TOKENS = 19  # of a prompt: past the windows of tiny models, and short where each costs much


@pytest.fixture(autouse=True)
def emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library that was built is the one that all tests share."""
    monkeypatch.setattr(emulated, "find", emulated_library)
    monkeypatch.setattr(kernels, "on_gpu", lambda: None)


def climb(folder: Path, tokens: int | None = TOKENS) -> Rung:
    [rung] = ladder.climb(manifest.read(folder), rungs=["kernels"], tokens=tokens).rungs
    return rung


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each op was computed by a kernel."""
    counted: Counter[str] = Counter()

    class Counted(kernels.Kernels):
        def __init__(self, *arguments: object, **options: bool) -> None:
            super().__init__(*arguments, **options)
            self.calls = counted

    monkeypatch.setattr(kernels, "Kernels", Counted)
    return counted


@pytest.mark.parametrize(
    ("case", "dtype"), others_slow(EVERY, [(c, d) for c, d in EVERY if AT_ONCE.get(str(c)) == d]), ids=str
)
def test_the_model_computed_by_kernels_has_its_numbers(
    case: Case, dtype: str, exported: Callable[..., Path], calls: Counter[str]
) -> None:
    """In prefill and decode; every op of the exported graph was a kernel, those that passes make too."""
    rung = climb(exported(case, dtype))
    assert (rung.status, rung.note) == ("pass", "on the CPU emulator")
    assert calls.keys() == {n for g in manifest.read(exported(case, dtype)).graphs for n in g.ops}


# Norms of q and k before RoPE, after it, and none; of one kind of attention and of two.
TURNED = ("qwen3_5_moe", "llama4", "gpt_oss")


@pytest.mark.parametrize(
    "name", [TURNED[0], *(pytest.param(a, marks=pytest.mark.slow) for a in (*TURNED[1:], "gemma", "glm4"))]
)
def test_with_a_static_cache_too(name: str, exported: Callable[..., Path], calls: Counter[str]) -> None:
    folder = exported(name, AT_ONCE[name], slots=SLOTS)
    assert climb(folder).status == "pass"
    ops = manifest.read(folder).graphs[0].ops
    assert calls.keys() == ops.keys()
    assert ops["QkNormRope"] > 0


@pytest.mark.parametrize("name", ["gemma", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_with_a_cache_that_the_op_writes_too(name: str, exported: Callable[..., Path], calls: Counter[str]) -> None:
    folder = exported(name, AT_ONCE[name], slots=160, cache="static-fused")
    assert climb(folder).status == "pass"
    ops = manifest.read(folder).graphs[0].ops
    assert calls.keys() == ops.keys()
    assert ops["QkNormRopeWrite"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", PRIMARY)
def test_a_prompt_past_every_window_has_them_too(name: str, exported: Callable[..., Path]) -> None:
    assert climb(exported(name, AT_ONCE[name]), tokens=None).status == "pass"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", PRIMARY)
def test_a_gpu_has_them_too(
    name: str, dtype: str, exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = kernels.Machine(gpu_library(), "cuda")
    monkeypatch.setattr(kernels, "on_gpu", lambda: gpu)
    rung = climb(exported(name, dtype))
    assert (rung.status, rung.note.startswith("on the CPU")) == ("pass", False)


# Two layers of each kind at published width; of many experts some, of many words few.
WIDE: dict[str, dict[str, Any]] = {
    "gpt_oss": PUBLISHED["gpt-oss-20b"]
    | {"num_hidden_layers": 2, "vocab_size": 512, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen3_5_moe": PUBLISHED["Qwen3.5-35B-A3B"]["text_config"]
    | {"num_hidden_layers": 2, "vocab_size": 512, "num_experts": 32}
    | {"layer_types": ["linear_attention", "full_attention"]},
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("arch", WIDE)
def test_a_gpu_has_them_at_published_width(
    arch: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = kernels.Machine(gpu_library(), "cuda")
    monkeypatch.setattr(kernels, "on_gpu", lambda: gpu)
    assert climb(wide(arch, dtype, tmp_path), tokens=None).status == "pass"


def wide(arch: str, dtype: str, folder: Path) -> Path:
    named = archs.load(arch)
    random_checkpoint.write(named, folder / "checkpoint", config=WIDE[arch], dtype="bfloat16")
    checkpoint = open_checkpoint(folder / "checkpoint")
    onnx_file.write(onnx_file.Request(named, checkpoint, dtype), folder / "export", force=False)
    return folder / "export"


def test_a_block_alone_is_computed_by_kernels(exported: Callable[..., Path], calls: Counter[str]) -> None:
    assert climb(exported("gemma", block="attention")).status == "pass"
    assert calls.keys() == {"Rope"}


def test_an_op_that_no_kernel_computed_fails_the_rung(
    exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "fuse", lambda module, sums, made: None)
    rung = climb(exported("gemma"), tokens=2)
    assert (rung.status, rung.note) == ("fail", "model.onnx has AddRmsNorm 6 times, a kernel computed it 0 times")


def test_a_model_without_ops_of_ours_is_not_run(exported: Callable[..., Path]) -> None:
    rung = climb(exported("bert"))
    assert (rung.status, rung.note) == ("not run", "no op of ours is in this model")


def zeros(monkeypatch: pytest.MonkeyPatch, op: str, tokens: Callable[[int], bool] = lambda count: True) -> None:
    """The plugin of an op fills its first output with zeros, where the node has such a number of tokens."""
    right, dims = host.Plugin.enqueue, next(iter(all_ops()[op].outputs.values()))

    def wrong(
        self: host.Plugin, io: Sequence[host.Desc], inputs: Sequence[int], outputs: Sequence[int], *others: int
    ) -> None:
        right(self, io, inputs, outputs, *others)
        made = io[len(inputs)]
        if self.op == op and tokens(made.shape[dims.index("T")]):
            size = 4 if host.dtype_name(made.type) == "float32" else 2
            ctypes.memset(outputs[0], 0, size * math.prod(made.shape))

    monkeypatch.setattr(host.Plugin, "enqueue", wrong)


# The first layer of each that has the op.
ZEROS = [("gemma", 0, "Rope"), ("gpt_oss", 0, "MoeExperts"), ("glm4", 0, "Rope"), ("llama4", 1, "MoeExperts")]
ZEROS += [("qwen3_5_moe", 0, op) for op in ("GatedDeltaRule", "CausalConv1d", "GatedRmsNorm")]
ZEROS += [("kimi_linear", 0, "KimiDeltaRule")]


@pytest.mark.parametrize(("name", "layer", "op"), others_slow(ZEROS, ZEROS[:2]))
def test_a_plugin_that_returns_zeros_is_named(
    name: str, layer: int, op: str, exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    zeros(monkeypatch, op)
    rung = climb(exported(name, AT_ONCE.get(name, "bfloat16")))
    assert (rung.status, rung.note.partition(" is ")[0]) == ("fail", f"prompt: layers.{layer}: y of {op}")


ZEROS = [("gemma", "Rope"), ("glm4", "Rope"), ("llama4", "Rope"), ("gpt_oss", "MoeExperts")]
ZEROS += [("qwen3_5_moe", "GatedDeltaRule"), ("kimi_linear", "KimiDeltaRule")]


@pytest.mark.parametrize(("name", "op"), others_slow(ZEROS, ZEROS[:1]))
def test_bisect_names_a_plugin_that_returns_zeros_and_finds_nothing_in_the_file(
    name: str, op: str, exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    zeros(monkeypatch, op)
    report = ladder.climb(manifest.read(exported(name)), rungs=["kernels"], tokens=TOKENS, bisect=True)
    found = report.bisect
    assert {r.key: r.status for r in report.rungs} == {"blocks": "pass", "kernels": "fail"}
    assert found.lines[0] == ("first block", "none: each gives in ONNX Runtime what PyTorch does on the same inputs")
    [(what, said)] = found.lines[1:]
    assert (what, said.partition(" is ")[0].partition(": ")[2].rpartition(": ")[2]) == ("fails", f"y of {op}")
    assert ": layers.0: " in said


def test_a_plugin_that_is_wrong_for_one_token_alone_is_named(
    exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    zeros(monkeypatch, "SinkAttention", lambda count: count == 1)
    rung = climb(exported("gpt_oss"))
    assert rung.status == "fail"
    assert "21 + 1 tokens: layers.0: y of SinkAttention is " in rung.note


WRONG: list[tuple[str, str, dict[str, Attribute]]] = [
    ("glm4", "Rope", {"interleaved": False}),
    ("gpt_oss", "SinkAttention", {"window": 5}),
    ("gpt_oss", "MoeExperts", {"limit": 0.1}),
    ("llama4", "MoeRoute", {"scoring": "softmax"}),
    ("kimi_linear", "KimiDeltaRule", {"l2_norm": False}),
]


@pytest.mark.parametrize(("name", "op", "changed"), others_slow(WRONG, WRONG[:2]))
def test_a_wrong_attribute_is_found_and_its_op_is_named(
    name: str,
    op: str,
    changed: dict[str, Attribute],
    exported: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = host.Library.create

    def wrong(self: host.Library, made: str, attributes: dict[str, Attribute]) -> host.Plugin:
        return right(self, made, {**attributes, **(changed if made == op else {})})

    monkeypatch.setattr(host.Library, "create", wrong)
    rung = climb(exported(name))
    assert rung.status == "fail"
    assert f" of {op} is " in rung.note


def test_what_a_plugin_refuses_fails_the_rung_with_op_sizes_and_reason(
    exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = host.Plugin.prepare

    def one_more(self: host.Plugin, inputs: Sequence[host.Desc]) -> tuple[list[host.Desc], int]:
        inputs[1].dims.sizes[2] += 1
        return right(self, inputs)

    monkeypatch.setattr(host.Plugin, "prepare", one_more)
    rung = climb(exported("gemma"))
    assert rung.status == "fail"
    assert rung.note.startswith("Rope: ")
    assert "sin float32[2, 19, 16]" in rung.note


def on_emulator() -> kernels.Kernels:
    return kernels.Kernels(kernels.machine())


def test_an_op_that_the_kernels_do_not_serve_is_refused_with_the_reason() -> None:
    x, weight, state = (torch.zeros(s, dtype=torch.float16) for s in ((1, 3, 8), (8, 1, 5), (1, 4, 8)))
    says = r"CausalConv1d: weight has K = 5 taps, the kernels are for 2 to 4 \(x float16\[1, 3, 8\], weight float16"
    with on_emulator(), pytest.raises(host.Refused, match=says):
        causal_conv1d(x, weight, state, torch.tensor([3], dtype=torch.int32), None, "none")


def test_a_library_without_an_op_is_no_reason_to_run_its_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = on_emulator()
    del ran._library.creators["CausalConv1d"]
    x, weight, state = (torch.zeros(s) for s in ((1, 3, 8), (8, 1, 4), (1, 3, 8)))
    with (
        ran,
        pytest.raises(host.Refused, match="CausalConv1d has no plugin in this library, which serves "),
    ):
        causal_conv1d(x, weight, state, torch.tensor([3], dtype=torch.int32), None, "none")


def test_no_op_is_a_kernels_after_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    x, angle = torch.ones(1, 1, 2, 4), torch.ones(1, 2, 2)
    with on_emulator() as ran:
        rope(x, angle, angle, False)
    assert ran.calls == {"Rope": 1}
    rope(x, angle, angle, False)
    assert ran.calls == {"Rope": 1}


def test_what_a_kernel_leaves_unwritten_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.Plugin, "enqueue", lambda *arguments: None)
    x, angle = torch.ones(1, 1, 2, 4), torch.ones(1, 2, 2)
    with on_emulator():
        assert rope(x, angle, angle, False).isnan().all()


def test_inputs_that_do_not_lie_in_a_row_are_read_right() -> None:
    x, angle = torch.randn(1, 2, 3, 4).transpose(1, 2), torch.randn(1, 3, 2)
    with on_emulator():
        found = rope(x.transpose(1, 2), angle, angle, True)
    assert torch.equal(found, rope(x.transpose(1, 2), angle, angle, True))


def test_a_large_model_is_not_run_unless_it_is_asked_for(
    exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "MOST", 1e3)
    export = manifest.read(exported("gemma"))
    reason = kernels.unable(export, False)
    assert reason.endswith(" multiply-adds, over 1e+03: --rungs kernels runs it anyway")
    assert kernels.unable(export, True) == ""


def test_nothing_is_compiled_unless_it_is_asked_for(
    exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emulated, "find", lambda: None)
    monkeypatch.setattr(emulated, "build", emulated_library)
    export = manifest.read(exported("gemma"))
    reason = "the kernels are not compiled for this CPU: llmexport plugins build --emulated, which takes a minute"
    assert kernels.unable(export, False) == reason
    assert kernels.unable(export, True) == ""
    said: list[str] = []
    ladder.climb(export, rungs=["kernels"], tokens=2, progress=lambda what, *_: said.append(what))
    assert said[1] == "kernels, compiled for this CPU once, in a minute"


def test_a_library_that_others_can_write_is_the_reason(
    exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused() -> Path:
        raise CacheError("others can write to it")

    monkeypatch.setattr(emulated, "find", refused)
    rung = climb(exported("gemma"))
    assert (rung.status, rung.note) == ("not run", "others can write to it")
    assert kernels.unable(manifest.read(exported("gemma")), False) == rung.note


def test_a_missing_tool_is_the_reason(exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulated, "find", lambda: None)
    monkeypatch.setenv("PATH", "")
    rung = climb(exported("gemma"))
    assert (rung.status, rung.note) == ("not run", "cmake is not installed: pip install cmake")

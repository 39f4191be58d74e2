"""Encoders against transformers, which loads the same folder: no state, padding on either side."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from arch_cases import ENCODERS, Case
from safetensors.numpy import load_file, save_file
from tiny_configs import one_line, read, refusal

from llmexport.export import archs, manifest, onnx_file
from llmexport.export.assembly import find_block
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.errors import ExportError
from llmexport.export.spec import Attention, Embedding, Layer, Mlp
from llmexport.validate.compare import compare
from llmexport.validate.runners import TorchRunner
from llmexport.validate.tolerance import TOLERANCE, tolerance

MAX_ABS, RMS_RATIO = 1e-4, 1e-5  # the promise for fp32, not to be loosened
RUNNERS = ("torch", "onnxruntime")
TABLE = 320  # positions of the tiny config
Feed = dict[str, np.ndarray]


@functools.cache
def reference(folder: Path, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    model_class = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    # DeBERTa has biases that stay in fp32 otherwise.
    return model_class.from_pretrained(folder, dtype=dtype, attn_implementation="eager").to(dtype).eval()


def expected(folder: Path, feed: Feed, dtype: torch.dtype = torch.float32) -> np.ndarray:
    with torch.no_grad():
        made = reference(folder, dtype)(**{n: torch.from_numpy(a) for n, a in feed.items()})
    return made.logits.float().numpy()


def found(folder: Path, runner: str, feed: Feed) -> np.ndarray:
    read_back = manifest.read(folder)
    assert [p.name for p in read_back.graphs[0].assembly.inputs] == [*feed]
    if runner == "torch":
        torch_runner = TorchRunner(read_back, read_back.graphs[0])
        torch_runner.activate()
        return torch_runner.infer(feed, check_inputs=False)["logits"]
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return session.run(["logits"], feed)[0]


def feed(case: Case, tokens: int, right: int = 0, left: int = 0) -> Feed:
    """Three rows: one without padding, one padded on the right, one on the left."""
    random = np.random.default_rng(tokens)
    ids, mask = random.integers(0, 256, (3, tokens)), np.ones((3, tokens), np.int64)
    mask[1, tokens - right :], mask[2, :left] = 0, 0
    kinds = case.changes.get("type_vocab_size", archs.load(case.arch).tiny["type_vocab_size"])
    types = {"token_type_ids": random.integers(0, kinds, (3, tokens))} if kinds else {}
    return {"input_ids": ids, "attention_mask": mask, **types}


def check(wanted: np.ndarray, logits: np.ndarray, folder: Path) -> None:
    allowed = tolerance("float32", manifest.read(folder))
    assert allowed.max_abs <= MAX_ABS
    assert allowed.rms_ratio <= RMS_RATIO
    difference = compare(wanted, logits)
    assert difference.excess(allowed) <= 1
    assert difference.scale > 0.5, "logits near zero would prove nothing"


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize(
    ("tokens", "right", "left"), [(1, 0, 0), (37, 9, 7), (63, 62, 62), (130, 70, 1), (TABLE, 3, 5)]
)
@pytest.mark.parametrize("case", ENCODERS, ids=str)
def test_logits_match_transformers_at_padding_too(
    case: Case, tokens: int, right: int, left: int, runner: str, tiny_checkpoint, exported
) -> None:
    given = feed(case, tokens, right, left)
    check(expected(tiny_checkpoint(case), given), found(exported(case), runner, given), exported(case))


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_row_padded_on_the_right_equals_the_row_alone(runner: str, tiny_checkpoint, exported) -> None:
    given = feed(ENCODERS[0], 37, right=9)
    alone = {n: a[1:2, : 37 - 9] for n, a in given.items()}
    logits = found(exported("bert"), runner, given)
    check(expected(tiny_checkpoint("bert"), alone), logits[1:2, : 37 - 9], exported("bert"))


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_row_of_padding_alone_is_finite(runner: str, exported) -> None:
    assert np.isfinite(found(exported("bert"), runner, feed(ENCODERS[0], 5, right=5))).all()


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_token_past_the_table_of_positions_is_refused(runner: str, exported) -> None:
    with pytest.raises(Exception, match=r"index out of range|320 by 321"):
        found(exported("bert"), runner, feed(ENCODERS[0], TABLE + 1))


def check_rounded(wanted: np.ndarray, logits: np.ndarray, dtype: str) -> None:
    assert compare(wanted, logits.astype(np.float32)).excess(TOLERANCE[dtype]) <= 1


@pytest.mark.parametrize("case", ENCODERS, ids=str)
def test_16_bits_are_within_their_tolerance_of_transformers_in_16_bits(case: Case, tiny_checkpoint, exported) -> None:
    given = feed(case, 37, right=9, left=7)
    for dtype, runner in (("float16", "onnxruntime"), ("float16", "torch"), ("bfloat16", "torch")):
        logits = found(exported(case, dtype), runner, given)
        assert logits.dtype == dtype
        check_rounded(expected(tiny_checkpoint(case), given, getattr(torch, dtype)), logits, dtype)


def relaid(source: Path, folder: Path, change: Callable[[Feed], Feed]) -> Path:
    """The checkpoint with other tensors, in one file."""
    tensors = {n: t for file in source.glob("*.safetensors") for n, t in load_file(file).items()}
    folder.mkdir()
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(source / "config.json", folder)
    return folder


def of_the_first_release(tensors: Feed) -> Feed:
    """As bert-base-uncased is published: norms by their first names, the pooler and the other head beside."""
    renamed = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in tensors.items()
    }
    square, row = np.ones((64, 64), np.float32), np.ones(64, np.float32)
    pooler = {"bert.pooler.dense.weight": square, "bert.pooler.dense.bias": row}
    pair = {"cls.seq_relationship.weight": square[:2], "cls.seq_relationship.bias": row[:2]}
    return renamed | pooler | pair | {"bert.embeddings.position_ids": np.arange(TABLE)[None]}


def with_copies(tensors: Feed) -> Feed:
    """Tied weights a second time, as some tools write them."""
    copies = {"weight": "bert.embeddings.word_embeddings.weight", "bias": "cls.predictions.bias"}
    return tensors | {f"cls.predictions.decoder.{n}": tensors[original].copy() for n, original in copies.items()}


def export(checkpoint: Path, folder: Path) -> Path:
    opened = open_checkpoint(checkpoint)
    request = onnx_file.Request(archs.choose(None, opened.config), opened)
    onnx_file.write(request, folder, force=False)
    return folder


@pytest.mark.parametrize("layout", [of_the_first_release, with_copies, lambda t: with_copies(of_the_first_release(t))])
def test_published_layouts_are_read_as_transformers_reads_them(layout, tiny_checkpoint, tmp_path) -> None:
    folder = relaid(tiny_checkpoint("bert"), tmp_path / "ck", layout)
    given = feed(ENCODERS[0], 37, right=9, left=7)
    made = export(folder, tmp_path / "out")
    check(expected(folder, given), found(made, "onnxruntime", given), made)


def refused(checkpoint: Path, folder: Path) -> str:
    with pytest.raises(ExportError) as error:
        export(checkpoint, folder)
    assert not folder.exists()
    return one_line(error.value)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_copy_of_a_tied_weight_that_differs_is_refused(name: str, tiny_checkpoint, tmp_path) -> None:
    def differ(tensors: Feed) -> Feed:
        copies = with_copies(tensors)
        copies[f"cls.predictions.decoder.{name}"] += 1
        return copies

    line = refused(relaid(tiny_checkpoint("bert"), tmp_path / "ck", differ), tmp_path / "out")
    assert f"cls.predictions.decoder.{name} is not its" in line


def test_the_checkpoint_of_a_base_model_is_refused(tiny_checkpoint, tmp_path) -> None:
    def base(tensors: Feed) -> Feed:
        return {n.removeprefix("bert."): t for n, t in tensors.items() if n.startswith("bert.")}

    line = refused(relaid(tiny_checkpoint("bert"), tmp_path / "ck", base), tmp_path / "out")
    assert "is a base model, its names lack 'bert.': it has no head that gives logits, take a BertForMaskedLM" in line


@pytest.mark.parametrize(
    ("head", "why"),
    [
        ("BertModel", "a base model has no head that gives logits, take a BertForMaskedLM"),
        ("BertForSequenceClassification", "other heads and variants are not supported"),
        ("BertLMHeadModel", "other heads and variants are not supported"),
    ],
)
def test_another_head_is_refused_by_the_one_that_is_exported(head: str, why: str) -> None:
    with pytest.raises(ExportError) as error:
        archs.choose("bert", {"model_type": "bert", "architectures": [head]})
    assert one_line(error.value).endswith(f"says architectures ['{head}'], bert exports ['BertForMaskedLM']: {why}")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"is_decoder": True}, "is_decoder=True"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder=True"),
        ({"cross_attention_hidden_size": 64}, "cross_attention_hidden_size=64"),
        ({"is_causal": True}, "is_causal=True"),
        ({"directionality": "left"}, "directionality='left'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key', only 'absolute'"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish', this architecture knows 'silu', "),
        ({"num_attention_heads": 5}, "hidden_size 64 is not a multiple of 5 attention heads"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types="),
        ({"rope_theta": 10000.0}, "rope_theta=10000.0"),
    ],
)
def test_what_makes_another_model_is_refused(changes: dict[str, object], said: str) -> None:
    assert said in refusal("bert", **changes)


@pytest.mark.parametrize(
    "keys",
    [
        {"is_decoder": False, "add_cross_attention": False, "is_encoder_decoder": False, "chunk_size_feed_forward": 1},
        {"directionality": "bidi", "pooler_type": "first_token_transform", "pooler_fc_size": 768, "use_cache": True},
        {"position_embedding_type": "absolute", "cross_attention_hidden_size": None, "is_causal": False},
        {"is_causal": None},
    ],
)
def test_what_an_encoder_says_of_itself_changes_nothing(keys: dict[str, object], tiny_checkpoint) -> None:
    assert read("bert", **keys) == read("bert")
    plain = reference(tiny_checkpoint("bert"))
    config = type(plain.config)(**{**archs.load("bert").tiny, **keys}, attn_implementation="eager")
    told = type(plain)(config).eval()
    told.load_state_dict(plain.state_dict())
    with torch.no_grad():
        ids = torch.arange(20)[None]
        # The feed-forward in chunks sums in another order.
        assert compare(plain(ids).logits.numpy(), told(ids).logits.numpy()).excess(TOLERANCE["float32"]) <= 1


def test_layers_that_the_checkpoint_lacks_are_counted(tiny_checkpoint, tmp_path) -> None:
    folder = relaid(tiny_checkpoint("bert"), tmp_path / "ck", dict)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    assert "says num_hidden_layers 4, the checkpoint holds 3 layers" in refused(folder, tmp_path / "out")


@pytest.mark.parametrize("kind", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish"])
def test_an_activation_is_the_one_of_transformers(kind: str) -> None:
    from transformers.activations import ACT2FN

    from llmexport.export.blocks.mlp import ACTIVATIONS

    block = find_block(read("bert", hidden_act=kind), "mlp").block
    assert isinstance(block, Mlp)
    x = torch.linspace(-6, 6, 1001)
    difference = compare(ACT2FN[kind](x).numpy(), ACTIVATIONS[block.activation](x).numpy())
    assert difference.excess(TOLERANCE["float32"]) <= 1


def test_an_encoder_carries_nothing_and_has_no_axis_but_batch_and_sequence() -> None:
    [graph] = read("bert").graphs
    assert graph.carried == {}
    ports = [p for s in graph.assembly.steps for p in (*s.block.inputs, *s.block.outputs)]
    assert {d for p in ports for d in p.shape if isinstance(d, str)} == {"batch", "sequence"}
    assert graph.assembly.steps[0].block.most == {"sequence": TABLE}
    kinds = [type(s.block) for s in graph.assembly.steps]
    assert (kinds[0], kinds.count(Layer)) == (Embedding, 3)
    attention = find_block(read("bert"), "attention").block
    assert isinstance(attention, Attention)
    assert [p.name for p in attention.outputs] == ["attended"]

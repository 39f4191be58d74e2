"""An encoder and a decoder in two graphs, against transformers, which loads the same folder."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from arch_cases import PAIRS, Case
from safetensors.numpy import load_file, save_file
from tiny_configs import one_line, read, refusal

from llmexport.export import archs, engine, manifest, onnx_file, random_checkpoint
from llmexport.export.blocks import module
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.errors import ExportError
from llmexport.export.spec import Head, RelativeBias
from llmexport.export.static import StaticCache
from llmexport.validate.compare import compare
from llmexport.validate.runners import TorchRunner
from llmexport.validate.tolerance import TOLERANCE, tolerance

MAX_ABS, RMS_RATIO = 1e-4, 1e-5  # the promise for fp32, not to be loosened
RUNNERS = ("torch", "onnxruntime")
PROMPT, DECODE = 37, 8  # tokens of the decoder's prompt, odd and past the last bucket, and steps after it
Rows = np.ndarray
Feed = dict[str, np.ndarray]


@functools.cache
def reference(folder: Path, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    model_class = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    return model_class.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def rows(length: int, left: int = 0, right: int = 0, seed: int = 1) -> tuple[Rows, Rows]:
    """Two rows of tokens, the second padded on both sides."""
    ids = np.random.default_rng(seed).integers(0, 256, (2, length))
    mask = np.ones_like(ids)
    mask[1, :left], mask[1, length - right :] = 0, 0
    return ids, mask


class Pair:
    """One side of a comparison: an encoder that reads once, and a decoder that is stepped with its own cache.

    It feeds, steps and compares by itself on purpose: `validate` does the same, and a fault there must not hide one.
    """

    def __init__(self, folder: Path, runner: str) -> None:
        self.export = export = manifest.read(folder)
        self.encoder, self.decoder = (self._run(graph, runner) for graph in export.graphs)
        self.graph = export.graphs[1]
        self.kept: dict[str, Rows] = {}
        self.past: dict[str, Rows] = {}

    def _run(self, graph: Any, runner: str) -> Callable[[Feed], Feed]:
        if runner == "onnxruntime":
            session = onnxruntime.InferenceSession(self.export.folder / graph.file, providers=["CPUExecutionProvider"])
            names = [o.name for o in session.get_outputs()]
            return lambda feed: dict(zip(names, session.run(names, feed), strict=True))
        made = TorchRunner(self.export, graph)
        made.activate()
        return lambda feed: {n: np.copy(a) for n, a in made.infer(feed, check_inputs=False).items()}

    def read(self, ids: Rows, mask: Rows) -> None:
        made = self.encoder({"input_ids": ids, "attention_mask": mask})
        self.kept = {**made, "encoder_attention_mask": mask}
        sizes = {"batch": len(ids), "past": 0}
        ports = [p.typed(self.export.dtype) for p in self.graph.assembly.inputs if p.name in self.graph.carried]
        self.past = {p.name: np.zeros([sizes.get(d, d) for d in p.shape], p.dtype) for p in ports}

    def step(self, ids: Rows, mask: Rows) -> Rows:
        feed = {"decoder_input_ids": ids, "decoder_attention_mask": mask, **self.kept, **self.past}
        made = self.decoder(feed)
        self.past = {n: made[self.graph.carried[n]] for n in self.past}
        return made["logits"]

    def check(self, expected: Rows, found: Rows, where: Rows | None = None) -> None:
        allowed = tolerance("float32", self.export)
        assert (allowed.max_abs, allowed.rms_ratio) <= (MAX_ABS, RMS_RATIO)
        difference = compare(expected, found, where)
        assert difference.excess(allowed) <= 1
        # v1.0 multiplies them by 64 ** -0.5.
        assert difference.scale > 0.5 / 8, "logits near zero would prove nothing"


def follow(folder: Path, ours: list[Pair], source: tuple[Rows, Rows], prompt: tuple[Rows, Rows], steps: int) -> None:
    """Both sides on a text, a prompt and greedy steps; transformers keeps its encoder's outputs and its caches."""
    model, (ids, mask) = reference(folder), prompt
    for pair in ours:
        pair.read(*source)
    given: dict[str, Any] = {"input_ids": torch.from_numpy(source[0]), "attention_mask": torch.from_numpy(source[1])}
    with torch.no_grad():
        encoded = model.get_encoder()(**given)
    cache = None
    for step in range(steps + 1):
        with torch.no_grad():
            made = model(
                encoder_outputs=encoded,
                attention_mask=given["attention_mask"],
                decoder_input_ids=torch.from_numpy(ids),
                decoder_attention_mask=torch.from_numpy(mask),
                past_key_values=cache,
                use_cache=True,
            )
        cache, expected = made.past_key_values, made.logits.numpy()
        for pair in ours:
            pair.check(expected, pair.step(ids, mask), None if step else mask.astype(bool))
        ids = expected[:, -1:].argmax(-1)
        mask = np.concatenate((mask, np.ones_like(ids)), 1)


@pytest.mark.every_family
@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_logits_match_transformers_through_prefill_and_decode(case: Case, tiny_checkpoint, exported) -> None:
    """A text padded on both sides, a prompt of the decoder padded on the left, past the last bucket of both."""
    ours = [Pair(exported(case), runner) for runner in RUNNERS]
    follow(tiny_checkpoint(case), ours, rows(65, 5, 7), rows(PROMPT, 5, seed=2), DECODE)


@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_texts_and_prompts_of_other_lengths_match_transformers(case: Case, tiny_checkpoint, exported) -> None:
    ours = [Pair(exported(case), runner) for runner in RUNNERS]
    for source, prompt in ((1, 130), (63, 1), (64, 65), (130, 64)):
        few = min(source // 3, 31)
        follow(tiny_checkpoint(case), ours, rows(source, few, few), rows(prompt, prompt // 3, seed=2), 1)


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_prompt_in_two_pieces_equals_the_whole(runner: str, exported) -> None:
    pair, (ids, mask) = Pair(exported("t5"), runner), rows(PROMPT, 5)
    pair.read(*rows(65, 5, 7))
    whole = pair.step(ids, mask)
    pair.read(*rows(65, 5, 7))
    first = pair.step(ids[:, :20], mask[:, :20])
    pair.check(whole, np.concatenate((first, pair.step(ids[:, 20:], mask)), 1), mask.astype(bool))


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_text_of_padding_alone_is_finite(runner: str, exported) -> None:
    pair, (ids, mask) = Pair(exported("t5", "float16"), runner), rows(9, 9)
    pair.read(ids, mask)
    assert np.isfinite(pair.step(*rows(5))).all()


@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_greedy_tokens_match_generate_for_32_steps(case: Case, tiny_checkpoint, exported) -> None:
    model, (ids, mask) = reference(tiny_checkpoint(case)), rows(33, 3, 4)
    model.generation_config.eos_token_id = None
    given = {"attention_mask": torch.from_numpy(mask), "max_new_tokens": 32, "do_sample": False}
    wanted = model.generate(torch.from_numpy(ids), decoder_start_token_id=0, **given)[:, 1:].numpy()
    for runner in RUNNERS:
        pair, made = Pair(exported(case), runner), np.zeros((2, 1), np.int64)
        pair.read(ids, mask)
        for _ in range(32):
            scores = pair.step(made[:, -1:], np.ones_like(made))
            made = np.concatenate((made, scores[:, -1:].argmax(-1)), 1)
        assert np.array_equal(made[:, 1:], wanted), runner


@pytest.mark.parametrize(("dtype", "runner"), [("float16", "onnxruntime"), ("float16", "torch"), ("bfloat16", "torch")])
@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_16_bits_are_within_their_tolerance_of_transformers_in_16_bits(
    case: Case, dtype: str, runner: str, tiny_checkpoint, exported
) -> None:
    (source, hidden), (ids, mask) = rows(33, 3, 4), rows(PROMPT, seed=2)
    given = (source, hidden, ids, mask)
    with torch.no_grad():
        wanted = reference(tiny_checkpoint(case), getattr(torch, dtype))(*map(torch.from_numpy, given)).logits
    pair = Pair(exported(case, dtype), runner)
    pair.read(source, hidden)
    logits = pair.step(ids, mask)
    assert logits.dtype == dtype
    assert compare(wanted.float().numpy(), logits.astype(np.float32)).excess(TOLERANCE[dtype]) <= 1


@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (12, 30), (64, 200)])
def test_the_bias_is_that_of_transformers_far_beyond_the_last_bucket(
    buckets: int, distance: int, both_ways: bool
) -> None:
    """Every distance from one bucket to the next, where a rounded logarithm would show."""
    from transformers.models.t5.modeling_t5 import T5Attention

    config = transformers.T5Config(
        d_model=8, d_kv=4, num_heads=2, relative_attention_num_buckets=buckets,
        relative_attention_max_distance=distance, is_decoder=not both_ways,
    )  # fmt: skip
    theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    ours = module(RelativeBias(2, buckets, distance, both_ways), torch.float32)
    weight = torch.randn(buckets, 2, generator=torch.Generator().manual_seed(0))
    theirs.relative_attention_bias.weight.data = weight
    keys, past = 3 * distance, 0 if both_ways else 7
    mask = torch.ones(1, 1, keys - past, keys, dtype=torch.bool)
    found = torch.func.functional_call(ours, {"weight": weight, "table": ours.table}, (mask,))
    assert torch.equal(found, theirs.compute_bias(keys - past, keys, past_seen_tokens=past))


def test_the_head_is_the_checkpoints_own_or_the_table_of_words(tmp_path: Path) -> None:
    """Whatever the config says: what transformers 5 saves of v1.1 says that its own head is tied."""
    random_checkpoint.write(archs.load("t5"), tmp_path / "own", dtype="float32", shard_bytes=10**9)
    [shard] = (tmp_path / "own").glob("*.safetensors")
    tensors = load_file(shard)
    shutil.copytree(tmp_path / "own", tmp_path / "tied")
    [other] = (tmp_path / "tied").glob("*.safetensors")
    save_file({n: t for n, t in tensors.items() if n != "lm_head.weight"}, other, metadata={"format": "pt"})
    index = json.loads((tmp_path / "tied/model.safetensors.index.json").read_text())
    del index["weight_map"]["lm_head.weight"]
    (tmp_path / "tied/model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("own", "tied"):
        opened = open_checkpoint(tmp_path / name)
        onnx_file.write(onnx_file.Request(archs.load("t5"), opened), tmp_path / f"{name}-out")
        follow(tmp_path / name, [Pair(tmp_path / f"{name}-out", "torch")], rows(9), rows(5, seed=2), 1)


def relaid(source: Path, folder: Path, **more: Rows) -> Path:
    tensors = {n: t for file in source.glob("*.safetensors") for n, t in load_file(file).items()}
    folder.mkdir()
    made = {n: tensors[v].copy() if isinstance(v, str) else v for n, v in more.items()}
    save_file(tensors | made, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(source / "config.json", folder)
    return folder


COPIES = dict.fromkeys(("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), "shared.weight")
SPARE = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def export(checkpoint: Path, folder: Path) -> Path:
    opened = open_checkpoint(checkpoint)
    onnx_file.write(onnx_file.Request(archs.choose(None, opened.config), opened), folder)
    return folder


def test_the_published_layout_is_read_as_transformers_reads_it(tiny_checkpoint, tmp_path: Path) -> None:
    """Tables of both sides a second time, and a bias that the first release had by mistake."""
    folder = relaid(tiny_checkpoint("t5"), tmp_path / "ck", **COPIES, **{SPARE: np.ones((12, 4), np.float32)})
    follow(folder, [Pair(export(folder, tmp_path / "out"), "onnxruntime")], rows(9), rows(5, seed=2), 1)


def test_a_table_of_one_side_that_differs_is_refused(tiny_checkpoint, tmp_path: Path) -> None:
    folder = relaid(tiny_checkpoint("t5"), tmp_path / "ck", **{n: np.ones((256, 64), np.float32) for n in COPIES})
    with pytest.raises(ExportError, match=r"encoder.embed_tokens.weight is not its") as error:
        export(folder, tmp_path / "out")
    assert one_line(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, 1 / 8),
        ({"tie_word_embeddings": False}, 1.0),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, 1.0),
    ],
)
def test_logits_are_scaled_where_the_config_says_so(changes: dict[str, bool], scale: float) -> None:
    [head] = (s.block for s in read("t5", **changes).steps if isinstance(s.block, Head))
    assert head.scale == scale


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"is_encoder_decoder": False}, "is_encoder_decoder is False, only True is supported"),
        ({"feed_forward_proj": "gated-mish"}, "feed_forward_proj is 'gated-mish', this architecture knows 'relu'"),
        ({"dense_act_fn": "gelu"}, "dense_act_fn is 'gelu', only 'relu' is supported"),
        ({"relative_attention_num_buckets": 7}, "relative_attention_num_buckets is 7 and"),
        ({"relative_attention_max_distance": 6}, "relative_attention_max_distance 6: an even number"),
    ],
)
def test_what_makes_another_model_is_refused(changes: dict[str, object], said: str) -> None:
    assert said in refusal("t5", **changes)


def test_a_static_cache_is_refused(tiny_checkpoint) -> None:
    arch = archs.load("t5")
    with pytest.raises(ExportError, match="--cache static: an encoder-decoder has a dynamic cache here") as error:
        onnx_file.read_model(arch, arch.tiny, StaticCache(64))
    assert one_line(error.value)


def test_an_encoder_alone_is_refused_by_the_class_that_is_exported() -> None:
    with pytest.raises(ExportError) as error:
        archs.choose("t5", {"model_type": "t5", "architectures": ["T5EncoderModel"]})
    assert "t5 exports ['T5ForConditionalGeneration']" in one_line(error.value)


def test_cross_keys_are_made_once_by_the_encoder() -> None:
    encoder, decoder = read("t5").graphs
    given = [p.name for p in encoder.assembly.outputs]
    assert given == ["cross_key.0", "cross_value.0", "cross_key.1", "cross_value.1"]
    assert {*given} < {p.name for p in decoder.assembly.inputs}
    assert (encoder.carried, len(decoder.carried)) == ({}, 4)
    assert {d for p in encoder.assembly.inputs for d in p.shape} == {"batch", "source"}


@pytest.mark.engine
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_both_graphs_are_built(dtype: str, exported, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx")
    folder = Path(shutil.copytree(exported("t5", dtype), tmp_path / "export"))
    record = engine.build(folder)
    assert [*record.graphs] == ["encoder", "decoder"]
    assert all(plan.messages == () for plan in record.graphs.values())
    assert record.profile["source"] == (1, 64, 512)

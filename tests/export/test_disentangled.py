"""DeBERTa: published layouts, distances in buckets, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from tiny_configs import read, refusal
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

from llmexport.export import archs, blocks, manifest, onnx_file
from llmexport.export.blocks.disentangled import log_buckets
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.disentangled import OLDER
from llmexport.export.exported import Export
from llmexport.export.spec import DisentangledAttention, Embedding
from llmexport.validate import ladder
from llmexport.validate.compare import compare
from llmexport.validate.runners import TorchRunner
from llmexport.validate.tolerance import TOLERANCE, tolerance


def as_published(source: Path, folder: Path, **said: object) -> Path:
    """As microsoft/deberta-v3-base: another head's names, the other head of training, positions that are not read."""
    tensors = {OLDER.get(n, n): t for p in source.glob("*.safetensors") for n, t in load_file(p).items()}
    tensors |= {"deberta.embeddings.position_embeddings.weight": np.ones((320, 64), np.float32)}
    tensors |= {f"mask_predictions.{n}": np.ones(64, np.float32) for n in ("dense.bias", "classifier.bias")}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "legacy"} | said))
    return folder


def export(source: Path, folder: Path) -> Export:
    opened = open_checkpoint(source)
    onnx_file.write(onnx_file.Request(archs.choose(None, opened.config), opened), folder, force=False)
    return manifest.read(folder)


@pytest.mark.model
@pytest.mark.parametrize("arch", ["deberta", "deberta_v2"])
def test_the_head_that_the_authors_published_is_read(arch: str, tiny_checkpoint, tmp_path: Path) -> None:
    """By its names; transformers reads it where config.json says so, and `validate` where it does not."""
    source = as_published(tiny_checkpoint(arch), tmp_path / "ck", legacy=False)
    ids = torch.randint(0, 256, (2, 37), generator=torch.Generator().manual_seed(0))
    model = transformers.AutoModelForMaskedLM.from_pretrained(source, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = model(ids, attention_mask=torch.ones_like(ids)).logits.numpy()
    found = export(source, tmp_path / "out")
    runner = TorchRunner(found, found.graphs[0])
    runner.activate()
    logits = runner.infer({"input_ids": ids.numpy(), "attention_mask": np.ones_like(ids)})["logits"]
    assert compare(expected, logits).excess(tolerance("float32", found)) <= 1
    unsaid = export(as_published(tiny_checkpoint(arch), tmp_path / "unsaid"), tmp_path / "other")
    assert "legacy" not in unsaid.config
    assert {r.status for r in ladder.climb(unsaid, rungs=("transformers",)).rungs} == {"pass"}


@pytest.mark.parametrize(("span", "most"), [(256, 512), (16, 48), (4, 9)])
def test_buckets_are_those_of_transformers(span: int, most: int) -> None:
    """Beyond the most, they go on there, and all end at the last row."""
    distance = torch.arange(-3 * most, 3 * most + 1)
    theirs = make_log_bucket_position(distance, span, most).to(torch.int64)
    ours = log_buckets(span, most)[distance.clamp(-most, most) + most]
    assert torch.equal(*((x + span).clamp(0, 2 * span - 1) for x in (ours, theirs)))


@pytest.mark.parametrize(
    ("arch", "changes", "said"),
    [
        ("deberta_v2", {"conv_kernel_size": 3}, "conv_kernel_size is 3, only 0 is supported here"),
        ("deberta_v2", {"position_buckets": 3}, "position_buckets is 3, distances are told apart up to 48: expected 4"),
        ("deberta_v2", {"position_buckets": 94}, "and less than 94"),
        ("deberta_v2", {"attention_head_size": 32}, "attention_head_size is 32, only 16"),
        ("deberta_v2", {"norm_rel_ebd": "batch_norm"}, "norm_rel_ebd is 'batch_norm'"),
        ("deberta", {"talking_head": True}, "talking_head is True, only False"),
        ("deberta", {"embedding_size": 32}, "embedding_size is 32, only 64"),
        ("deberta", {"pos_att_type": "c2p|p2p"}, "pos_att_type is 'c2p|p2p', this architecture knows 'c2p' and 'p2c'"),
        ("deberta", {"pos_att_type": ["c2p", "c2p"]}, "pos_att_type is "),
    ],
)
def test_what_makes_another_model_is_refused(arch: str, changes: dict[str, object], said: str) -> None:
    assert said in refusal(arch, **changes)


@pytest.mark.parametrize("arch", ["deberta", "deberta_v2"])
def test_kinds_of_distances_are_listed_or_joined(arch: str) -> None:
    assert read(arch, pos_att_type="P2C | c2p") == read(arch)


def test_without_relative_attention_no_distance_is_read() -> None:
    used = {s.block for s in read("deberta", relative_attention=False).steps}
    assert "relative_positions" not in {b.kind for b in used}
    [table] = [b for b in used if isinstance(b, Embedding)]
    assert [p.name for p in table.inputs] == ["input_ids", "attention_mask"]


def test_padding_takes_no_part_but_in_its_own_rows() -> None:
    """What a query of padding sees is its whole row alike, as transformers has it, and no row is empty."""

    module = blocks.module(
        DisentangledAttention(8, 2, 4, 6, 0.5, to_position=False, from_position=False), torch.float32
    )
    module.load_state_dict({n: torch.randn(p.shape) for n, p in module.state_dict().items()}, assign=True)
    hidden, mask = torch.randn(1, 5, 8), torch.tensor([[1, 1, 1, 0, 0]])
    made = module(hidden, mask)
    alone, alike = module(hidden[:, :3], mask[:, :3]), module.o_proj(module.v_proj(hidden).mean(1))
    for expected, found in ((alone, made[:, :3]), (alike, made[:, 3])):
        assert compare(expected.numpy(), found.numpy()).excess(TOLERANCE["float32"]) <= 1

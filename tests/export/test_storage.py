"""Storage: one class says what holds a matrix, to the module, the checkpoint's check and the random checkpoint."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from llmexport.export import archs, blocks, random_checkpoint, weights
from llmexport.export.archs import gpt_oss
from llmexport.export.assembly import parts
from llmexport.export.checkpoint import Checkpoint, open_checkpoint
from llmexport.export.errors import ExportError
from llmexport.export.onnx_file import read_model
from llmexport.export.spec import (
    Attention,
    Block,
    Experts,
    Moe,
    Mxfp4,
    Norm,
    Packed,
    Plain,
    Router,
    Storage,
    Stored,
    decoder_layer,
    from_data,
    to_data,
)
from llmexport.export.wanted import load_parameters, wanted_parameters
from llmexport.export.weights import Parameter
from llmexport.plugins.moe_experts.formats import dequantise

EXPERTS = Experts(64, 32, 4, 2, bias=True)
MXFP4 = Experts(64, 32, 4, 2, bias=True, storage=Mxfp4())
NORM = Norm(64, 1e-6)
LAYER = decoder_layer(NORM, Attention(64, 4, 2, 16), NORM, Moe(Router(64, 4, 2, "softmax"), MXFP4))


@dataclass(frozen=True)
class Int8(Storage):
    """Bytes with a scale for each row, which nothing but this file knows of."""

    def tensors(self, rows: int, columns: int, matrices: int = 1) -> tuple[Stored, ...]:
        usual = 0.01 * columns**-0.5
        return (
            Stored("", (rows, columns), "int8", usual=(-128, 128)),
            Stored("_scale", (rows, 1), usual=(0.5 * usual, 1.5 * usual)),
        )


def as_wide(matrix: np.ndarray) -> float:
    """Its deviation over that of the plain matrices of a random checkpoint."""
    return float(matrix.std()) / (0.6 * matrix.shape[-1] ** -0.5)


@pytest.mark.parametrize("block", [EXPERTS, Experts(64, 32, 4, 2, transposed=True), MXFP4, LAYER], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_module_has_the_tensors_of_the_storage_and_all_others_in_its_own_type(block: Block, dtype: torch.dtype):
    found = {n: (tuple(p.shape), p.dtype) for n, p in blocks.module(block, dtype).named_parameters()}
    expected = {n: (s.shape, dtype if s.dtype == "W" else torch.uint8) for n, s in block.stored.items()}
    assert expected
    assert {n: kind for n, kind in found.items() if n in expected} == expected
    assert {kind for n, (_, kind) in found.items() if n not in expected} <= {dtype}


def test_experts_hold_their_matrices_under_the_names_that_are_published():
    assert {n: (s.dtype, s.shape) for n, s in EXPERTS.stored.items()} == {
        "gate_up_proj": ("W", (4, 64, 64)),
        "down_proj": ("W", (4, 64, 32)),
    }
    assert {n: (s.dtype, s.shape) for n, s in MXFP4.stored.items()} == {
        "gate_up_proj_blocks": ("uint8", (4, 64, 32)),
        "gate_up_proj_scales": ("uint8", (4, 64, 2)),
        "down_proj_blocks": ("uint8", (4, 64, 16)),
        "down_proj_scales": ("uint8", (4, 64, 1)),
    }


def test_mxfp4_is_what_the_op_decodes_and_drawn_as_wide_as_other_weights():
    rows, columns = 96, 4096
    random = np.random.default_rng(0)
    blocks_, scales = (random.integers(*s.usual, s.shape, np.uint8) for s in Mxfp4().tensors(rows, columns))
    values = dequantise("mxfp4", 32, torch.from_numpy(blocks_), torch.from_numpy(scales))
    assert tuple(values.shape) == (rows, columns)
    assert 0.5 < as_wide(values.numpy()) < 2


@pytest.mark.parametrize("sizes", [{"hidden": 48}, {"intermediate": 40}], ids=str)
def test_rows_that_are_no_whole_number_of_blocks_are_refused(sizes: dict[str, int]):
    with pytest.raises(ExportError) as error:
        Experts(
            **{"hidden": 64, "intermediate": 32, "experts": 4, "top_k": 2, "bias": True, "storage": Mxfp4()} | sizes
        )
    [columns] = sizes.values()
    assert f"MXFP4 packs 32 values a block, which rows of {columns} do not fill" in str(error.value)


@pytest.mark.parametrize("storage", [Mxfp4(), Packed("uint4", 32, zeros=True)], ids=str)
def test_experts_with_scales_are_those_that_the_op_takes(storage: Storage):
    Experts(64, 32, 4, 2, transposed=True)
    with pytest.raises(ValueError, match="experts with scales are not transposed"):
        Experts(64, 32, 4, 2, transposed=True, storage=storage)


def test_experts_in_few_bits_hold_what_the_op_reads():
    packed = Experts(64, 48, 4, 2, storage=Packed("uint4", 32, factors=True, zeros=True))
    assert {n: (s.dtype, s.shape, s.role) for n, s in packed.stored.items()} == {
        "gate_up_proj": ("uint8", (4, 96, 32), "values"),
        "gate_up_proj_scales": ("F", (4, 96, 2), "scales"),
        "gate_up_proj_factors": ("F", (4, 2), "factors"),
        "gate_up_proj_zeros": ("uint8", (4, 96, 2), "zeros"),
        "down_proj": ("uint8", (4, 64, 24), "values"),
        "down_proj_scales": ("F", (4, 64, 2), "scales"),
        "down_proj_factors": ("F", (4, 1), "factors"),
        "down_proj_zeros": ("uint8", (4, 64, 2), "zeros"),
    }


def test_a_storage_is_a_value():
    assert (Plain(), Mxfp4()) == (Plain(), Mxfp4())
    assert Plain() != Mxfp4()
    assert from_data(json.loads(json.dumps(to_data(Int8())))) == Int8()


def held(folder: Path) -> tuple[dict[str, Parameter], Checkpoint]:
    """What a tiny GPT-OSS wants of the checkpoint that is drawn for it, and that checkpoint."""
    named = archs.load("gpt_oss")
    config = {**named.tiny, "quantization_config": {"quant_method": "mxfp4"}}
    random_checkpoint.write(named, folder, config=config)
    checkpoint, model = open_checkpoint(folder), read_model(named, config)
    own = wanted_parameters(named, checkpoint, model, model.graphs[0].assembly)
    return {p.name: p for parameters in own.values() for p in parameters.values()}, checkpoint


def test_another_way_to_store_a_matrix_is_one_class(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(gpt_oss, "Mxfp4", Int8)
    wanted, checkpoint = held(tmp_path / "int8")
    weights.check(wanted, checkpoint, (), whole=True)
    name = "model.layers.1.mlp.experts.down_proj"
    values, scales = checkpoint.read(name), checkpoint.read(f"{name}_scale")
    assert (values.dtype, values.shape, scales.dtype.name, scales.shape) == (
        "int8",
        (4, 64, 32),
        "bfloat16",
        (4, 64, 1),
    )
    assert 0.5 < as_wide(values * scales.astype(np.float32)) < 2
    other = dict(wanted) | {name: Parameter(name, (4, 64, 32), dtype="uint8")}
    with pytest.raises(ExportError, match=f"{name} is stored as I8; U8 can be exported here"):
        weights.check(other, checkpoint, (), whole=True)


def test_a_hollow_checkpoint_has_the_tensors_of_a_drawn_one(tmp_path: Path):
    _, drawn = held(tmp_path / "drawn")
    config = {k: v for k, v in drawn.config.items() if k != "architectures"}
    random_checkpoint.write(archs.load("gpt_oss"), tmp_path / "hollow", config=config, hollow=True)
    hollow = open_checkpoint(tmp_path / "hollow")
    assert {n: (t.dtype, t.shape) for n, t in hollow.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in drawn.tensors.items()
    }
    assert drawn.tensors["model.layers.0.mlp.experts.down_proj_blocks"].shape == (4, 64, 1, 16)


def test_parameters_of_no_storage_are_floats_of_any_type():
    found = load_parameters(LAYER)
    assert found.keys() > LAYER.stored.keys()
    assert {s.dtype for n, s in found.items() if n not in LAYER.stored} == {"T"}


def test_experts_alone_are_taken_in_the_type_that_they_are_stored_in():
    """Other ops than theirs have one type, which a checkpoint in 16 bits may not have."""
    models = (read_model(archs.load(name), archs.load(name).tiny) for name in archs.names())
    leaves = {part.block for model in models for step in model.steps for part in parts(step) if not part.block.parts}
    assert {type(b) for b in leaves if "W" in {s.dtype for s in b.stored.values()}} == {Experts}

"""Real engines on a real GPU: built here, run by Polygraphy's TrtRunner in the process that a user's runs in."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from arch_cases import ONCE, Case

from llmexport.export import device, engine, manifest
from llmexport.plugins import library
from llmexport.validate import deployed, golden, ladder

pytestmark = [pytest.mark.engine, pytest.mark.gpu]


@pytest.fixture(autouse=True, scope="module")
def gpu() -> None:
    if isinstance(found := device.first(), str):
        pytest.skip(found)


@pytest.mark.parametrize(("case", "dtype"), ONCE, ids=str)
@pytest.mark.parametrize("plugins", [False, True], ids=["bodies", "plugins"])
def test_an_engine_gives_the_numbers_of_its_export(case: Case, dtype: str, plugins: bool, exported, tmp_path) -> None:
    folder = Path(shutil.copytree(exported(case, dtype), tmp_path / "export"))
    kernels = library.find() if plugins else None
    if plugins and kernels is None:
        pytest.skip("the plugin library is not built: llmexport plugins build")
    engine.build(folder, plugins=kernels)
    [rung] = ladder.climb(manifest.read(folder), rungs=["engine"]).rungs
    assert (rung.status, rung.key) == ("pass", "engine"), rung.note
    assert rung.details


def test_a_golden_pack_passes_on_its_engine(exported, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported("llama", "float16"), tmp_path / "export"))
    engine.build(folder)
    golden.make(manifest.read(folder), tmp_path / "pack.npz", tokens=None, seed=0, force=False)
    assert deployed.on_engine(folder, tmp_path / "pack.npz").passed

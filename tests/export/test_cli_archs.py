"""llmexport archs, and README's table, which says the same."""

import json
from pathlib import Path

import pytest
from commands import Run, runner

from llmexport.export import archs
from llmexport.export.cli.archs import types


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(monkeypatch, capsys)


def test_architectures_say_which_multimodal_types_are_exported_whole(run: Run) -> None:
    _, out, _ = run("archs", "--json")
    found = {a["arch"]: a["multimodal"] for a in json.loads(out)}
    assert (found["qwen3_5"], found["qwen3"], found["llama"]) == ({"qwen3_5": "all"}, {"qwen3_vl": "text"}, {})
    _, table, _ = run("archs")
    assert "qwen3_vl (text)" in table


def test_the_systems_of_the_documents_are_listed_first(run: Run) -> None:
    _, out, _ = run("archs", "--json")
    found = [(a["group"], bool(a["system"])) for a in json.loads(out)]
    assert list(dict.fromkeys(found)) == [("of the documents", True), ("most used", False)]


def readme_rows() -> list[str]:
    """README's table of architectures, as the data files say it: the systems of the documents, then the others."""
    cells = ("`--arch`", "system", "model_type", "what it adds", "held against")
    rows = [cells, ("---",) * len(cells)]
    for arch in sorted(map(archs.load, archs.names()), key=lambda a: not a.system):
        rows.append((f"`{arch.name}`", arch.system, types(arch), arch.adds, arch.reference.model_class))
    return [f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows]


def test_readme_lists_the_architectures_as_their_files_say() -> None:
    lines = (Path(__file__).parents[2] / "README.md").read_text().splitlines()
    first = lines.index(readme_rows()[0])
    found = lines[first : lines.index("", first)]
    assert found == readme_rows(), "\n".join(("README.md's table should be", *readme_rows()))


def test_an_architecture_says_what_it_adds_in_one_short_line() -> None:
    assert [n for n in archs.names() if not 0 < len(archs.load(n).adds) <= 100] == []

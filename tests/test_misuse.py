"""Each situation of misuse holds: see misuse.py for what that is, misuse_cases.py for what they are."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from misuse import make_base, problem
from misuse_cases import KINDS, SITUATIONS

# Each in one process of this session; the others start one for every situation.
FAST = {"force", "outputs", "checkpoints", "packs", "parts"}


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    """A folder that other users can enter, as pytest's own is not."""
    with tempfile.TemporaryDirectory(prefix="misuse-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def base(scratch: Path) -> Path:
    (scratch / "base").mkdir()
    make_base(scratch / "base")
    return scratch / "base"


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in FAST else pytest.mark.slow) for k in KINDS])
def test_every_situation_of_a_kind_holds(kind: str, base: Path, scratch: Path) -> None:
    tried = [s for s in SITUATIONS if s.kind == kind]
    assert {s.name: wrong for s in tried if (wrong := problem(s, base, scratch))} == {}


def test_situations_have_names_of_their_own() -> None:
    names = [(s.kind, s.name) for s in SITUATIONS]
    assert len(set(names)) == len(names) >= 150

"""Exports that can be talked to: a tiny one of a case, with a tokenizer beside it."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from arch_cases import Case
from tiny_tokenizer import add_tokenizer


@pytest.fixture(scope="session")
def talking(exported: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case | str], Path]:
    @functools.cache
    def make(which: Case | str) -> Path:
        folder = tmp_path_factory.mktemp("talking") / "export"
        shutil.copytree(exported(which), folder)
        add_tokenizer(folder)
        return folder

    return make


@pytest.fixture
def llama(talking: Callable[[Case | str], Path], tmp_path: Path) -> Path:
    """A copy of its own, for a test to change."""
    return Path(shutil.copytree(talking("llama"), tmp_path / "export"))

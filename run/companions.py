"""The files beside an export's weights that say how the model is used: its JSON settings and its templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmexport.plugins.regular import read_regular
from llmexport.run.errors import RunError

MOST = 1_000_000_000  # bytes; published tokenizers have a thirtieth of it


def read_bytes(path: Path) -> bytes | None:
    """The file's bytes, None if there is none. Raises RunError on one that cannot be read."""
    try:
        return read_regular(path, MOST)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from error


def read_text(path: Path) -> str | None:
    """The file's text, None if there is none. Raises RunError on one that cannot be read."""
    data = read_bytes(path)
    try:
        return None if data is None else data.decode()
    except UnicodeDecodeError as error:
        raise RunError(f"{path} is no text in UTF-8: is it damaged? copy it from the checkpoint again") from error


def read_json(path: Path) -> dict[str, Any]:
    """The file's object, an empty one if there is no file. Raises RunError on one that cannot be read."""
    text = read_text(path)
    if text is None:
        return {}
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is no JSON ({error}): copy it from the checkpoint again") from error
    if not isinstance(data, dict):
        raise RunError(f"{path} holds no JSON object: copy it from the checkpoint again")
    return data

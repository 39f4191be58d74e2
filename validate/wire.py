"""Messages between two processes: a line of JSON, and the arrays that it names as bytes behind it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import IO, Any

import numpy as np

Message = dict[str, Any]
Arrays = dict[str, np.ndarray]


def send(stream: IO[bytes], message: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
    """Writes a message and arrays of numpy's own types. Raises OSError, as where nobody reads any more."""
    held = {n: np.ascontiguousarray(a).reshape(a.shape) for n, a in (arrays or {}).items()}
    said = [[n, a.dtype.str, list(a.shape)] for n, a in held.items()]
    stream.write(json.dumps({**message, "arrays": said}).encode() + b"\n")
    for array in held.values():
        stream.write(array.reshape(-1).view(np.uint8).data)
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[Message, Arrays] | None:
    """The next message; None where the other side has ended, in the middle of one too."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        return None
    message = json.loads(line)
    arrays = Arrays()
    for name, dtype, shape in message.pop("arrays"):
        array = np.empty(shape, dtype)
        data = array.reshape(-1).view(np.uint8)
        # Of a pipe one read gives what there is.
        place = 0
        while place < len(data):
            count = stream.readinto(data[place:].data)  # type: ignore[attr-defined]
            if not count:
                return None
            place += count
        arrays[name] = array
    return message, arrays

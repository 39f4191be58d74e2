"""How the host starts a delta rule, as its plans say: by ctypes from tests/plugins/delta_rules.cpp."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from native import beside_emulated


@dataclass(frozen=True)
class Launch:
    grid: tuple[int, int, int]
    threads: int
    shared: int


@dataclass(frozen=True)
class Plan:
    chunked: bool
    width: int
    recurrence: Launch
    prepare: Launch
    scan: Launch


class Plans:
    """The plans of one of the two rules, `gated` or `kimi`, and its workspace in bytes; dtypes are 0 to 2."""

    def __init__(self, rule: str) -> None:
        library = beside_emulated("delta_rules.cpp")
        self._plan, self._workspace = (getattr(library, f"{rule}_{what}") for what in ("plan", "workspace"))
        self._workspace.restype = ctypes.c_int64

    def plan(self, sizes: tuple[int, ...], dtype: int, aligned: bool) -> Plan:
        out = (ctypes.c_int64 * 17)()
        self._plan((ctypes.c_int64 * len(sizes))(*sizes), dtype, ctypes.c_bool(aligned), out)
        launches = [Launch(tuple(out[i : i + 3]), *out[i + 3 : i + 5]) for i in (2, 7, 12)]
        return Plan(bool(out[0]), out[1], *launches)

    def workspace(self, sizes: tuple[int, ...], dtype: int) -> int:
        return int(self._workspace((ctypes.c_int64 * len(sizes))(*sizes), dtype))

"""The modules that a quantization_config speaks of."""

from __future__ import annotations

import re
from collections.abc import Iterable

from llmexport.export.errors import ExportError
from llmexport.export.values import show


class Modules:
    """Modules by what is said of them: patterns of compressed-tensors (`re:`) and of ModelOpt (`*`); names, whole or
    their beginnings or ends. Raises ExportError on a pattern that is none."""

    def __init__(self, said: Iterable[str]) -> None:
        patterns, names = [], set()
        for one in said:
            if one.startswith("re:"):
                patterns.append(_compiled(one))
            elif "*" in one:
                patterns.append(re.compile(".*".join(map(re.escape, one.split("*"))) + r"\Z"))
            else:
                names.add(one)
        self._patterns, self._names = patterns, names

    def __contains__(self, module: str) -> bool:
        # There may be as many names as modules.
        cuts = [i for i, letter in enumerate(module) if letter == "."]
        parts = (module, *(module[:i] for i in cuts), *(module[i + 1 :] for i in cuts))
        return not self._names.isdisjoint(parts) or any(p.match(module) for p in self._patterns)


def _compiled(said: str) -> re.Pattern[str]:
    try:
        return re.compile(said.removeprefix("re:"))
    except re.error as error:
        raise ExportError(f"config.json: {show(said)} is no regular expression: {error}") from error

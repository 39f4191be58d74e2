"""Modules that a tool quantised otherwise than the rest of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from llmexport.export.packed.modules import Modules

PLAIN = 16  # so many bits and more are those of a module that is not quantised
REGULAR = re.compile(r"[^\w.-]")  # what no name of a module has


def exceptions(
    said: Mapping[str, Any], wrong: Callable[[str, str], Exception]
) -> Iterator[tuple[Modules, Mapping[str, Any]]]:
    """Modules, and what is said of them alone, the first that names one first: by GPTQModel, as regular expressions in
    `dynamic`, of which `-:` begins those of modules that are not quantised; by AutoRound, in `extra_config`.

    Raises what `wrong` makes of the key and of what is expected.
    """
    for key in ("dynamic", "extra_config"):
        found = said.get(key)
        if found is None:
            continue
        if not isinstance(found, Mapping) or not all(isinstance(own, Mapping) for own in found.values()):
            raise wrong(key, "modules, and what is said of each")
        alike: dict[str, tuple[list[str], Mapping[str, Any]]] = {}
        for name, said_of in found.items():
            bits = said_of.get("bits")
            own = {} if name.startswith("-:") or (isinstance(bits, int) and bits >= PLAIN) else said_of
            regular = key == "dynamic" or REGULAR.search(name)
            pattern = "re:" + name.removeprefix("+:").removeprefix("-:") if regular else name
            # There may be as many names as modules.
            alike.setdefault(name if regular else repr(own), ([], own))[0].append(pattern)
        yield from ((Modules(names), own) for names, own in alike.values())

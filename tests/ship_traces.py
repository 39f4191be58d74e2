"""Makes what a wheel brings along of traces: python tests/ship_traces.py [-o FILE] [MODEL ...]

Models of published_configs.py and the tiny one of each architecture, weights of zeros that take no space; each is
exported as KINDS say, in a cache of its own, so that every trace is made here. Prints how many there are, and bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from published_configs import PUBLISHED

from llmexport.export import archs, cache, onnx_file, random_checkpoint, shipped
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.spec import Arch
from llmexport.plugins.errors import UserError

KINDS = [{"dtype": dtype} for dtype in ("float32", "float16", "bfloat16")]
# A graph is stitched in less time than it would be read in.
WHOLE = ("graph",)


def models() -> dict[str, tuple[Arch, dict[str, Any]]]:
    """The architecture and the config of each."""
    known = [archs.load(name) for name in archs.names()]
    published = {name: (archs.choose(None, config), config) for name, config in PUBLISHED.items()}
    tiny = {f"tiny {a.name}": (a, dict(archs.tiny_config(a, "text"))) for a in known}
    seeing = [a for a in known if any(m.tower for m in a.multimodal)]
    return published | tiny | {f"tiny {a.name}, seeing": (a, dict(archs.tiny_config(a, "all"))) for a in seeing}


def traces(arch: Arch, config: dict[str, Any], work: Path) -> dict[str, bytes]:
    """What the exports of a model of this config trace."""
    found: dict[str, bytes] = {}
    cached = cache.cached

    def kept(kind: str, key: Any, make: Any) -> bytes:
        made = cached(kind, key, make)
        if kind not in WHOLE:
            found[shipped.name_of(kind, key)] = made
        return made

    random_checkpoint.write(arch, work / "in", config=config, hollow=True)
    checkpoint = open_checkpoint(work / "in")
    with mock.patch.object(cache, "cached", kept):
        for i, kind in enumerate(KINDS):
            onnx_file.write(onnx_file.Request(arch, checkpoint, **kind), work / f"out-{i}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("-o", "--output", type=Path, default=shipped.FILE)
    chosen = parser.parse_args()
    every = models()
    known: set[str] = set()
    members = {}
    with tempfile.TemporaryDirectory() as own, mock.patch.object(shipped, "FILE", Path(own) / "none"):
        (Path(own) / "cache").mkdir(mode=0o700)
        os.environ["LLMEXPORT_CACHE"] = str(Path(own) / "cache")
        for name in chosen.models or every:
            with tempfile.TemporaryDirectory() as work:
                try:
                    found = traces(*every[name], Path(work))
                except UserError as error:
                    print(f"{name}: left out: {error}", flush=True)
                    continue
            members[name] = {n: data for n, data in found.items() if n not in known}
            known |= found.keys()
            print(f"{name}: {len(members[name])} traces, {len(known)} in all", flush=True)
    shipped.write(chosen.output, {n: found for n, found in members.items() if found}, cache.source_digest())
    size = chosen.output.stat().st_size
    print(json.dumps({"models": len(members), "traces": len(known), "bytes": size}))


if __name__ == "__main__":
    main()

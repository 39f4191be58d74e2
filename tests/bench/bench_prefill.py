"""SinkAttention's prefill by mma.sync and by wgmma, in turns or not, on an SM 90, by window, tokens and head size: what
sm90aIsFaster() of plugins/sink_attention/prefill_sm90a.h chooses by.

    python tests/bench/bench_prefill.py [--out FILE] [--commit COMMIT]

Writes tests/bench/results/<gpu>_prefill.json, in microseconds. Exit code 2 without an SM 90; 1 where the kernel that is
taken by default is slower than the other by more than 5 %.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

RESULTS = Path(__file__).parent / "results"
HEADS = ((64, 8, 64), (32, 8, 128), (16, 8, 256), (8, 1, 256))  # H, G, D
WINDOWS, PROMPT = (128, 256, 512, 1024, 2048), 4096
# Window, tokens, keys.
SHAPES = [*((w, PROMPT, PROMPT) for w in WINDOWS), *((0, t, t) for t in (32, 64, 128, 256, 512, 1024, PROMPT))]
SHAPES += [(0, 128, 4096), (0, 128, 16384), (0, 512, 8192), (128, 512, 512)]
ASKED = {"mma.sync": "0", "wgmma": "1", "wgmma in turns": "pingpong", "default": ""}
SLACK = 1.05


def row(library: Any, heads: tuple[int, int, int], shape: tuple[int, int, int]) -> dict[str, Any]:
    from attention_cases import AttentionCase, Layer
    from bench_ops import ours
    from gpu_clock import seconds_each, sets_for

    (H, G, D), (window, tokens, keys) = heads, shape
    case = AttentionCase(Layer("", H, G, D, window=window, sinks=True), 1, tokens, keys)
    sets = [case.inputs() for _ in range(sets_for(case.bytes))]
    found: dict[str, Any] = {"H": H, "G": G, "D": D, "window": window, "T": tokens, "S": keys}
    for name, said in ASKED.items():
        os.environ["LLMEXPORT_SM90A"] = said
        found[name] = 1e6 * seconds_each([ours(library, case, inputs, case.outputs(inputs)) for inputs in sets])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the file of the results")
    parser.add_argument("--commit", help="of these sources, where they are no checkout; also $LLMEXPORT_COMMIT")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        print("no GPU of compute capability 9.0: the two are timed on such a one only", file=sys.stderr)
        return 2

    from report import commit

    from llmexport.plugins import library
    from llmexport.plugins.host import Library

    gpu = torch.cuda.get_device_name()
    built = Library(library.build(["90"], RESULTS.parents[2] / "build" / "bench"))
    rows: list[dict[str, Any]] = []
    run = {
        "gpu": gpu,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(arguments.commit),
        "kernels": library._builds().name,
        "rows": rows,
    }
    out = arguments.out or RESULTS / f"{gpu.lower().replace(' ', '-')}_prefill.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    for heads, shape in itertools.product(HEADS, SHAPES):
        rows.append(row(built, heads, shape))
        print(" ".join(f"{k} {v:.1f} us" if k in ASKED else f"{k} {v:<5}" for k, v in rows[-1].items()), flush=True)
        # After each, as bench_ops.py does: a run that is cut off keeps its rows.
        out.write_text(json.dumps(run, indent=1) + "\n")
    slow = [r for r in rows if r["default"] > SLACK * min(r["mma.sync"], r["wgmma"])]
    for r in slow:
        print(f"the default is the slower one: {r}")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())

"""Engines of whole published sizes with their weights beside the plan: what does building one take on a CPU?

    python tests/bench/bench_engine.py [--work DIR] [--library FILE] [--json FILE] [NAME ...]

The checkpoint is files of holes, exported in bf16; TensorRT-RTX builds the engine of the whole model, every op of ours
a plugin layer. The plugin library is FILE, or the one whose kernels are compiled for the CPU emulator: the builder asks
plugins for shapes and formats alone, and runs none. peak_rss_mb, cpu_s and wall_s are of the builder's process;
`load_average` says whether others were running. Exit code 1: an engine is over a limit. The results keep their rows of
what was not run this time.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench_families import TESTS, WIDTH, checkpoint, done, published
from checkpoints import CHECKPOINTS, config
from report import commit, machine

RESULTS = Path(__file__).parent / "results" / "engine_cpu.json"
LIMITS = {"wall_s": 180.0, "peak_rss_mb": 1500.0, "plan_mb": 100.0}


def emulated() -> Path:
    sys.path.insert(0, str(TESTS))
    from native import emulated_library

    return emulated_library()


# A process of its own, as a process knows the peak of all its children alone.
BUILD = """
import json, resource, sys
from pathlib import Path
from llmexport.export import engine
built = engine.build(Path(sys.argv[1]), plugins=Path(sys.argv[2]), weights="beside")
used = resource.getrusage(resource.RUSAGE_CHILDREN)
[plan] = built.graphs.values()
print(json.dumps({
    "wall_s": plan.seconds,
    "cpu_s": used.ru_utime + used.ru_stime,
    "peak_rss_mb": used.ru_maxrss / 1024,
    "plan_mb": plan.bytes / 2**20,
    "inputs": len(plan.bindings),
    "as_stored": sum(b.as_stored for b in plan.bindings.values()),
    "plugin_layers": dict(plan.plugins),
    "version": built.version,
}))
"""


def build(work: Path, name: str, library: Path) -> dict[str, Any]:
    """The engine of one model: what it is, and what building it took."""
    described = config(CHECKPOINTS[name]) if name in CHECKPOINTS else published(name)
    source = checkpoint(work, described, "--hollow")
    held = sum(p.stat().st_size for p in source.iterdir())
    done("onnx", "--checkpoint", source, "--part=text", "--dtype", "bfloat16", "-o", work / "out", log=work / "log")
    load = os.getloadavg()[0]
    command = [sys.executable, "-c", BUILD, str(work / "out"), str(library)]
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found = {k: round(v, 1) if isinstance(v, float) else v for k, v in json.loads(told).items()}
    passed = all(found[n] <= limit for n, limit in LIMITS.items())
    return {"weights_gb": round(held / 1e9, 1), **found, "load_average": round(load, 1), "passed": passed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--work", type=Path, help="where the exports lie meanwhile: some MB")
    parser.add_argument("--library", type=Path, help="the plugin library")
    parser.add_argument("--json", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    kept = json.loads(chosen.json.read_text())["engines"] if chosen.json.exists() else []
    rows = {r["model"]: r for r in kept}
    for name in chosen.names or [*WIDTH, "llama-70b"]:
        library = "given" if chosen.library else "emulated"
        work = Path(tempfile.mkdtemp(dir=chosen.work))
        try:
            found = build(work, name, chosen.library or emulated())
        finally:
            shutil.rmtree(work)
        when = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "commit": commit()}
        rows[name] = {"model": name, "library": library, **found, **when}
        print(json.dumps(rows[name]), flush=True)
        record = {**machine(), "limits": LIMITS, "engines": list(rows.values())}
        chosen.json.write_text(json.dumps(record, indent=1) + "\n")
    raise SystemExit(0 if all(r["passed"] for r in rows.values()) else 1)


if __name__ == "__main__":
    main()

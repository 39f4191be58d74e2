"""The families at their published sizes: does one layer of every kind match, and what does a whole export cost?

    python tests/bench/bench_families.py [--work DIR] [--only width|engine|hollow] [--json FILE] [NAME ...]

width: random bf16 weights of one layer of every kind at the published dimensions (a vocabulary of 1,024), exported
with fp32 compute; the ladder of `llmexport validate` in a process of its own, which is what `peak_rss_mb` is of.
engine: the same layers in bf16 as a TensorRT-RTX engine, every op of ours a layer of the plugin library (`llmexport
plugins build`); `peak_rss_mb` is of the builder.
hollow: the whole published size as files of holes, exported as `llmexport onnx` does. Exit code 1: a rung failed, an
op became no plugin layer, or an export took 30 s or 1 GB. FILE keeps its rows of what was not run this time.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from exporters import MB, new_bytes
from report import commit, machine

from llmexport.plugins import library

TESTS = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "families_cpu.json"
LIMIT_S, LIMIT_MB = 30.0, 1000.0
# Published config -> what is changed for each model of one layer of a kind.
WIDTH: dict[str, dict[str, dict[str, Any]]] = {
    "gemma-2b": {"layer": {"num_hidden_layers": 1}},
    "GLM-4-9B-0414": {"layer": {"num_hidden_layers": 1}},
    "gpt-oss-20b": {"mxfp4": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}},
    "Llama-4-Scout-17B-16E": {
        "chunked": {"num_hidden_layers": 1, "no_rope_layers": [1]},
        "full": {"num_hidden_layers": 1, "no_rope_layers": [0]},
        "dense": {"num_hidden_layers": 1, "no_rope_layers": [1], "moe_layers": []},
    },
    "Qwen3.5-35B-A3B": {
        "both": {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
    },
}
WIDTH["gpt-oss-20b"]["bf16"] = {**WIDTH["gpt-oss-20b"]["mxfp4"], "quantization_config": None}


def published(name: str) -> dict[str, Any]:
    sys.path.insert(0, str(TESTS))
    from published_configs import PUBLISHED

    return PUBLISHED[name]


def changed(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The text model's config with these changes, and a small vocabulary."""
    text = {**config.get("text_config", config), "vocab_size": 1024, "pad_token_id": 0, **changes}
    text = {k: v for k, v in text.items() if v is not None}
    return {**config, "text_config": text} if "text_config" in config else text


def run(*arguments: str | Path, log: Path) -> tuple[int, float, float]:
    """llmexport with these arguments: exit code, seconds and peak MB."""
    command = [str(Path(sys.executable).with_name("llmexport")), *map(str, arguments)]
    start = time.perf_counter()
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, round(time.perf_counter() - start, 1), round(usage.ru_maxrss * 1024 / MB, 1)


def done(*arguments: str | Path, log: Path) -> tuple[float, float]:
    """What run() took. Ends this program with what llmexport said, if that failed."""
    code, seconds, peak = run(*arguments, log=log)
    if code:
        raise SystemExit(log.read_text())
    return seconds, peak


def checkpoint(work: Path, config: dict[str, Any], *flags: str) -> Path:
    (work / "config.json").write_text(json.dumps(config))
    done("checkpoint", "--config", work / "config.json", "-o", work / "in", *flags, log=work / "log")
    return work / "in"


def width(work: Path, name: str, kind: str) -> dict[str, Any]:
    """One model of one or two layers: the ladder's rungs and what they took."""
    source = checkpoint(work, changed(published(name), WIDTH[name][kind]))
    held = sum(p.stat().st_size for p in source.iterdir())
    export_s, _ = done("onnx", "--checkpoint", source, "-o", work / "out", log=work / "log")
    code, seconds, peak = run("validate", work / "out", "--tokens", "19", log=work / "log")
    if not (work / "out" / "report.json").exists():
        raise SystemExit((work / "log").read_text())
    rungs = json.loads((work / "out" / "report.json").read_text())["rungs"]
    return {
        "weights_mb": round(held / MB, 1),
        "export_s": export_s,
        "validate_s": seconds,
        "peak_rss_mb": peak,
        "passed": code == 0,
        "rungs": {r["name"]: {"status": r["status"], **numbers(r["difference"])} for r in rungs},
    }


def numbers(difference: dict[str, Any] | None) -> dict[str, Any]:
    return {k: difference[k] for k in ("max_abs", "rms_ratio")} if difference else {}


def engine(work: Path, name: str, kind: str) -> dict[str, Any]:
    """An engine of one model of one or two layers: what it holds, and what its building took."""
    if not library.find():
        raise SystemExit("no plugin library: llmexport plugins build")
    source = checkpoint(work, changed(published(name), WIDTH[name][kind]))
    done("onnx", "--checkpoint", source, "--dtype", "bfloat16", "-o", work / "out", log=work / "log")
    seconds, peak = done("engine", work / "out", log=work / "log")
    ops = json.loads((work / "out" / "manifest.json").read_text())["graphs"]["model"]["ops"]
    built = json.loads((work / "out" / "engine.json").read_text())
    plan = built["graphs"]["model"]
    plugin_layers = plan["plugins"]
    return {
        "engine_mb": round(plan["bytes"] / MB, 1),
        "engine_s": seconds,
        "peak_rss_mb": peak,
        "passed": plugin_layers == ops and plan["layers"]["PLUGIN_V3"] == sum(ops.values()),
        "plugin_layers": plugin_layers,
    }


def hollow(work: Path, name: str, kind: str) -> dict[str, Any]:
    """The whole model, its weights holes: the cost of the first export and of the next."""
    source = checkpoint(work, published(name), "--hollow")
    held = sum(p.stat().st_size for p in source.iterdir())
    costs = {}
    for which in ("first", "again"):
        flags = ("--force",) if which == "again" else ()
        seconds, peak = done("onnx", "--checkpoint", source, "-o", work / "out", *flags, log=work / "log")
        costs[which] = {"wall_s": seconds, "peak_rss_mb": peak}
    passed = all(c["wall_s"] < LIMIT_S and c["peak_rss_mb"] < LIMIT_MB for c in costs.values())
    added = round(new_bytes(work / "out", source) / MB, 2)
    return {"weights_gb": round(held / 1e9, 1), **costs, "new_mb": added, "passed": passed}


SECTIONS = {"width": width, "engine": engine, "hollow": hollow}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--work", type=Path, help="where the checkpoints lie meanwhile: up to 10 GB")
    parser.add_argument("--only", choices=SECTIONS)
    parser.add_argument("--json", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    names = chosen.names or list(WIDTH)
    kept = json.loads(chosen.json.read_text()) if chosen.json.exists() else {}
    rows = {s: {(r["model"], r["layers"]): r for r in kept.get(s, ())} for s in SECTIONS}
    passed = True
    for section in [chosen.only] if chosen.only else ["engine", "width", "hollow"]:
        for name, kind in [(n, k) for n in names for k in (["all"] if section == "hollow" else WIDTH[n])]:
            work = Path(tempfile.mkdtemp(dir=chosen.work))
            if section != "engine":
                # No trace may lie there already.
                os.environ["LLMEXPORT_CACHE"] = str(work / "cache")
            try:
                found = SECTIONS[section](work, name, kind)
            finally:
                shutil.rmtree(work)
            when = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "commit": commit()}
            rows[section][name, kind] = {"model": name, "layers": kind, **found, **when}
            print(json.dumps(rows[section][name, kind]), flush=True)
            passed &= found["passed"]
            record = {**machine(), **{s: list(r.values()) for s, r in rows.items()}}
            chosen.json.write_text(json.dumps(record, indent=1) + "\n")
    raise SystemExit(0 if passed else 1)


if __name__ == "__main__":
    main()

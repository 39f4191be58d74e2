"""The vision towers at their published sizes: do their features match transformers, and what does all of it cost?

    python tests/bench/bench_vision.py [--work DIR] [--only image|sixteen|hollow|engine] [--layers N] [--calls N]
                                       [--threads N] [--json FILE] [NAME ...]

NAME is a part of the name of a published config, as `qwen` or `scout`.
image: random bf16 weights of the tower alone, exported with fp32 compute; the features of a picture of SIDE x SIDE (of
packed patches: of FOUR of them too) by our PyTorch and ONNX Runtime, there of the portable graph and of that of
`--target onnxruntime`, against those of transformers, each runner in a process of its own, which is what `peak_rss_mb`
is of. `ops` are the shares of ONNX Runtime's time.
sixteen: the same in fp16 and bf16 by our PyTorch, against transformers in fp32, beside transformers in that dtype.
hollow: the whole published checkpoint as files of holes; what exporting all of it costs, its text and its vision, each
with nothing cached. engine: the vision graph of that in bf16 as TensorRT-RTX takes it, the weights beside the plan, as
bench_engine.py builds it.
--layers N cuts the tower for a try. Exit code 1: features differ by more than validate/tolerance.py allows, or a limit
is passed. FILE keeps its rows of what was not run this time, and has none of a try.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from bench_engine import BUILD, LIMITS, emulated
from bench_families import LIMIT_MB, LIMIT_S, TESTS, checkpoint, done
from exporters import MB, new_bytes
from report import commit, machine

from llmexport.validate.compare import Difference, compare
from llmexport.validate.tolerance import TOLERANCE

TARGET = ("--dtype", "float32", "--target", "onnxruntime")
HERE = Path(__file__).parent
RESULTS = HERE / "results" / "vision_cpu.json"
MODELS = (
    "Qwen/Qwen3.6-35B-A3B",
    "Qwen/Qwen3.5-27B",
    "meta-llama/Llama-4-Scout-17B-16E-Instruct",
    "google/gemma-3-27b-it",
)
SIDE, FOUR = 448, 4
MEMORY_MB = 24 * 2**30 / MB


def published(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((TESTS / "published_models.json").read_bytes())[name]
    return found


def cut(config: dict[str, Any], layers: int | None) -> dict[str, Any]:
    """The same with so many layers in the tower."""
    vision = config["vision_config"]
    depth = next(k for k in ("depth", "num_hidden_layers") if k in vision)
    return {**config, "vision_config": {**vision, depth: layers or vision[depth]}}


def packed(config: dict[str, Any]) -> bool:
    return "temporal_patch_size" in config["vision_config"]


def pictures(config: dict[str, Any], count: int) -> dict[str, np.ndarray]:
    """What the processor makes of so many pictures of SIDE x SIDE, but for the colours, which are drawn.

    Patches of packed pictures are a picture's frames after each other, of which a still one has as many as one patch.
    A picture that is larger than a tile is cut into the fewest that hold it, and one more shows the whole.
    """
    vision, random = config["vision_config"], np.random.default_rng(0)
    if packed(config):
        side = SIDE // vision["patch_size"]
        numbers = vision.get("in_channels", 3) * vision["temporal_patch_size"] * vision["patch_size"] ** 2
        pixels = random.uniform(-1, 1, (count * side**2, numbers))
        return {"pixel_values": pixels.astype(np.float32), "grid_thw": np.array([[1, side, side]] * count)}
    size = vision["image_size"]
    # Gemma 3 resizes every picture to its one size.
    tiles = (-(-SIDE // size)) ** 2 if config["model_type"] == "llama4" else 1
    shape = (count * (tiles + (tiles > 1)), vision.get("num_channels", 3), size, size)
    return {"pixel_values": random.uniform(-1, 1, shape).astype(np.float32)}


def seen(runner: str, source: Path, out: Path, feed: dict[str, np.ndarray], chosen: Any) -> tuple[np.ndarray, Any]:
    """The features by one runner, and what they took."""
    work = out.parent
    given, made = work / "pictures.npz", work / "features.npy"
    np.savez(given, **feed)
    command = [sys.executable, HERE / "vision_runs.py", runner, source, out, given, made]
    command += ["--calls", str(chosen.calls), "--threads", str(chosen.threads)]
    print(f"{runner}, {feed['pixel_values'].shape}", file=sys.stderr)
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=work).stdout
    return np.load(made), json.loads(told.splitlines()[-1])


def tower(work: Path, config: dict[str, Any], *dtypes: str) -> tuple[Path, dict[str, Path]]:
    """A random checkpoint of the tower alone, and its exports."""
    source = checkpoint(work, config, "--part", "vision")
    flags = ("--part", "vision", "--checkpoint", source)
    for dtype in dtypes:
        done("onnx", *flags, "--dtype", dtype, "-o", work / dtype, log=work / "log")
    return source, {dtype: work / dtype for dtype in dtypes}


def judged(found: dict[str, Any], differences: Iterable[tuple[Difference, Any]]) -> dict[str, Any]:
    right = all(d.excess(tolerance) <= 1 for d, tolerance in differences)
    return {**found, "passed": right and all(r["peak_rss_mb"] <= MEMORY_MB for r in found["runs"].values())}


def image(work: Path, config: dict[str, Any], chosen: Any, count: int) -> dict[str, Any]:
    source, exports = tower(work, config, "float32")
    feed = pictures(config, count)
    reference, took = seen("transformers", source, exports["float32"], feed, chosen)
    runs, differences = {"transformers": took}, []
    lowered = work / "lowered"
    done("onnx", "--part", "vision", "--checkpoint", source, *TARGET, "-o", lowered, log=work / "log")
    for name, runner, out in (
        ("PyTorch", "PyTorch", exports["float32"]),
        ("ONNX Runtime", "ONNX Runtime", exports["float32"]),
        ("ONNX Runtime, its target", "ONNX Runtime", lowered),
    ):
        features, took = seen(runner, source, out, feed, chosen)
        differences.append((compare(reference, features), TOLERANCE["float32"]))
        runs[name] = {**took, **numbers(differences[-1][0])}
    held = sum(p.stat().st_size for p in source.glob("*.safetensors"))
    told = {"pixels": list(feed["pixel_values"].shape), "features": list(reference.shape)}
    return judged({**told, "weights_mb": round(held / MB, 1), "threads": chosen.threads, "runs": runs}, differences)


def sixteen(work: Path, config: dict[str, Any], chosen: Any, count: int) -> dict[str, Any]:
    dtypes = ("float16", "bfloat16")
    source, exports = tower(work, config, "float32", *dtypes)
    feed = pictures(config, count)
    reference, _ = seen("transformers", source, exports["float32"], feed, chosen)
    runs, differences = {}, []
    for dtype in dtypes:
        for runner in ("transformers", "PyTorch"):
            features, took = seen(runner, source, exports[dtype], feed, chosen)
            difference = compare(reference, features)
            runs[f"{runner}, {dtype}"] = {**took, **numbers(difference)}
            if runner == "transformers":
                yardstick = difference
        differences.append((difference, TOLERANCE[dtype].widened(yardstick)))
    return judged({"threads": chosen.threads, "runs": runs}, differences)


def numbers(difference: Difference) -> dict[str, float]:
    found = asdict(difference)
    return {name: float(f"{found[name]:.2g}") for name in ("max_abs", "rms_ratio", "scale")}


def hollow(work: Path, config: dict[str, Any], chosen: Any, count: int) -> dict[str, Any]:
    source = checkpoint(work, config, "--hollow")
    held = sum(p.stat().st_size for p in source.iterdir())
    parts: dict[str, dict[str, Any]] = {}
    for part in ("all", "text", "vision"):
        out = work / part
        command = [str(Path(sys.executable).with_name("llmexport")), "onnx", "--checkpoint", str(source)]
        command += ["--part", part, "-o", str(out)]
        environment = {**os.environ, "LLMEXPORT_CACHE": str(work / f"cache-{part}")}
        with (work / "log").open("wb") as log:
            start = time.perf_counter()
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            _, status, used = os.wait4(process.pid, 0)
            wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit((work / "log").read_text())
        cost = {"wall_s": wall, "cpu_s": used.ru_utime + used.ru_stime, "peak_rss_mb": used.ru_maxrss * 1024 / MB}
        graphs = json.loads((out / "manifest.json").read_bytes())["graphs"]
        new = round(new_bytes(out, source) / MB, 2)
        parts[part] = {**{k: round(v, 1) for k, v in cost.items()}, "new_mb": new, "graphs": list(graphs)}
    passed = all(p["wall_s"] < LIMIT_S and p["peak_rss_mb"] < LIMIT_MB for p in parts.values())
    load = round(os.getloadavg()[0], 1)
    return {"weights_gb": round(held / 1e9, 1), "parts": parts, "load_average": load, "passed": passed}


def engine(work: Path, config: dict[str, Any], chosen: Any, count: int) -> dict[str, Any]:
    source = checkpoint(work, config, "--part", "vision", "--hollow")
    flags = ("--part", "vision", "--checkpoint", source, "--dtype", "bfloat16")
    done("onnx", *flags, "-o", work / "out", log=work / "log")
    load = round(os.getloadavg()[0], 1)
    command = [sys.executable, "-c", BUILD, str(work / "out"), str(emulated())]
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found = {k: round(v, 1) if isinstance(v, float) else v for k, v in json.loads(told).items()}
    return {**found, "load_average": load, "passed": all(found[n] <= limit for n, limit in LIMITS.items())}


SECTIONS = {"image": image, "sixteen": sixteen, "hollow": hollow, "engine": engine}


def counts(section: str, config: dict[str, Any]) -> tuple[int, ...]:
    """How many pictures there are in each row; tiles see nothing of each other, so that more of them add nothing."""
    return (1, FOUR) if section == "image" and packed(config) else (1,)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--work", type=Path, help="where the checkpoints lie meanwhile: up to 2 GB")
    parser.add_argument("--only", choices=SECTIONS)
    parser.add_argument("--layers", type=int, help="of the tower; default: all")
    parser.add_argument("--calls", type=int, default=3, help="of which the median is taken")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="default: the repository's results, if all layers run")
    chosen = parser.parse_args()
    names = [m for m in MODELS if not chosen.names or any(n.lower() in m.lower() for n in chosen.names)]
    if not names:
        parser.error(f"no model has {chosen.names[0]} in its name: choose of {', '.join(MODELS)}")
    results = chosen.json or (None if chosen.layers else RESULTS)
    kept = json.loads(results.read_bytes()) if results and results.exists() else {}
    rows = {s: {(r["model"], r["pictures"]): r for r in kept.get(s, ())} for s in SECTIONS}
    passed = True
    for section in [chosen.only] if chosen.only else SECTIONS:
        for name in names:
            config = cut(published(name), chosen.layers)
            for count in counts(section, config):
                work = Path(tempfile.mkdtemp(dir=chosen.work)).resolve()
                try:
                    found = SECTIONS[section](work, config, chosen, count)
                finally:
                    shutil.rmtree(work)
                when = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "commit": commit()}
                row = {"model": name, "pictures": count, **found, **when}
                print(json.dumps(row), flush=True)
                rows[section][name, count] = row
                passed &= found["passed"]
                if results:
                    record = {**machine(), **{s: list(r.values()) for s, r in rows.items()}}
                    results.write_text(json.dumps(record, indent=1) + "\n")
    raise SystemExit(0 if passed else 1)


if __name__ == "__main__":
    main()

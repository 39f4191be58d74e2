"""Models with experts on ONNX Runtime's CPU, in the portable form and for that target.

    python tests/bench/bench_experts.py [--rounds N] [--dtype DTYPE] [--json FILE] [MODEL ...]

Random weights of 0.3B to 1.3B, those of "8 of 64" in experts of the size of Qwen3.5-35B-A3B's, and in int4 of
Qwen3-30B-A3B's; int4 and fp8 are made by --quantize, MXFP4 is GPT-OSS' own. Both exports of a model are open in one
process and take turns: a prompt of 128 and of 512 tokens, then tokens behind each, and of four prompts at once. One
thread on one core, CPU time; what opening takes is a process of its own. Exit code 1 if the scores of the two differ by
more than CLOSE of their largest, or, of int4, if `validate` fails, which computes without rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from random_exports import validated
from report import commit, machine

from llmexport.export import archs, manifest, onnx_file
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.random_checkpoint import write
from llmexport.export.rounding import ROUNDINGS
from llmexport.run.session import RuntimeSession, decode

TARGETS = ("portable", "onnxruntime")
CASES = {"128 tokens": (1, 128), "512 tokens": (1, 512), "4 x 128 tokens": (4, 128)}
STEPS, CLOSE = 8, 1e-5
SHARED = {"vocab_size": 32_000, "hidden_size": 768, "max_position_embeddings": 4096, "num_attention_heads": 12}
SHARED |= {"num_key_value_heads": 4}
LINEAR: dict[str, Any] = {"linear_num_key_heads": 8, "linear_num_value_heads": 16, "linear_key_head_dim": 64}
ROPE = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_interleaved": True}
LINEAR |= {"linear_value_head_dim": 64, "head_dim": 64, "rope_parameters": ROPE | {"mrope_section": [4, 2, 2]}}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "2 of 8": ("mixtral", {"num_hidden_layers": 8, "intermediate_size": 1792, "num_local_experts": 8}),
    "4 of 32": (
        "gpt_oss",
        {
            "num_hidden_layers": 4,
            "intermediate_size": 768,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
            "head_dim": 64,
        },
    ),
    "8 of 64": (
        "qwen3_5_moe",
        {
            "num_hidden_layers": 4,
            "hidden_size": 2048,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            **LINEAR,
        },
    ),
}

SMALL = {"hidden_size": 768, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256, "num_experts": 256}
MODELS["8 of 256, small"] = ("qwen3_5_moe", MODELS["8 of 64"][1] | SMALL)
MODELS |= {f"{name}, {kind}": MODELS[name] for name in ("2 of 8", "4 of 32") for kind in ("int4", "fp8")}
# As published.
MODELS["4 of 32, mxfp4"] = ("gpt_oss", MODELS["4 of 32"][1] | {"quantization_config": {"quant_method": "mxfp4"}})
MODELS["8 of 64, int4"] = (
    "qwen3_moe",
    {
        "num_hidden_layers": 4,
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_local_experts": 64,
        "mlp_only_layers": [],
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "head_dim": 128,
        "num_attention_heads": 32,
    },
)


def opened(folder: Path) -> dict[str, float]:
    """In a process of its own: CPU seconds, and the most memory and what stays of it that no file backs, in MB."""
    done = subprocess.run([sys.executable, __file__, "--open", str(folder)], check=True, stdout=subprocess.PIPE)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def open_here(folder: Path) -> None:
    start = time.process_time()
    session = RuntimeSession(manifest.read(folder), threads=1)
    taken = time.process_time() - start
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    sizes = {n: int(status[key].split()[0]) / 1024 for n, key in (("anonymous_mb", "RssAnon"), ("peak_mb", "VmHWM"))}
    print(json.dumps({"cpu_s": taken, **sizes}))
    del session


def exported(
    work: Path, arch: str, changes: dict[str, Any], dtype: str, quantize: str | None = None
) -> dict[str, Path]:
    own = archs.load(arch)
    config = {**own.tiny, **SHARED, **changes, "model_type": own.model_types[0]}
    write(own, work / "in", config=config, dtype=dtype)
    for target in TARGETS:
        request = onnx_file.Request(own, open_checkpoint(work / "in"), target=target, quantize=quantize)
        onnx_file.write(request, work / target)
    return {target: work / target for target in TARGETS}


def timed(folders: dict[str, Path], rounds: int) -> tuple[float, dict[str, dict[str, Any]]]:
    """How far the scores of a prompt are apart; and by case and target the least and the median milliseconds."""
    sessions = {n: RuntimeSession(manifest.read(f), threads=1) for n, f in folders.items()}
    apart, found = 0.0, dict[str, dict[str, Any]]()
    for case, (rows, tokens) in CASES.items():
        ids = np.random.default_rng(tokens).integers(0, 32_000, (rows, tokens))
        taken: dict[str, dict[str, list[float]]] = {n: {"prompt": [], "token": []} for n in sessions}
        for _ in range(rounds):
            scores: dict[str, np.ndarray] = {}
            for name, session in sessions.items():
                seen: list[np.ndarray] = []

                def choose(given: np.ndarray, before: np.ndarray, seen: list[np.ndarray] = seen) -> np.ndarray:
                    seen.append(given)
                    return np.full(len(given), before.shape[1] * 7 + 3)

                steps, starts = decode(session, ids, choose), []
                for _ in range(STEPS + 1):
                    starts.append(time.process_time())
                    next(steps)
                ends = [*starts[1:], time.process_time()]
                first, *others = [(end - start) * 1e3 for start, end in zip(starts, ends, strict=True)]
                taken[name]["prompt"].append(first)
                taken[name]["token"] += others
                scores[name] = seen[-1]
            mine, theirs = (scores[n] for n in TARGETS)
            apart = max(apart, float(np.abs(mine - theirs).max() / np.abs(mine).max()))
        found[case] = {
            n: {what: {"least": min(ms), "median": median(ms)} for what, ms in by.items()} for n, by in taken.items()
        }
    return apart, found


def is_right(found: dict[str, Any]) -> bool:
    """Of int4 the scores in both are those of inputs that MatMulNBits rounds to 8 bits."""
    if "validated" in found:
        return bool(found["validated"]["status"] == "pass")
    return bool(found["apart"] <= CLOSE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", help="of the checkpoint; graphs compute in float32")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if given.open:
        open_here(given.open)
        return 0
    results: dict[str, Any] = {}
    for model in given.models:
        with tempfile.TemporaryDirectory() as work:
            quantize = next((kind for kind in ROUNDINGS if model.endswith(f", {kind}")), None)
            folders = exported(Path(work), *MODELS[model], given.dtype, quantize)
            memory = {n: opened(f) for n, f in folders.items()}
            apart, cases = timed(folders, given.rounds)
            results[model] = {"apart": apart, "opened": memory, "ms": cases}
            if quantize == "int4":
                results[model]["validated"] = validated(Path(work), folders["onnxruntime"])
        print(f"{model}: scores apart by {apart:.1e} of the largest; opened {json.dumps(memory)}")
        for case, by in cases.items():
            for what in ("prompt", "token"):
                mine, theirs = (by[n][what] for n in TARGETS)
                ratios = " / ".join(f"{mine[k] / theirs[k]:.2f}" for k in ("least", "median"))
                print(f"  {case}, {what}: {mine['least']:.1f} and {theirs['least']:.1f} ms, {ratios}", flush=True)
    if given.json:
        head = {"commit": commit(), "machine": machine(), "dtype": given.dtype}
        given.json.write_text(json.dumps(head | {"models": results}, indent=1) + "\n")
    return 0 if all(is_right(r) for r in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

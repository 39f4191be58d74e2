"""CPU time of every decoder's export on ONNX Runtime beside eager transformers: which one is slow for what it does.

    python tests/bench/bench_decoders.py [--work DIR] [--json FILE] [ARCH ...]

The architectures' tiny configs, WIDER times as wide and with windows of WINDOW tokens, random fp32 weights, one thread
on one core. Ours are exported with `--target onnxruntime --logits last`, once with a cache that grows and once with a
static one of SLOTS. Processes live side by side and take turns step by step; a job's time is the least of its steps.
Weights are small here, so that nodes, attention and caches count for more than in bench_runtime.py, which has peers
that export. With ARCH the rows of others in FILE stay. Exit code 1: a job takes the faster one of ours more CPU time
than transformers.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench_runtime import EXPORTERS, SLOTS, Child, earlier, in_turns
from exporters import export
from random_exports import checkpoint
from report import commit, machine

from llmexport.export import archs

RESULTS = Path(__file__).parent / "results" / "decoders_cpu.json"
# A window is no longer than what transformers computes of a past, see runtime_child.py.
WIDER, WINDOW, VOCABULARY, POSITIONS, LIMIT = 8, 128, 30_500, 8192, 1.0
WIDTHS = {"hidden_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "head_dim"}
WIDTHS |= {"intermediate_size_mlp", "kv_channels", "ffn_hidden_size", "inner_hidden_size", "n_embd", "model_dim"}
WIDTHS |= {"ffn_dim", "word_embed_proj_dim", "attention_hidden_size", "q_lora_rank", "kv_lora_rank", "v_head_dim"}
WIDTHS |= {"qk_nope_head_dim", "qk_rope_head_dim", "linear_key_head_dim", "linear_value_head_dim", "mrope_section"}
WIDTHS |= {f"{what}_low_rank_dim" for what in ("decay", "a", "v", "gate")}
WINDOWS = {"sliding_window", "attention_chunk_size", "window_size"}
LENGTHS = {"max_position_embeddings", "n_positions", "model_max_length", "seq_length", "max_sequence_length"}
LENGTHS |= {"context_length", "rope_max_length", "max_context_length"}
VOCABULARIES = {"vocab_size", "padded_vocab_size"}
NO_DECODERS = {"bert", "deberta", "deberta_v2", "t5"}
KINDS = {"grows": ("file", "llmexport"), "static": ("shared", "llmexport static"), "transformers": ("transformers", "")}
JOBS: dict[str, dict[str, int]] = {
    "a token behind 128": {"batch": 1, "past": 128, "tokens": 1, "steps": 12},
    "of 4 rows": {"batch": 4, "past": 128, "tokens": 1, "steps": 8},
    "behind 4000": {"batch": 1, "past": 4000, "tokens": 1, "steps": 8},
    "a prompt of 512": {"batch": 1, "past": 0, "tokens": 512, "steps": 2},
    "of 2048, in 4": {"batch": 1, "past": 0, "tokens": 2048, "steps": 1, "pieces": 4},
    "of 2048": {"batch": 1, "past": 0, "tokens": 2048, "steps": 1},
}


def wide(config: dict[str, Any]) -> dict[str, Any]:
    """A tiny config, wider, for longer texts and more words."""
    made: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            made[key] = wide(value)
        elif key in WIDTHS and value is not None:
            made[key] = [n * WIDER for n in value] if isinstance(value, list) else value * WIDER
        elif key in WINDOWS and value is not None:
            made[key] = WINDOW
        elif key in LENGTHS:
            made[key] = POSITIONS
        else:
            made[key] = VOCABULARY if key in VOCABULARIES else value
    return made


def measured(arch: str, work: Path) -> dict[str, Any]:
    named = archs.load(arch)
    source = checkpoint(work, {"model_type": named.model_types[0], **wide(named.tiny)}, "--dtype=float32")
    children, refused = dict[str, Child](), dict[str, str]()
    for name, (kind, exporter) in KINDS.items():
        folder = work / name if exporter else source
        try:
            if exporter:
                export(work, EXPORTERS[exporter], source, folder, work / "cache")
            children[name] = Child(kind, folder, sys.executable, work / f"{name}.log")
        except SystemExit as error:
            refused[name] = str(error).splitlines()[-2][:300]
    times: dict[str, dict[str, float]] = {}
    for job, what in JOBS.items():
        taken = in_turns(children, what, random.Random(0))
        times[job] = {name: round(1000 * min(its), 2) for name, its in taken.items()}
    for name, child in children.items():
        child.end()
        if child.refused:
            refused[name] = child.refused.replace(f"{work}/", "")
    for folder in (source, *(work / name for name in KINDS)):
        shutil.rmtree(folder, ignore_errors=True)
    return {"cpu_ms": times, "ours over transformers": {j: ratio(t) for j, t in times.items()}, "refused": refused}


def ratio(times: dict[str, float]) -> float | None:
    """The faster of ours over eager transformers; None where one of both is missing."""
    ours = [ms for name, ms in times.items() if name != "transformers"]
    return round(min(ours) / times["transformers"], 2) if ours and "transformers" in times else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archs", nargs="*", metavar="ARCH")
    parser.add_argument("--work", type=Path, help="where all of it lies meanwhile")
    parser.add_argument("--json", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    work = chosen.work or Path(tempfile.mkdtemp())
    work.mkdir(exist_ok=True)
    rows = earlier(chosen.json) if chosen.archs else {}
    told = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "commit": commit(), **machine()}
    for arch in chosen.archs or [n for n in archs.names() if n not in NO_DECODERS]:
        try:
            rows[arch] = {"model": arch, **measured(arch, work), **told}
        except subprocess.CalledProcessError:
            # What stopped it, `llmexport checkpoint` has said.
            print(f"{arch}: no checkpoint of it", file=sys.stderr)
            continue
        print(arch, json.dumps(rows[arch]["ours over transformers"]), flush=True)
        record = {"threads": 1, "slots": SLOTS, "wider": WIDER, "rows": [rows[n] for n in sorted(rows)]}
        chosen.json.write_text(json.dumps(record, indent=1) + "\n")
    if not chosen.work:
        shutil.rmtree(work)
    slow = {name: j for name, row in rows.items() for j, r in row["ours over transformers"].items() if r and r > LIMIT}
    raise SystemExit("\n".join(f"{name}: {job}" for name, job in slow.items()) or 0)


if __name__ == "__main__":
    main()

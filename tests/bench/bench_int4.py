"""A decoded token of int4 on ONNX Runtime's CPU beside onnxruntime-genai's int4: same model, groups, accuracy level.

    python tests/bench/bench_int4.py [--work DIR] [--rounds N] [--restarts N] [--json FILE] [MODEL ...]

Random weights, once with the head rounded too and once with it as it is. Both exports decode greedily behind 128
tokens: `file` is the model.onnx of each in one and the same loop on the ONNX Runtime here, `own` what each is run by:
`llmexport generate`'s session, with a growing cache and with a static one, and genai's Generator, whose cache is
static, of as many slots. One thread on one core; processes take turns, round by round, and
are started anew some times. All is timed once in pages of 4 KiB, as memory comes unless it is asked for otherwise, and
once in the huge pages that glibc then asks for: a process differs from the next one of the same file by up to a quarter
in the former, by less in the latter. Exit code 1: logits of ours that are not PyTorch's on the same weights, or a
`file` whose CPU time in small pages is above LIMIT times genai's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from decode_child import FREE, LEVEL, nodes
from exporters import GENAI, LLMEXPORT, Exporter, export, install, scripts, versions
from published_configs import PUBLISHED
from random_exports import checkpoint, validated
from report import commit, machine

RESULTS = Path(__file__).parent / "results" / "int4_cpu.json"
PAST, STEPS, GROUP, LIMIT = 128, 8, 128, 1.1
LLAMA_125M = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 2048,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
# By the pages that the memory of a process comes in, where the system gives huge ones to who asks (madvise).
# Each packed matrix would else be mapped apart, too small for one.
PAGES = {"small": {}, "huge": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0"}}
MODELS = {"llama-125m": LLAMA_125M, "qwen2-0.5b": PUBLISHED["Qwen2.5-0.5B-Instruct"]}
OURS = ("{bin}/llmexport", "onnx", "--checkpoint={checkpoint}", "-o", "{out}", "--quantize=int4")
OURS += ("--target=onnxruntime", f"--group-size={GROUP}")
THEIRS = ("{bin}/python", "-m", "onnxruntime_genai.models.builder", "-i", "{checkpoint}", "-o", "{out}")
THEIRS += ("-p", "int4", "-e", "cpu", "-c", "{scratch}", "--extra_options")
THEIRS += (f"block_size={GROUP}", f"accuracy_level={LEVEL}", "is_symmetric=true")
STATIC = ("--cache=static", f"--max-tokens={PAST + FREE}")
HEADS: dict[str, tuple[Exporter, ...]] = {
    "int4": (
        Exporter("llmexport", (*OURS, "--quantize-head")),
        Exporter("static", (*OURS, "--quantize-head", *STATIC)),
        Exporter("genai", THEIRS, GENAI),
    ),
    "as it is": (
        Exporter("llmexport", OURS),
        Exporter("static", (*OURS, *STATIC)),
        Exporter("genai", (*THEIRS, "nodes_to_exclude=/lm_head/MatMul"), GENAI),
    ),
}


class Child:
    """A process of decode_child.py, and what it has measured."""

    def __init__(self, pages: str, python: Path, kind: str, folder: Path) -> None:
        command = [str(python), str(Path(__file__).with_name("decode_child.py")), kind, str(folder), str(PAST)]
        pipe = subprocess.PIPE
        pipes = {"stdin": pipe, "stdout": pipe, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, text=True, env=os.environ | PAGES[pages], **pipes)
        self.opened: dict[str, float] = self._read()
        self.taken: list[tuple[float, float]] = []

    def _read(self) -> Any:
        assert self._process.stdout
        return json.loads(self._process.stdout.readline())

    def decode(self) -> None:
        assert self._process.stdin
        self._process.stdin.write(f"{STEPS}\n")
        self._process.stdin.flush()
        self.taken += self._read()

    def end(self) -> None:
        self._process.communicate()


def timed(
    commands: dict[str, tuple[Path, str, Path]], pages: str, rounds: int, restarts: int
) -> dict[str, dict[str, Any]]:
    """Milliseconds of a token, of CPU and by the clock: the least, and the median of the processes' medians."""
    processes: dict[str, list[Child]] = {name: [] for name in commands}
    for _ in range(restarts):
        running = {name: Child(pages, *command) for name, command in commands.items()}
        for i in range(rounds):
            # Nobody always follows the same one.
            for name in [*running][i % len(running) :] + [*running][: i % len(running)]:
                running[name].decode()
        for name, child in running.items():
            child.end()
            processes[name].append(child)
    return {name: summary(children) for name, children in processes.items()}


def summary(children: list[Child]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for i, clock in enumerate(("cpu_ms", "wall_ms")):
        every = [[1000 * t[i] for t in c.taken] for c in children]
        found[clock] = {"min": round(min(map(min, every)), 3), "median": round(median(map(median, every)), 3)}
    found["open_cpu_s"] = round(min(c.opened["open_cpu_s"] for c in children), 2)
    found["peak_rss_mb"] = round(max(c.opened["peak_rss_kb"] for c in children) * 1024 / 1e6)
    return found


def ratios(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Ours over genai's."""
    pairs = {"file": ("llmexport file", "genai file")}
    pairs |= {"own": ("llmexport own", "genai own"), "own, static": ("static own", "genai own")}
    kinds = [(clock, of) for clock in ("cpu_ms", "wall_ms") for of in ("min", "median")]
    return {
        what: {f"{clock} {of}": round(found[a][clock][of] / found[b][clock][of], 3) for clock, of in kinds}
        for what, (a, b) in pairs.items()
    }


def row(name: str, head: str, source: Path, work: Path, rounds: int, restarts: int) -> dict[str, Any]:
    found: dict[str, Any] = {"model": name, "head": head}
    commands, python = {}, Path(sys.executable)
    config = MODELS[name]
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    sizes = {"num_key_value_heads": config["num_key_value_heads"], "head_dim": size}
    (work / "sizes.json").write_text(json.dumps(sizes))
    for exporter in HEADS[head]:
        out = work / exporter.name
        export(work, exporter, source, out, work / "cache")
        ours = exporter.name != "genai"
        if ours:
            found[f"{exporter.name} validated"] = validated(work, out)
        found[f"{exporter.name} nodes"] = nodes(out)
        if exporter.name != "static":
            commands[f"{exporter.name} file"] = (python, "file", out)
        commands[f"{exporter.name} own"] = (scripts(work, exporter) / "python", "llmexport" if ours else "genai", out)
    found["timed"] = {pages: timed(commands, pages, rounds, restarts) for pages in PAGES}
    found["ours over genai's"] = {pages: ratios(taken) for pages, taken in found["timed"].items()}
    met = found["ours over genai's"]["small"]["file"]["cpu_ms min"] <= LIMIT
    right = all(found[f"{name} validated"]["status"] == "pass" for name in ("llmexport", "static"))
    return {**found, "passed": met and right}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--work", type=Path, help="where all of it lies meanwhile; an environment there is used again")
    parser.add_argument("--rounds", type=int, default=10, help=f"of {STEPS} tokens each")
    parser.add_argument("--restarts", type=int, default=5)
    parser.add_argument("--json", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    work = chosen.work or Path(tempfile.mkdtemp())
    theirs = HEADS["int4"][-1]
    install(work, theirs)
    rows: list[dict[str, Any]] = []
    record: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        **machine(),
        "versions": {"here": versions(work, LLMEXPORT), "genai": versions(work, theirs)},
        "huge_pages": Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().strip(),
        "past": PAST,
        "group_size": GROUP,
        "accuracy_level": LEVEL,
        "threads": 1,
        "batch": 1,
        "rounds": chosen.rounds,
        "tokens_a_round": STEPS,
        "restarts": chosen.restarts,
        "rows": rows,
    }
    for name in chosen.models or MODELS:
        source = checkpoint(work, MODELS[name])
        for head in HEADS:
            rows.append(row(name, head, source, work, chosen.rounds, chosen.restarts))
            print(json.dumps(rows[-1]), flush=True)
            if not chosen.models:
                chosen.json.write_text(json.dumps(record, indent=1) + "\n")
        shutil.rmtree(source)
    if not chosen.work:
        shutil.rmtree(work)
    raise SystemExit(0 if all(r["passed"] for r in rows) else 1)


if __name__ == "__main__":
    main()

"""CPU seconds of `onnx --target onnxruntime` on ONNX Runtime beside genai, mobius, optimum and eager transformers.

    python tests/bench/bench_runtime.py [--work DIR] [--restarts N] [--json FILE] [MODEL ...]

The small models of runtime_models.py, random fp32 weights, one thread on one core. Each exporter's file runs in one and
the same loop on the ONNX Runtime here, growing its keys and values or, where its attention takes that, with one buffer
of each; genai in its own loop as well. Processes live side by side and take turns step by step, in orders of chance, so
that what else the machine does meets all of them. What counts is the median over restarts of our median step to the
peer's; a peer that takes half as long again as the fastest in every job is started once. Two processes of one file
differed by up to a quarter, in most starts by no more than 6 % where memory was compacted before, as is done where one
may (root). Ours are exported with `--logits last`, as `llmexport generate` cuts them; transformers computes the last
token's logits alone, genai's, mobius' and optimum's files all of a prompt. What an exporter refuses is recorded with
its last line. With MODEL the rows of others in FILE stay; each has the commit and the versions that it was measured at.
Exit code 1: logits of ours that are not PyTorch's, or a job that takes us more CPU time than the fastest peer.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from exporters import PEERS, Exporter, export, install, scripts, versions
from random_exports import checkpoint, validated
from report import commit, machine
from runtime_models import MODELS

RESULTS = Path(__file__).parent / "results" / "runtime_cpu.json"
SLOTS = 4096 + 64
LIMIT = 1.0
NEAR = 1.5  # times as long as the fastest
COMPACT = Path("/proc/sys/vm/compact_memory")
OPTIMUM = ("optimum-onnx[onnxruntime]==0.1.0", "transformers==4.57.*")
ONNX = ("{bin}/llmexport", "onnx", "--checkpoint={checkpoint}", "-o", "{out}", "--target=onnxruntime", "--part=text")
ONNX += ("--logits=last", "--dtype=float32")
EXPORTERS = {
    "llmexport": Exporter("llmexport", ONNX),
    "llmexport static": Exporter("llmexport static", (*ONNX, "--cache=static", f"--max-tokens={SLOTS}")),
    **{peer.name: peer for peer in PEERS if peer.dtype == "float32"},
    "optimum": Exporter(
        "optimum",
        ("{bin}/optimum-cli", "export", "onnx", "--model", "{checkpoint}", "--task", "text-generation-with-past")
        + ("{out}",),
        OPTIMUM,
        constrained=False,
    ),
}
# How each is run: the kinds of runtime_child.py.
RUNS = {
    "llmexport": ("llmexport", "file"),
    "llmexport static": ("llmexport static", "shared"),
    "genai's file": ("genai", "file"),
    "genai's file, shared": ("genai", "shared"),
    "genai": ("genai", "genai"),
    "mobius": ("mobius", "file"),
    "optimum": ("optimum", "file"),
    "transformers": ("", "transformers"),
}
JOBS: dict[str, dict[str, int]] = {
    f"decode {past}, batch {batch}": {"batch": batch, "past": past, "tokens": 1, "steps": 12}
    for batch in (1, 4)
    for past in (128, 1024, 4096)
}
ONE = {"batch": 1, "past": 0}
JOBS |= {f"prefill {n}": ONE | {"tokens": n, "steps": 3 if n < 1000 else 1} for n in (128, 512)}
# As `llmexport generate` reads it. What a long prompt takes at once stays a process's own, so that it comes last.
JOBS |= {f"prefill 2048{how}": ONE | {"tokens": 2048, "steps": 1, "pieces": n} for n, how in ((4, ", in 4"), (1, ""))}
LAST = [*JOBS][-1]


class Child:
    """A process of runtime_child.py; `refused` is the last line of one that does not open or stops."""

    def __init__(self, kind: str, folder: Path, python: str, log: Path) -> None:
        command = [python, str(Path(__file__).with_name("runtime_child.py")), kind, str(folder)]
        command += [str(SLOTS)] if kind == "shared" else []
        pipe, self._log = subprocess.PIPE, log
        with log.open("w") as errors:
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True)
        self.refused = ""
        self.opened: dict[str, float] | None = self._read()

    def _read(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line and not self.refused:
            said = self._log.read_text().strip().splitlines()
            self.refused = said[-1][:300] if said else f"exit code {self._process.wait()}"
        return json.loads(line) if line else None

    def ask(self, job: dict[str, int] | None = None) -> Any:
        """Whether it can do this job; of none, the seconds of CPU of another step of the last one."""
        if self.refused:
            return None
        assert self._process.stdin
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return self._read()

    def end(self) -> None:
        assert self._process.stdin
        if not self.refused and not self._process.stdin.closed:
            self._process.communicate()


def opened(work: Path, made: dict[str, Path | str], source: Path, names: Iterable[str]) -> dict[str, Child]:
    """Those of these names that can be, in this order."""
    children = {}
    for name in names:
        exporter, kind = RUNS[name]
        folder = made[exporter] if exporter else source
        if isinstance(folder, Path):
            python = scripts(work, EXPORTERS["genai"]) / "python" if kind == "genai" else sys.executable
            children[name] = Child(kind, folder, str(python), work / f"{name}.log")
    return children


def timed(work: Path, made: dict[str, Path | str], source: Path, restarts: int) -> dict[str, Any]:
    """By job and by how it is run, the milliseconds of CPU of a step, the median of each restart; and what opening
    takes."""
    medians: dict[str, dict[str, list[float]]] = {job: {} for job in JOBS}
    opening: dict[str, list[dict[str, float]]] = {}
    refused: dict[str, str] = {}
    names = [*RUNS]
    for process in range(restarts):
        if os.access(COMPACT, os.W_OK):
            COMPACT.write_text("1")
        # Nobody is always the first to open, which gets what pages those before left, or always follows the same one.
        chance = random.Random(process)
        children = opened(work, made, source, chance.sample(names, len(names)))
        for job, what in JOBS.items():
            for name, taken in in_turns(children, what, chance).items():
                medians[job].setdefault(name, []).append(round(1000 * median(taken), 3))
        for name, child in children.items():
            child.end()
            if child.opened:
                opening.setdefault(name, []).append(child.opened)
            if child.refused:
                refused[name] = child.refused
        firsts = [{name: its[0] for name, its in by.items()} for by in medians.values()]
        near = {n for by in firsts for n, its in by.items() if its < NEAR * min(by.values()) or is_ours(n)}
        names = [name for name in names if name in near]
    least = {
        name: {
            "open_cpu_s": round(min(o["open_cpu_s"] for o in found), 2),
            "open_peak_rss_mb": round(min(o["peak_rss_kb"] for o in found) * 1024 / 1e6),
        }
        for name, found in opening.items()
    }
    return {"cpu_ms": medians, "opening": least, "refused": refused}


def is_ours(name: str) -> bool:
    return name.startswith("llmexport")


def in_turns(children: dict[str, Child], job: dict[str, int], chance: random.Random) -> dict[str, list[float]]:
    """The seconds of the steps of each one that makes them all; a prompt is begun anew each time."""
    able = [name for name, child in children.items() if child.ask(job)]
    taken: dict[str, list[float]] = {name: [] for name in able}
    for step in range(job["steps"]):
        for name in chance.sample(able, len(able)):
            child = children[name]
            if step and not job["past"]:
                child.ask(job)
            cpu = child.ask()
            taken[name] += [] if cpu is None else [cpu]
            if job is JOBS[LAST] and step == job["steps"] - 1:
                # What a long prompt took stays a process's own as long as it lives.
                child.end()
    return {name: its for name, its in taken.items() if len(its) == job["steps"]}


def ratio(medians: dict[str, list[float]]) -> float | None:
    """Ours over the fastest peer's: the median of the restarts, of those that were started each time."""
    most = max(map(len, medians.values()), default=0)
    every = {name: its for name, its in medians.items() if len(its) == most}
    fastest: dict[bool, list[float]] = {}
    for name, its in sorted(every.items(), key=lambda item: median(item[1])):
        fastest.setdefault(is_ours(name), its)
    if len(fastest) < 2:
        return None
    return round(median(ours / theirs for ours, theirs in zip(fastest[True], fastest[False], strict=True)), 3)


def row(name: str, work: Path, restarts: int) -> dict[str, Any]:
    source = checkpoint(work, MODELS[name], "--dtype=float32")
    made: dict[str, Path | str] = {}
    for exporter in EXPORTERS.values():
        out = work / exporter.name.replace(" ", "-")
        try:
            export(work, exporter, source, out, work / "cache")
            [found] = sorted(out.rglob("model.onnx"))[:1] or [None]
            made[exporter.name] = found.parent if found else "it makes no model.onnx"
        except SystemExit as error:
            made[exporter.name] = str(error).splitlines()[-2][:300]
    ours = made["llmexport"]
    assert isinstance(ours, Path), ours
    found = {"model": name, "validated": validated(work, ours)}
    found |= timed(work, made, source, restarts)
    found["refused"] |= {n: said for n, said in made.items() if isinstance(said, str)}
    found["refused"] = {n: said.replace(f"{work}/", "") for n, said in found["refused"].items()}
    found["ours over the best peer's"] = {job: ratio(times) for job, times in found["cpu_ms"].items()}
    slower = [j for j, r in found["ours over the best peer's"].items() if r is None or r > LIMIT]
    for path in (source, *(p for p in made.values() if isinstance(p, Path))):
        shutil.rmtree(path)
    return {**found, "passed": not slower and found["validated"]["status"] == "pass"}


def earlier(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a file by model, none if it is not there."""
    return {row["model"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--work", type=Path, help="where all of it lies meanwhile; an environment there is used again")
    parser.add_argument("--restarts", type=int, default=6)
    parser.add_argument("--json", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    work = chosen.work or Path(tempfile.mkdtemp())
    for exporter in EXPORTERS.values():
        install(work, exporter)
    measured = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        **machine(),
        "versions": {name: versions(work, e) for name, e in EXPORTERS.items() if name != "llmexport static"},
        "restarts": chosen.restarts,
    }
    rows = earlier(chosen.json) if chosen.models else {}
    for name in chosen.models or MODELS:
        rows[name] = {**row(name, work, chosen.restarts), **measured}
        print(json.dumps(rows[name]), flush=True)
        record = {"threads": 1, "slots": SLOTS, "rows": [rows[n] for n in MODELS if n in rows]}
        chosen.json.write_text(json.dumps(record, indent=1) + "\n")
    if not chosen.work:
        shutil.rmtree(work)
    raise SystemExit(0 if all(rows[n]["passed"] for n in chosen.models or MODELS) else 1)


if __name__ == "__main__":
    main()

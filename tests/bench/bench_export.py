"""What an export costs: wall time, peak memory and new bytes on disk, beside other exporters in the same run.

    python tests/bench/bench_export.py [--work DIR] [--only peers|depth|sparse|warm] [--json FILE] [--runs 3]

peers: a 0.5B Llama, beside mobius-onnx and onnxruntime-genai's builder, each in its own virtual environment.
depth: 6 against 48 layers of one width. sparse: 70B parameters in files of holes. warm: all of them once
more with the traced blocks cached. Everything lies under --work, on one file system, because weights are
hard-linked. Nothing is timed unless the exported numbers are right first. Exit code 1: the numbers are wrong
or a target is missed.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

from exporters import LLMEXPORT, MB, PEERS, export, imports_torch, install, new_bytes, versions
from report import COLD, WARM, Row, Target, commit, machine, show

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "export_cpu.json"
GATE = ("tiny-tied", "tiny-llama3")
SECTIONS = {
    "peers": ("llama-0.5b",),
    "depth": ("llama-6-layers", "llama-48-layers"),
    "sparse": ("llama-70b",),
    "warm": ("llama-0.5b", "llama-6-layers", "llama-48-layers", "llama-70b"),
}


def ask(script: str, *arguments: str | Path) -> tuple[bool, str]:
    """Run another script of this folder: whether it succeeded, and the last line it wrote."""
    done = subprocess.run([sys.executable, HERE / script, *arguments], capture_output=True, text=True)
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    return done.returncode == 0, lines[-1] if lines else ""


def checkpoint(work: Path, name: str) -> Path:
    """The folder of a checkpoint, written unless an earlier run left it whole."""
    folder, partial = work / "checkpoints" / name, work / "checkpoints" / f"{name}.partial"
    if not folder.exists():
        print(f"writing {name}", file=sys.stderr)
        shutil.rmtree(partial, ignore_errors=True)
        written, last = ask("checkpoints.py", name, partial)
        if not written:
            raise SystemExit(f"checkpoint {name} could not be written: {last}")
        partial.rename(folder)
    return folder


def gate(work: Path, peers: bool) -> dict[str, dict[str, str]]:
    """Largest logit error against transformers on tiny checkpoints; one of ours too large ends the run."""
    errors: dict[str, dict[str, str]] = {}
    wrong, out = [], work / "out"
    for name in GATE:
        source = checkpoint(work, name)
        with tempfile.TemporaryDirectory(dir=work) as folder:
            cache = Path(folder)
            # Without this the proof that a warm export leaves torch alone would prove nothing.
            if not imports_torch(work, source, out / COLD, cache):
                raise SystemExit("a cold export's import log shows no torch: it cannot vouch for a warm one")
            export(work, LLMEXPORT, source, out / WARM, cache)
            others = [peer for peer in PEERS if peers and peer.dtype == "float32"]
            for peer in others:
                export(work, peer, source, out / peer.name, cache)
        for exporter in (COLD, WARM, *(peer.name for peer in others)):
            right, error = ask("checks.py", "parity", source, out / exporter / "model.onnx")
            errors.setdefault(exporter, {})[name] = error
            if exporter in (COLD, WARM) and not right:
                wrong.append(f"{exporter} of {name}: {error}")
    if wrong:
        raise SystemExit("the numbers do not hold, so nothing is timed: " + "; ".join(wrong))
    return errors


def measure(work: Path, name: str, peers: bool, runs: int) -> list[Row]:
    """Rounds over one checkpoint: llmexport with a new cache, again with the same one, then the peers."""
    source, out = checkpoint(work, name), work / "out"
    cold, warm = Row(COLD, name), Row(WARM, name)
    others = [(peer, Row(peer.name, name)) for peer in PEERS if peers]
    for turn in range(runs):
        print(f"{name}: round {turn + 1} of {runs}", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=work) as folder:
            cache = Path(folder)
            cold.runs.append(export(work, LLMEXPORT, source, out / COLD, cache))
            cold.new_mb = (new_bytes(out / COLD, source) + new_bytes(cache)) / MB
            warm.runs.append(export(work, LLMEXPORT, source, out / WARM, cache))
            warm.new_mb = new_bytes(out / WARM, source) / MB
            for peer, row in others:
                row.runs.append(export(work, peer, source, out / peer.name, cache))
                row.new_mb = new_bytes(out / peer.name, source) / MB
            if turn == runs - 1:
                warm.imports_torch = imports_torch(work, source, out / "proof", cache)
    rows = [cold, warm, *(row for _, row in others)]
    # Making a session reads every weight: not for 70B parameters.
    check = "references" if name in SECTIONS["sparse"] else "opens"
    for row in rows:
        passed, row.check = ask("checks.py", check, out / row.exporter / "model.onnx")
        if not passed and row.exporter in (COLD, WARM):
            raise SystemExit(f"{row.exporter} of {name} is not usable: {row.check}")
    shutil.rmtree(out)
    return rows


def targets(sections: list[str], rows: list[Row]) -> list[Target]:
    cost = {(row.exporter, row.checkpoint): row.median for row in rows}
    aims = []
    for row in rows:
        name, spent = row.checkpoint, row.median
        if row.exporter == COLD:
            aims.append(Target(f"{name}: peak of a cold export, MB", spent.peak_rss_mb, 1000))
            aims.append(Target(f"{name}: new bytes with the cache, MB", row.new_mb, 20))
        elif row.exporter != WARM:
            ours, peer = cost[COLD, name], row.exporter
            aims.append(Target(f"{name}: cold export against {peer}, s", ours.wall_s, spent.wall_s))
            aims.append(Target(f"{name}: peak against {peer}, MB", ours.peak_rss_mb, spent.peak_rss_mb))
        elif "warm" in sections:
            aims.append(Target(f"{name}: warm export, s", spent.wall_s, 1.5))
            aims.append(Target(f"{name}: peak of a warm export, MB", spent.peak_rss_mb, 200))
            aims.append(Target(f"{name}: warm exports that import torch", int(row.imports_torch is not False), 0))
    if "depth" in sections:
        shallow, deep = SECTIONS["depth"]
        for exporter in (COLD, WARM):
            ratio = cost[exporter, deep].wall_s / cost[exporter, shallow].wall_s
            aims.append(Target(f"{exporter}: 48 layers against 6, ratio", ratio, 1.3))
    if "sparse" in sections:
        aims.append(Target("llama-70b: cold export, s", cost[COLD, "llama-70b"].wall_s, 20))
    return aims


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what an export costs.")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "llmexport-bench")
    parser.add_argument("--only", choices=SECTIONS)
    parser.add_argument("--json", type=Path, help="default: the repository's results, if every section runs")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    sections = [options.only] if options.only else list(SECTIONS)
    work, results = options.work.resolve(), options.json or (None if options.only else RESULTS)
    work.mkdir(parents=True, exist_ok=True)
    exporters = [LLMEXPORT, *(PEERS if "peers" in sections else ())]
    for exporter in exporters:
        install(work, exporter)
    errors = gate(work, "peers" in sections)
    rows = []
    for name in dict.fromkeys(name for section in sections for name in SECTIONS[section]):
        rows += measure(work, name, "peers" in sections and name in SECTIONS["peers"], options.runs)
    aims = targets(sections, rows)
    show(rows, aims)
    if results:
        record = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": commit(),
            "machine": machine(),
            "versions": {exporter.name: versions(work, exporter) for exporter in exporters},
            "commands": {exporter.name: " ".join(exporter.command) for exporter in exporters},
            "largest_logit_error": errors,
            "rows": [asdict(row) | {"median": asdict(row.median)} for row in rows],
            "targets": [asdict(aim) | {"met": aim.met} for aim in aims],
        }
        results.parent.mkdir(parents=True, exist_ok=True)
        results.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    sys.exit(0 if all(aim.met for aim in aims) else 1)


if __name__ == "__main__":
    main()

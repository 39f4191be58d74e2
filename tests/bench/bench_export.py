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
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from exporters import LLMEXPORT, MB, PEERS, Cost, export, imports_torch, install, new_bytes, versions

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "export_cpu.json"
GATE = ("tiny-tied", "tiny-llama3")
SECTIONS = {
    "peers": ("llama-0.5b",),
    "depth": ("llama-6-layers", "llama-48-layers"),
    "sparse": ("llama-70b",),
    "warm": ("llama-0.5b", "llama-6-layers", "llama-48-layers", "llama-70b"),
}


@dataclass
class Row:
    """Every run of one exporter on one checkpoint; `new_mb` counts its output and, when cold, its cache."""

    exporter: str
    checkpoint: str
    runs: list[Cost] = field(default_factory=list)
    new_mb: float = 0.0
    check: str = ""
    imports_torch: bool | None = None

    @property
    def wall_s(self) -> float:
        return statistics.median(run.wall_s for run in self.runs)

    @property
    def peak_rss_mb(self) -> float:
        return statistics.median(run.peak_rss_mb for run in self.runs)


@dataclass(frozen=True)
class Target:
    what: str
    value: float
    limit: float

    @property
    def met(self) -> bool:
        return self.value <= self.limit


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
    wrong: list[str] = []

    def judge(exporter: str, name: str, ours: bool) -> None:
        right, error = ask(
            "checks.py", "parity", checkpoint(work, name), work / "out" / exporter / "model.onnx"
        )
        errors.setdefault(exporter, {})[name] = error
        if ours and not right:
            wrong.append(f"{exporter} on {name}: {error}")

    for name in GATE:
        source = checkpoint(work, name)
        with tempfile.TemporaryDirectory(dir=work) as cache:
            # Without this the proof that a warm export leaves torch alone would prove nothing.
            if not imports_torch(work, source, work / "out" / "cold", Path(cache)):
                raise SystemExit(
                    "the import log of a cold export shows no torch: it cannot vouch for a warm one"
                )
            export(work, LLMEXPORT, source, work / "out" / "warm", Path(cache))
            judge("cold", name, ours=True)
            judge("warm", name, ours=True)
            for peer in PEERS:
                if peers and peer.dtype == "float32":
                    export(work, peer, source, work / "out" / peer.name, Path(cache))
                    judge(peer.name, name, ours=False)
    if wrong:
        raise SystemExit("wrong numbers, so nothing is timed: " + "; ".join(wrong))
    return errors


def measure(work: Path, name: str, peers: bool, runs: int) -> list[Row]:
    """Rounds over one checkpoint: llmexport with a new cache, again with the same one, then the peers."""
    source, out = checkpoint(work, name), work / "out"
    cold, warm = Row("llmexport cold", name), Row("llmexport warm", name)
    others = [(peer, Row(peer.name, name)) for peer in PEERS if peers]
    for turn in range(runs):
        print(f"{name}: round {turn + 1} of {runs}", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=work) as folder:
            cache = Path(folder)
            cold.runs.append(export(work, LLMEXPORT, source, out / cold.exporter, cache))
            cold.new_mb = (new_bytes(out / cold.exporter, source) + new_bytes(cache)) / MB
            warm.runs.append(export(work, LLMEXPORT, source, out / warm.exporter, cache))
            warm.new_mb = new_bytes(out / warm.exporter, source) / MB
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
        if not passed and row in (cold, warm):
            raise SystemExit(f"{row.exporter} of {name} is not usable: {row.check}")
    shutil.rmtree(out)
    return rows


def targets(sections: list[str], rows: list[Row]) -> list[Target]:
    row = {(row.exporter, row.checkpoint): row for row in rows}
    aims = []
    for name in dict.fromkeys(row.checkpoint for row in rows):
        cold, warm = row["llmexport cold", name], row["llmexport warm", name]
        aims.append(Target(f"{name}: peak of a cold export, MB", cold.peak_rss_mb, 1000))
        aims.append(Target(f"{name}: new bytes with the cache, MB", cold.new_mb, 20))
        if "warm" in sections:
            aims.append(Target(f"{name}: warm export, s", warm.wall_s, 1.5))
            aims.append(Target(f"{name}: peak of a warm export, MB", warm.peak_rss_mb, 200))
            aims.append(
                Target(f"{name}: imports of torch when warm", float(warm.imports_torch is not False), 0)
            )
        for peer in PEERS:
            if (peer.name, name) in row:
                other = row[peer.name, name]
                aims.append(Target(f"{name}: cold export against {peer.name}, s", cold.wall_s, other.wall_s))
                aims.append(
                    Target(f"{name}: peak against {peer.name}, MB", cold.peak_rss_mb, other.peak_rss_mb)
                )
    if "depth" in sections:
        shallow, deep = SECTIONS["depth"]
        for kind in ("cold", "warm"):
            ratio = row[f"llmexport {kind}", deep].wall_s / row[f"llmexport {kind}", shallow].wall_s
            aims.append(Target(f"48 layers against 6, {kind}, ratio", ratio, 1.3))
    if "sparse" in sections:
        aims.append(Target("llama-70b: cold export, s", row["llmexport cold", "llama-70b"].wall_s, 20))
    return aims


def machine() -> dict[str, object]:
    cpu = Path("/proc/cpuinfo")
    models = (
        [line for line in cpu.read_text().splitlines() if line.startswith("model name")]
        if cpu.exists()
        else []
    )
    return {
        "cpu": models[0].split(":", 1)[1].strip() if models else platform.processor(),
        "cores": os.cpu_count(),
        "memory_mb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // MB,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def commit() -> str:
    """Commit of this checkout, marked when tracked files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(HERE), *arguments]
        return subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout.strip()

    return git("rev-parse", "HEAD") + (
        " modified" if git("status", "--short", "--untracked-files=no") else ""
    )


def show(rows: list[Row], aims: list[Target]) -> None:
    print(f"{'checkpoint':16} {'exporter':15} {'wall s':>8} {'peak MB':>8} {'new MB':>8}  check")
    for row in rows:
        cells = f"{row.wall_s:8.2f} {row.peak_rss_mb:8.0f} {row.new_mb:8.1f}"
        print(f"{row.checkpoint:16} {row.exporter:15} {cells}  {row.check}")
    print()
    for aim in aims:
        print(f"{'ok  ' if aim.met else 'MISS'} {aim.what}: {aim.value:.2f} (at most {aim.limit:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
            "rows": [asdict(row) | {"wall_s": row.wall_s, "peak_rss_mb": row.peak_rss_mb} for row in rows],
            "targets": [asdict(aim) | {"met": aim.met} for aim in aims],
        }
        results.parent.mkdir(parents=True, exist_ok=True)
        results.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    sys.exit(0 if all(aim.met for aim in aims) else 1)


if __name__ == "__main__":
    main()

"""What every architecture's tiny export costs, first and again, and what commands cost that do little.

    python tests/bench/bench_archs.py [--json FILE] [ARCH ...]

CPU seconds, user and system, of a process of one thread that finds every module compiled; peak memory. A machine that
others use too gives more than a quiet one, seldom twice as much: `load` is what it had to do meanwhile. With ARCH the
rows of others in FILE stay, each with the commit that it was measured at. Exit code 1: a target is missed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from report import commit, machine

from llmexport.export import archs

RESULTS = Path(__file__).parent / "results" / "archs_cpu.json"
COMMANDS = ("archs", "ops", "doctor", "--help", "nope", "onnx --nope", "validate --nope", "engine --nope")
MB = 1e6
# CPU seconds and megabytes of the start of a command, a first export and one whose blocks are known.
LIMITS = {"start": (0.15, 100.0), "first": (5.0, 350.0), "again": (0.4, 100.0)}


@dataclass(frozen=True)
class Cost:
    """Of one process of this commit: its arguments, CPU seconds, peak megabytes, the load of the machine at its end."""

    what: str
    cpu_s: float
    peak_rss_mb: float
    load: float
    commit: str


def cost(arguments: str, environment: dict[str, str], fails: bool = False) -> Cost:
    """Of one call of llmexport. Raises SystemExit with what it said, if it does not end as it should."""
    command = [str(Path(sys.executable).with_name("llmexport")), *arguments.split()]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        # `doctor` tells of what is missing by 2.
        if process.returncode not in ((2,) if fails else (0, 2) if arguments == "doctor" else (0,)):
            raise SystemExit(f"{arguments}: {said.read().decode()}")
    seconds = used.ru_utime + used.ru_stime
    megabytes, load = round(used.ru_maxrss * 1024 / MB, 1), round(os.getloadavg()[0], 1)
    return Cost(arguments, round(seconds, 2), megabytes, load, commit())


def earlier(path: Path) -> dict[str, list[Cost]]:
    """The rows of a file, those that say no commit of the file's; none if it is not there."""
    if not path.exists():
        return {k: [] for k in LIMITS}
    record = json.loads(path.read_text())
    return {k: [Cost(**{"commit": record["commit"], **row}) for row in record[k]] for k in LIMITS}


def merged(rows: list[Cost], found: Cost) -> list[Cost]:
    """The rows with this one, in place of an earlier one of the same, in order of their names."""
    return sorted([*(c for c in rows if c.what != found.what), found], key=lambda c: c.what)


def write(path: Path, rows: dict[str, list[Cost]]) -> dict[str, list[str]]:
    """Writes what is measured by now; gives what is above a limit."""
    missed = {k: [c.what for c in rows[k] if c.cpu_s > s or c.peak_rss_mb > mb] for k, (s, mb) in LIMITS.items()}
    record = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "limits_s_mb": LIMITS,
        "missed": missed,
        **{k: [asdict(c) for c in costs] for k, costs in rows.items()},
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="ARCH")
    parser.add_argument("--json", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    rows = earlier(chosen.json) if chosen.names else {k: [] for k in LIMITS}
    rows["start"] = []
    with tempfile.TemporaryDirectory() as work:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPYCACHEPREFIX": f"{work}/compiled"}
        environment["LLMEXPORT_CACHE"] = f"{work}/cache"
        # What is imported here is compiled for all that follow.
        for arguments in ("checkpoint --arch llama -o in", "onnx --arch llama -o out", *COMMANDS):
            cost(arguments.replace("-o ", f"-o {work}/"), environment, "nope" in arguments)
        for arguments in COMMANDS:
            rows["start"].append(cost(arguments, environment, "nope" in arguments))
        for name in chosen.names or archs.names():
            environment["LLMEXPORT_CACHE"] = f"{work}/cache-{name}"
            for which in ("first", "again"):
                found = cost(f"onnx --arch {name} -o {work}/out --force", environment)
                found = replace(found, what=name)
                rows[which] = merged(rows[which], found)
                print(which, found, flush=True)
            missed = write(chosen.json, rows)
    print(json.dumps(missed))
    raise SystemExit(1 if any(missed.values()) else 0)


if __name__ == "__main__":
    main()

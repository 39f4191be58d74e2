"""What was measured, what it is held to, and where it ran."""

import importlib.metadata
import os
import platform
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from exporters import MB, Cost

COLD, WARM = "llmexport cold", "llmexport warm"
# What the times of bench_ops.py depend on, as pip calls it.
PEERS = ("torch", "triton", "transformers", "flash-linear-attention", "fla-core", "flashinfer-python")
PEERS += ("nvidia-cudnn-frontend", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "nvidia-cutlass-dsl")


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
    def median(self) -> Cost:
        return Cost(
            wall_s=median(run.wall_s for run in self.runs),
            cpu_s=median(run.cpu_s for run in self.runs),
            peak_rss_mb=median(run.peak_rss_mb for run in self.runs),
        )


@dataclass(frozen=True)
class Target:
    what: str
    value: float
    limit: float

    @property
    def met(self) -> bool:
        return self.value <= self.limit


def machine() -> dict[str, object]:
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "cpu": model[1] if model else platform.machine(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "memory_mb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // MB,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Of the peers, those that are installed."""
    installed = {d.name.lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    return {name: installed[name] for name in PEERS if name in installed}


def commit(given: str | None = None) -> str:
    """Commit of this checkout, marked when tracked files other than results differ from it; "unknown" in a tree that
    is none. `given`, or $LLMEXPORT_COMMIT, says it of such a tree.
    """
    if said := given or os.environ.get("LLMEXPORT_COMMIT"):
        return said

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", *arguments]
        done = subprocess.run(command, cwd=Path(__file__).parent, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    try:
        # A checkout round this tree does not know the file.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        changed = git("status", "--short", "--untracked-files=no", "--", ":/", ":!results")
        return git("rev-parse", "HEAD") + (" modified" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def show(rows: list[Row], aims: list[Target]) -> None:
    """Print medians, the wall time also as a multiple of our cold export of that checkpoint."""
    cold = {row.checkpoint: row.median.wall_s for row in rows if row.exporter == COLD}
    columns = ("wall s", "x cold", "cpu s", "peak MB", "new MB")
    print(f"{'checkpoint':16} {'exporter':15} {' '.join(f'{column:>8}' for column in columns)}  check")
    for row in rows:
        cost = row.median
        cells = f"{cost.wall_s:8.2f} {cost.wall_s / cold[row.checkpoint]:8.2f} {cost.cpu_s:8.2f}"
        cells += f" {cost.peak_rss_mb:8.0f} {row.new_mb:8.1f}"
        print(f"{row.checkpoint:16} {row.exporter:15} {cells}  {row.check.split(' : ')[-1][:60]}")
    print()
    for aim in aims:
        print(f"{'ok  ' if aim.met else 'MISS'} {aim.what}: {aim.value:.2f} (at most {aim.limit:.2f})")

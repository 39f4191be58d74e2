"""The exporters that are measured: where each lives, how it is called, and what one call costs.

The figures of a call come from wait4, so its peak is that of the largest process in its tree. A child is
charged with its parent's peak as well, hence this file and its importer use the standard library only.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

MB = 1_000_000
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


@dataclass(frozen=True)
class Exporter:
    """A command line to fill in, and the pip `packages` it needs (none: the environment of this script).

    constrained: whether these work with the versions that constraints.txt names.
    """

    name: str
    command: tuple[str, ...]
    packages: tuple[str, ...] = ()
    dtype: str = "float32"
    constrained: bool = True


LLMEXPORT = Exporter(
    "llmexport",
    ("{bin}/llmexport", "onnx", "--arch=llama", "--checkpoint={checkpoint}", "-o", "{out}")
    + ("--weights=link", "--dtype=float32"),
)
MOBIUS = ("mobius-onnx==0.1.0",)
GENAI = ("onnxruntime-genai==0.18.0", "onnx", "onnx-ir", "safetensors", "transformers")
PEERS = (
    Exporter(
        "mobius",
        ("{bin}/mobius", "build", "--config", "{checkpoint}", "--dtype", "f32", "{out}"),
        MOBIUS,
    ),
    Exporter(
        "mobius bf16",
        ("{bin}/mobius", "build", "--config", "{checkpoint}", "--dtype", "bf16", "{out}"),
        MOBIUS,
        "bfloat16",
    ),
    Exporter(
        "genai",
        ("{bin}/python", "-m", "onnxruntime_genai.models.builder", "-i", "{checkpoint}", "-o", "{out}")
        + ("-p", "fp32", "-e", "cpu", "-c", "{scratch}"),
        GENAI,
    ),
)


@dataclass(frozen=True)
class Cost:
    wall_s: float
    cpu_s: float
    peak_rss_mb: float


def scripts(work: Path, exporter: Exporter) -> Path:
    if not exporter.packages:
        return Path(sysconfig.get_path("scripts"))
    return work / "venv" / exporter.packages[0].replace("==", "-") / "bin"


def install(work: Path, exporter: Exporter) -> None:
    """Make the exporter's own virtual environment, of the tested versions that constraints.txt names."""
    folder = scripts(work, exporter).parent
    if not exporter.packages or (folder / "ready").exists():
        return
    print(f"installing {' '.join(exporter.packages)}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    if exporter.constrained:
        pip.append(f"--constraint={CONSTRAINTS}")
    torch = re.search("^torch==.*", CONSTRAINTS.read_text(), re.MULTILINE)
    assert torch
    subprocess.run([*pip, torch[0], *exporter.packages], check=True)
    (folder / "ready").touch()


def versions(work: Path, exporter: Exporter) -> dict[str, str]:
    """What is installed where the exporter runs, of the packages that shape an export."""
    shaping = {
        "llmexport",
        "numpy",
        "onnx",
        "onnx-ir",
        "onnxruntime",
        "onnxruntime-gpu",
        "onnxscript",
        "torch",
    }
    shaping |= {"safetensors", "transformers"} | {package.split("==")[0] for package in exporter.packages}
    pip = [str(scripts(work, exporter) / "python"), "-m", "pip", "list", "--format=json"]
    listed = json.loads(subprocess.run(pip, check=True, capture_output=True).stdout)
    found = {package["name"].replace("_", "-"): package["version"] for package in listed}
    return {name: found[name] for name in sorted(shaping & found.keys())}


def export(
    work: Path,
    exporter: Exporter,
    checkpoint: Path,
    out: Path,
    cache: Path,
    environment: dict[str, str] | None = None,
) -> Cost:
    """Run `exporter` once, from no output folder at all; its own output goes to `work`/last.log."""
    scratch = work / "scratch"
    for folder in (out, scratch):
        shutil.rmtree(folder, ignore_errors=True)
    out.parent.mkdir(exist_ok=True)
    places = {"bin": scripts(work, exporter), "checkpoint": checkpoint, "out": out, "scratch": scratch}
    command = [part.format(**places) for part in exporter.command]
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "LLMEXPORT_CACHE": str(cache)} | (environment or {})
    log = work / "last.log"
    # Pages that an earlier run left dirty would be written back on this one's time.
    os.sync()
    with log.open("wb") as stream:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=work, env=variables, stdout=stream, stderr=stream)
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise SystemExit(f"{end}\n{exporter.name} failed on {checkpoint.name}: exit code {process.returncode}")
    cpu_s = usage.ru_utime + usage.ru_stime
    return Cost(round(wall_s, 3), round(cpu_s, 3), round(usage.ru_maxrss * 1024 / MB, 1))


def imports_torch(work: Path, checkpoint: Path, out: Path, cache: Path) -> bool:
    """Export with llmexport once more; whether it, or a process it started, imported torch.

    Python writes every import to stderr under PYTHONPROFILEIMPORTTIME.
    """
    export(work, LLMEXPORT, checkpoint, out, cache, {"PYTHONPROFILEIMPORTTIME": "1"})
    log = (work / "last.log").read_text(errors="replace")
    return re.search(r"^import time:.*\| +torch$", log, re.MULTILINE) is not None


def new_bytes(out: Path, checkpoint: Path | None = None) -> int:
    """Bytes of the files under `out`, each once, without those that are hard links to the checkpoint's."""
    seen = {path.stat().st_ino for path in checkpoint.iterdir()} if checkpoint else set()
    total = 0
    for path in out.rglob("*"):
        found = path.stat()
        if path.is_file() and found.st_ino not in seen:
            seen.add(found.st_ino)
            total += found.st_size
    return total

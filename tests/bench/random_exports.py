"""What benchmarks on ONNX Runtime run: checkpoints of random weights, and whether an export of one is right."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from checkpoints import TOKENIZER, TOKENIZER_CONFIG
from exporters import LLMEXPORT, scripts


def checkpoint(work: Path, config: dict[str, Any], *flags: str) -> Path:
    """Random weights by `llmexport checkpoint` with these flags, in place of earlier ones, and the tokenizer that
    genai's builder asks for."""
    folder = work / "in"
    shutil.rmtree(folder, ignore_errors=True)
    (work / "config.json").write_text(json.dumps(config))
    command = [str(scripts(work, LLMEXPORT) / "llmexport"), "checkpoint", "--config", str(work / "config.json")]
    subprocess.run([*command, "-q", *flags, "-o", str(folder)], check=True)
    for name, content in {"tokenizer.json": TOKENIZER, "tokenizer_config.json": TOKENIZER_CONFIG}.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def validated(work: Path, folder: Path) -> dict[str, Any]:
    """Logits of ONNX Runtime against PyTorch's on the same weights, after rounding if they were rounded."""
    command = [str(scripts(work, LLMEXPORT) / "llmexport"), "validate", str(folder), "--rungs", "onnxruntime"]
    subprocess.run([*command, "--tokens", "19", "-q"], check=False)
    rungs = json.loads((folder / "report.json").read_text())["rungs"]
    [rung] = [r for r in rungs if r["name"] == "ONNX Runtime / PyTorch"]
    return {"status": rung["status"], **{k: rung["difference"][k] for k in ("max_abs", "rms_ratio")}}

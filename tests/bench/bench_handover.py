"""Which other runtimes open an export's folder, and whether their greedy tokens are those of transformers.

    python tests/bench/bench_handover.py --install | --genai PYTHON --optimum PYTHON [--work DIR] [ARCH ...]

Of every decoder that transformers has a tiny random checkpoint is exported with `--for genai --for optimum`, portable
and with `--target onnxruntime`. Each runtime lives in an environment of its own: --install makes them, else the
interpreters are named. TOKENS tokens are made from each prompt by onnxruntime-genai, alone and in a batch, by optimum,
after the line that the export notes where it needs that, and by its transformers 4 from the checkpoint with the
export's config.json. What a runtime is not written for the export refuses; a batch that is padded as a model cannot
take, which the export notes, may end in an error. Exit code 1: other tokens, or another error.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers

from llmexport.export import archs, onnx_file
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.errors import ExportError
from llmexport.export.exported import Export
from llmexport.export.handover import hand_over
from llmexport.export.static import StaticCache

sys.path.insert(0, str(Path(__file__).parents[1]))

from arch_cases import DECODERS, FIRST, IN_TRANSFORMERS, Case
from layouts import randomise
from other_runtimes import GENAI, OPTIMUM, asked
from report import commit, machine

RESULTS = Path(__file__).parent / "results" / "handover_cpu.json"
PACKAGES = {
    "genai": ("onnxruntime-genai==0.18.0",),
    "optimum": ("optimum-onnx[onnxruntime]==0.1.0", "transformers==4.57.*"),
}
LISTED = ("onnxruntime-genai", "onnxruntime", "optimum-onnx", "optimum", "transformers", "torch")
TOKENS = 20
# Longer and shorter than the windows and chunks of the tiny configs.
PROMPTS = ([5, 77, 0, 41, 2, 99, 130, 7, 8, 200, 31, 64], [9, 3, 250, 18])
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
EQUAL = "equal"
STATIC = {"llama": 64, "qwen3_5_moe": 64}  # slots: keys and values alone, and beside states of another kind


def install(name: str, work: Path) -> str:
    """The interpreter of a new environment with the packages."""
    folder = work / name
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES[name]], check=True)
    return python


def versions(python: str) -> dict[str, str]:
    code = "import importlib.metadata as m, json; found = {d.name: d.version for d in m.distributions()}; "
    code += f"print(json.dumps({{n: v for n, v in found.items() if n in {LISTED!r}}}))"
    found: dict[str, str] = json.loads(subprocess.check_output([python, "-c", code], text=True))
    return dict(sorted(found.items()))


def checkpoint(case: Case, folder: Path) -> Path:
    arch = archs.load(case.arch)
    model_class = getattr(transformers, arch.reference.model_class)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**copy.deepcopy({**arch.tiny, **case.changes, **IDS})))
    randomise(model)
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(IDS))
    return folder


def reference(folder: Path) -> list[list[int]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    made = []
    for ids in (torch.tensor([p]) for p in PROMPTS):
        options = {"do_sample": False, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        made.append(out[0, ids.shape[1] :].tolist())
    return made


def export(source: Path, folder: Path, slots: int | None, target: str) -> tuple[Export | None, dict[str, str]]:
    """The export for the runtimes that can run it, if any can, and what is said of the others."""
    found = open_checkpoint(source)
    arch = archs.choose(None, found.config)
    cache = ("static", slots) if slots else ("dynamic", None)
    graphs = onnx_file.read_model(arch, found.config, slots and StaticCache(slots)).graphs
    refused = {}
    for name in PACKAGES:
        try:
            hand_over([name], graphs, found.config, source)
        except ExportError as error:
            refused[name] = f"refused: {error}"
    runtimes = tuple(n for n in PACKAGES if n not in refused)
    if not runtimes:
        return None, refused
    request = onnx_file.Request(arch, found, cache=cache[0], max_tokens=cache[1], runtimes=runtimes, target=target)
    return onnx_file.write(request, folder), refused


def said(*job: Any, **options: Any) -> Any:
    try:
        return asked(*job, **options)
    except RuntimeError as error:
        return f"error: {error}"


def judged(wanted: list[list[int]], found: Any) -> str:
    return found if isinstance(found, str) else EQUAL if found == wanted else "differs"


def row(case: Case, pythons: dict[str, str], work: Path, slots: int | None, target: str) -> dict[str, Any]:
    source, cache = checkpoint(case, work / "checkpoint"), f"static, {slots}" if slots else "dynamic"
    made, refused = export(source, work / "out", slots, target)
    found: dict[str, Any] = {"arch": case.arch, "target": target, "cache": cache, **refused}
    if made is None:
        return {**found, "passed": True}
    wanted, passed = reference(source), True
    job = (made.folder, [list(p) for p in PROMPTS], TOKENS)

    if "genai" not in refused:
        for name, together in (("genai", False), ("genai_batch", True)):
            found[name] = judged(wanted, said(pythons["genai"], GENAI, *job, together=together))
        noted = any("pads a batch on the right" in note for note in made.notes)
        stopped = noted and found["genai_batch"].startswith("error: ")
        passed &= found["genai"] == EQUAL and (found["genai_batch"] == EQUAL or stopped)
    if "optimum" not in refused:
        lines = [note.partition("run after from_pretrained: ")[2] for note in made.notes if "optimum" in note]
        # The weights as transformers writes them, under the config that the export has.
        shutil.copy(made.folder / "config.json", source / "config.json")
        told = said(pythons["optimum"], OPTIMUM, *job, *(lines or [""]), str(source))
        told = {"optimum": told, "transformers": told} if isinstance(told, str) else told
        found |= {name: judged(wanted, told[name]) for name in ("optimum", "transformers")}
        found["optimum_after_line"] = told.get("after_line")
        passed &= found["optimum"] == found["transformers"] == EQUAL
    return {**found, "notes": list(made.notes), "passed": passed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archs", nargs="*", metavar="ARCH")
    parser.add_argument("--install", action="store_true", help="make the environments")
    for name in PACKAGES:
        parser.add_argument(f"--{name}", metavar="PYTHON", help=f"an interpreter with {PACKAGES[name][0]}")
    parser.add_argument("--work", type=Path, help="where all of it lies meanwhile")
    parser.add_argument("--json", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    if not chosen.install and not all(getattr(chosen, n) for n in PACKAGES):
        parser.error("name both interpreters, or pass --install")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=chosen.work) as folder:
        work = Path(folder)
        pythons = {n: install(n, work) if chosen.install else getattr(chosen, n) for n in PACKAGES}
        cases = [c for c in FIRST if c in DECODERS and c.arch in (chosen.archs or IN_TRANSFORMERS)]
        record: dict[str, Any] = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": commit(),
            **machine(),
            "versions": {"here": versions(sys.executable), **{n: versions(p) for n, p in pythons.items()}},
            "tokens": TOKENS,
            "prompts": [len(p) for p in PROMPTS],
            "rows": rows,
        }
        kinds = [(c, None) for c in cases] + [(c, STATIC[c.arch]) for c in cases if c.arch in STATIC]
        for (case, slots), target in itertools.product(kinds, ("portable", "onnxruntime")):
            place = Path(tempfile.mkdtemp(dir=work))
            rows.append(row(case, pythons, place, slots, target))
            print(json.dumps(rows[-1]), flush=True)
            shutil.rmtree(place)
            if not chosen.archs:
                chosen.json.write_text(json.dumps(record, indent=1) + "\n")
    raise SystemExit(0 if all(r["passed"] for r in rows) else 1)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()

"""Pictures through a vision tower, by one runner a process, as its peak memory is that of the runner.

    python tests/bench/vision_runs.py RUNNER CHECKPOINT EXPORT PICTURES.npz FEATURES.npy [--calls N] [--threads N]

EXPORT is `llmexport onnx --part vision` of CHECKPOINT, and says the dtype; transformers attends by sdpa. What loading
and a call took, the median of N, is printed as one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmexport.export import manifest
from llmexport.export.checkpoint import open_checkpoint
from llmexport.export.exported import Export
from llmexport.export.graph_file import load
from llmexport.export.trace import torch_dtype
from llmexport.validate.feeds import Feed
from llmexport.validate.runners import TorchRunner, to_numpy
from llmexport.validate.runtime import SessionOptions, open_session

Call = Callable[[Feed], np.ndarray]
Said = Callable[[], dict[str, Any]]
TOWERS = {
    "gemma3": "SiglipVisionModel",
    "llama4": "Llama4VisionModel",
    "qwen3_5": "Qwen3_5VisionModel",
    "qwen3_5_moe": "Qwen3_5MoeVisionModel",
}
# What comes after the tower, where the checkpoint has it.
PROJECTOR = "multi_modal_projector."
SHOWN = 0.01  # the least share of the time that an operator is named for


def in_transformers(source: Path, export: Export) -> tuple[Call, Said]:
    import transformers

    config, dtype = transformers.AutoConfig.from_pretrained(source), torch_dtype(export.dtype)
    tower, found = getattr(transformers, TOWERS[config.model_type]).from_pretrained(
        source,
        config=config.vision_config,
        dtype=dtype,
        attn_implementation="sdpa",
        key_mapping={r"^model\.visual\.": "", r"^vision_model\.": "", r"^vision_tower\.vision_model\.": ""},
        output_loading_info=True,
    )
    if lacks := [*found["missing_keys"], *found["mismatched_keys"]]:
        raise SystemExit(f"transformers does not find {lacks[:3]} in {source}")
    tower.eval()
    project = projector(source, config, dtype)

    def call(feed: Feed) -> np.ndarray:
        pixels, *grids = (torch.tensor(feed[n]) for n in ("pixel_values", "grid_thw") if n in feed)
        if grids:
            return to_numpy(tower(pixels, grid_thw=grids[0]).pooler_output)
        return to_numpy(project(tower(pixels.to(dtype)).last_hidden_state).flatten(0, 1))

    return call, dict


def projector(source: Path, config: Any, dtype: torch.dtype) -> torch.nn.Module:
    """What transformers puts behind a tower over tiles; nothing behind another."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector
    from transformers.models.llama4.modeling_llama4 import Llama4MultiModalProjector

    kinds = {"gemma3": Gemma3MultiModalProjector, "llama4": Llama4MultiModalProjector}
    if config.model_type not in kinds:
        return torch.nn.Identity()
    checkpoint, made = open_checkpoint(source), kinds[config.model_type](config).to(dtype)
    stored = {n: torch.tensor(checkpoint.read(n).astype(np.float32)) for n in checkpoint.tensors}
    made.load_state_dict({n.removeprefix(PROJECTOR): t for n, t in stored.items() if n.startswith(PROJECTOR)})
    return made.eval()


def in_pytorch(source: Path, export: Export) -> tuple[Call, Said]:
    runner = TorchRunner(export, export.graphs[0])
    runner.activate()
    return lambda feed: runner.infer(feed, check_inputs=False)["image_features"], dict


def in_onnxruntime(source: Path, export: Export) -> tuple[Call, Said]:
    """Leaves a profile in the current folder, and says the shares of operators."""
    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that wait in a loop take the cores from whatever they wait for, where others are running.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.enable_profiling = True
    session = open_session(load(export, export.graphs[0]), export.folder, options)
    return lambda feed: session.run(["image_features"], feed)[0], lambda: {"ops": shares(session.end_profiling())}


RUNNERS = {"transformers": in_transformers, "PyTorch": in_pytorch, "ONNX Runtime": in_onnxruntime}


def measured(name: str, source: Path, export: Export, feed: Feed, calls: int) -> tuple[np.ndarray, dict[str, Any]]:
    """The features, and what they took."""
    start = time.perf_counter()
    call, said = RUNNERS[name](source, export)
    took = {"load_s": time.perf_counter() - start}
    wall, cpu = [], []
    with torch.inference_mode():
        for _ in range(calls):
            start, worked = time.perf_counter(), time.process_time()
            features = call(feed)
            wall.append(time.perf_counter() - start)
            cpu.append(time.process_time() - worked)
    took |= {"call_s": statistics.median(wall), "cpu_s": statistics.median(cpu)}
    took["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return features, {**{k: round(v, 2) for k, v in took.items()}, **said()}


def shares(profile: str) -> dict[str, float]:
    """Of the time of the last call, the share of each operator."""
    events = json.loads(Path(profile).read_bytes())
    last = max(e["ts"] for e in events if e["name"] == "model_run")
    spent: Counter[str] = Counter()
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= last:
            spent[event["args"]["op_name"]] += event["dur"]
    parts = {name: round(time / spent.total(), 3) for name, time in spent.most_common()}
    return {name: part for name, part in parts.items() if part >= SHOWN}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runner", choices=RUNNERS)
    for name in ("checkpoint", "export", "pictures", "features"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    export, feed = manifest.read(chosen.export.resolve()), dict(np.load(chosen.pictures))
    features, took = measured(chosen.runner, chosen.checkpoint, export, feed, chosen.calls)
    np.save(chosen.features, features.astype(np.float32))
    print(json.dumps(took))


if __name__ == "__main__":
    main()

"""A process that decodes tokens and times each: `python decode_child.py KIND FOLDER PAST`.

KIND is "llmexport", what `llmexport generate` runs; "file", FOLDER's model.onnx in a plain loop on ONNX Runtime,
whoever made it; or "genai", onnxruntime-genai's own loop. One thread, on one core. The first line printed is what
opening took; for each number read from stdin, so many tokens are decoded behind PAST, and [CPU s, wall s] of each
printed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

LEVEL = 4  # MatMulNBits' accuracy_level, which genai's builder writes and ONNX Runtime gives what it fuses
FREE = 64  # slots of a static cache for tokens behind PAST
Step = Callable[[], Any]  # decodes the next token


def prompt(past: int) -> np.ndarray:
    return (np.arange(past, dtype=np.int64)[None] * 7 + 3) % 30_000


def llmexport(folder: Path, past: int) -> Callable[[], Step]:
    from llmexport.export import manifest
    from llmexport.run.session import RuntimeSession, decode, greedy

    session = RuntimeSession(manifest.read(folder), threads=1)

    def begin() -> Step:
        tokens: Iterator[np.ndarray] = decode(session, prompt(past), greedy)
        next(tokens)
        return lambda: next(tokens)

    return begin


def file(folder: Path, past: int) -> Callable[[], Step]:
    import onnxruntime as ort

    sizes = json.loads((folder.parent / "sizes.json").read_text())
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.enable_mem_pattern, options.log_severity_level = 1, False, 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(LEVEL))
    session = ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    inputs, outputs = {i.name for i in session.get_inputs()}, [o.name for o in session.get_outputs()]
    value = ort.OrtValue.ortvalue_from_numpy
    empty = value(np.zeros((1, sizes["num_key_value_heads"], 0, sizes["head_dim"]), np.float32))
    states = [n for n in inputs if n.startswith("past_key_values")]

    def step(ids: np.ndarray, before: int, carried: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        positions = np.arange(before, before + ids.shape[1])[None]
        feed = {"input_ids": ids, "position_ids": positions, "attention_mask": np.ones((1, before + ids.shape[1]), int)}
        binding = session.io_binding()
        for name, held in ({n: value(a) for n, a in feed.items() if n in inputs} | carried).items():
            binding.bind_ortvalue_input(name, held)
        for name in outputs:
            binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        made = dict(zip(outputs, binding.get_outputs(), strict=True))
        chosen = made["logits"].numpy()[:, -1].argmax(-1)[:, None]
        return chosen, {n: made[n.replace("past_key_values", "present")] for n in states}

    def begin() -> Step:
        now = [*step(prompt(past), 0, dict.fromkeys(states, empty)), past]

        def go_on() -> None:
            now[:] = *step(now[0], now[2], now[1]), now[2] + 1

        return go_on

    return begin


def genai(folder: Path, past: int) -> Callable[[], Step]:
    import onnxruntime_genai as og

    config = og.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}}))
    model = og.Model(config)

    def begin() -> Step:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=past + FREE, min_length=past + FREE, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(prompt(past)[0].astype(np.int32))
        generator.generate_next_token()
        return generator.generate_next_token  # type: ignore[no-any-return]

    return begin


def nodes(folder: Path) -> dict[str, int]:
    """Of each kind, in the graph that ONNX Runtime runs."""
    import onnx
    import onnxruntime as ort

    options, kept = ort.SessionOptions(), folder / "optimised.onnx"
    options.optimized_model_filepath, options.log_severity_level = str(kept), 3
    ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    graph = onnx.load(kept, load_external_data=False).graph
    kept.unlink()
    return dict(Counter(n.op_type for n in graph.node).most_common())


def main() -> None:
    kind, folder, past = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    start = time.process_time()
    begin = {"llmexport": llmexport, "file": file, "genai": genai}[kind](folder, past)
    opened = time.process_time() - start
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(json.dumps({"open_cpu_s": opened, "peak_rss_kb": int(status["VmHWM"].split()[0])}), flush=True)
    begin()()
    for line in sys.stdin:
        step, taken = begin(), []
        for _ in range(int(line)):
            cpu, wall = time.process_time(), time.perf_counter()
            step()
            taken.append((time.process_time() - cpu, time.perf_counter() - wall))
        print(json.dumps(taken), flush=True)


if __name__ == "__main__":
    main()

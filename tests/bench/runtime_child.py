"""A process that runs one model as one runtime does, and times what it is asked for: KIND FOLDER [SLOTS].

KIND is "file", FOLDER's model.onnx in a plain loop on ONNX Runtime, whoever made it, keys and values growing; "shared",
the same with keys and values of SLOTS tokens in one buffer each, which a step writes in place; "genai",
onnxruntime-genai's own loop; or "transformers", its eager model. One thread, on one core. The first line printed is
what opening took. Each line read is a job, {"batch", "past", "tokens", "steps", "pieces"}, a most of `steps` times
`tokens` new tokens a row behind `past`, those of a step in so many calls (1), and answered by whether this kind can do
it; or null, which is one of those steps, answered by its seconds of CPU. A past of 128 is what all compute of one text,
and each token the one that they think likeliest, so that all of them choose the same experts; keys and values of a
longer one are random numbers, the same in all files, but of transformers those of that text over again.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

COMPUTED = 128  # tokens of past that are computed; a longer one of transformers repeats these
Step = Callable[[], Any]
Begin = Callable[[int, int, int, int, int], Step | None]  # batch, past, tokens, steps, pieces


def ids(batch: int, tokens: int) -> np.ndarray:
    """Another text in each row, as rows of one go to the same experts."""
    return (np.arange(tokens, dtype=np.int64) * 7 + np.arange(batch, dtype=np.int64)[:, None] * 11 + 3) % 30_000


def stepped(run: Callable[[np.ndarray], np.ndarray], batch: int, past: int, tokens: int, pieces: int) -> Step:
    """`run` of a text, where it is long; else of a token each time, the likeliest behind the last."""
    given = [run(ids(batch, past)) if 0 < past <= COMPUTED else ids(batch, tokens)]

    def step() -> None:
        for piece in np.split(given[0], pieces, 1):
            found = run(piece)
        given[0] = found if tokens == 1 else given[0]

    return step


def file(folder: Path, slots: int | None = None) -> Begin:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.enable_mem_pattern, options.log_severity_level = 1, False, 3
    session = ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    value, made = ort.OrtValue.ortvalue_from_numpy, [o.name for o in session.get_outputs()]
    inputs = {i.name: i for i in session.get_inputs()}
    after = {n: n.replace("past_key_values", "present").replace("past_", "present_") for n in inputs}
    after = {n: o if o in made else n.replace("past", "present") for n, o in after.items()}
    states = [n for n in inputs if after[n] in made]
    grows = {n for n in states if n.endswith(("key", "value", "latent"))}
    threefold = "position_ids" in inputs and len(inputs["position_ids"].shape) == 3
    # genai's files leave the size of a head open.
    told = folder / "genai_config.json"
    decoder = json.loads(told.read_text())["model"]["decoder"] if told.exists() else {}
    head_size, window = decoder.get("head_size", 0), decoder.get("sliding_window", {}).get("window_size", 0)

    def begin(batch: int, past: int, tokens: int, steps: int, pieces: int) -> Step:
        drawn = past if past > COMPUTED else 0
        held, shared = {}, list[str]()
        for name in states:
            shape = [d if isinstance(d, int) else None for d in inputs[name].shape]
            shape[0] = batch
            if name in grows:
                if shape[2] in (None, slots):
                    # A window of genai's has its slots from the first token on.
                    shape[2] = slots or max(drawn, window if "sliding" in str(inputs[name].shape[2]) else 0)
                    shared += [name] if slots else []
                shape[3] = shape[3] or head_size
            array = np.zeros(shape, np.float32)
            if name in grows:
                # By name, as files have them in another order.
                rng = np.random.default_rng(zlib.crc32(name.encode()))
                array[:, :, :drawn] = rng.standard_normal(array[:, :, :drawn].shape, np.float32)
            held[name] = value(array)
        # What stays where it is, is bound once: what Python does about a step is no file's.
        binding, scores, now = session.io_binding(), dict[int, Any](), [drawn]
        for name in shared:
            binding.bind_ortvalue_input(name, held[name])
            binding.bind_ortvalue_output(after[name], held[name])
        before, moved = {after[n]: n for n in states}, [n for n in states if n not in shared]
        fresh = [n for n in made if before.get(n) not in shared and n != "logits"]
        bound = [*(after[n] for n in shared), "logits", *fresh]  # in the order of their first call

        def run(given: np.ndarray) -> np.ndarray:
            """The likeliest tokens behind these [B, 1]."""
            count = given.shape[1]
            positions = np.tile(np.arange(now[0], now[0] + count), (batch, 1))
            feed = {
                "input_ids": given,
                "position_ids": np.stack([positions] * 3) if threefold else positions,
                "attention_mask": np.ones((batch, now[0] + count), np.int64),
            }
            for name in feed.keys() & inputs.keys():
                binding.bind_ortvalue_input(name, value(feed[name]))
            for name in moved:
                binding.bind_ortvalue_input(name, held[name])
            if count in scores:
                binding.bind_ortvalue_output("logits", scores[count])
            else:
                binding.bind_output("logits", "cpu")
            for name in fresh:
                binding.bind_output(name, "cpu")
            session.run_with_iobinding(binding)
            if fresh or count not in scores:
                found = dict(zip(bound, binding.get_outputs(), strict=True))
                held.update({before[n]: found[n] for n in fresh if n in before})
                scores[count] = found["logits"]
            now[0] += count
            likeliest: np.ndarray = scores[count].numpy()[:, -1].argmax(-1)
            return likeliest[:, None]

        return stepped(run, batch, past, tokens, pieces)

    return begin


def genai(folder: Path, _: int | None = None) -> Begin:
    import onnxruntime_genai as og

    config = og.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}}))
    model = og.Model(config)

    def begin(batch: int, past: int, tokens: int, steps: int, pieces: int) -> Step | None:
        if past > COMPUTED or (past and tokens > 1):
            return None

        def opened() -> Any:
            params, most = og.GeneratorParams(model), past + tokens * steps + 8
            params.set_search_options(max_length=most, min_length=most, do_sample=False, batch_size=batch)
            return og.Generator(model, params)

        if past:
            generator = opened()
            generator.append_tokens(ids(batch, past).astype(np.int32))
            generator.generate_next_token()
            return generator.generate_next_token  # type: ignore[no-any-return]

        def prompt() -> None:
            generator = opened()
            for piece in np.split(ids(batch, tokens), pieces, 1):
                generator.append_tokens(piece.astype(np.int32))
            generator.generate_next_token()

        return prompt

    return begin


def transformers(folder: Path, _: int | None = None) -> Begin:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    torch.set_num_threads(1)
    seen = hasattr(AutoConfig.from_pretrained(folder), "vision_config")
    auto = AutoModelForImageTextToText if seen else AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()

    def begin(batch: int, past: int, tokens: int, steps: int, pieces: int) -> Step:
        held: list[Any] = [None]

        def run(given: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                made = model(torch.tensor(given), past_key_values=held[0], use_cache=True, logits_to_keep=1)
            held[0] = made.past_key_values
            likeliest: np.ndarray = made.logits[:, -1:].argmax(-1).numpy()
            return likeliest

        if past > COMPUTED:
            run(ids(batch, COMPUTED))
            for layer in held[0].layers:
                if hasattr(layer, "sliding_window"):
                    layer.cumulative_length = past
                elif getattr(layer, "keys", None) is not None:
                    times = (1, 1, past // layer.keys.shape[-2], 1)
                    layer.keys, layer.values = layer.keys.repeat(times), layer.values.repeat(times)
        return stepped(run, batch, past, tokens, pieces)

    return begin


KINDS = {"file": file, "shared": file, "genai": genai, "transformers": transformers}


def status(what: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[what].split()[0])


def main() -> None:
    kind, folder, slots = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if sys.argv[3:] else None
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    start = time.process_time()
    begin = KINDS[kind](folder, slots)
    opened = time.process_time() - start
    found = {"open_cpu_s": opened, "opened_rss_kb": status("VmRSS"), "peak_rss_kb": status("VmHWM")}
    print(json.dumps(found), flush=True)
    step: Step | None = None
    for line in sys.stdin:
        job = json.loads(line)
        if job:
            step = begin(job["batch"], job["past"], job["tokens"], job["steps"], job.get("pieces", 1))
            print(json.dumps(step is not None), flush=True)
        else:
            assert step
            cpu = time.process_time()
            step()
            print(time.process_time() - cpu, flush=True)


if __name__ == "__main__":
    main()

"""A golden pack of toy_model.py, and the parts that it is written of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import toy_model
from engine_folder import ports

from llmexport.validate import pack
from llmexport.validate.pack import BITS, Arrays, Graph, Header, Shot, expected_key, fed_key, real_key, widened
from llmexport.validate.tolerance import TOLERANCE

DIGEST = "b" * 64
STAGES = (("prompt", "opening"), ("decode 1", "decode"), ("decode 2", "decode"), ("last", "piece"))


def parts(dtype: str = "float16", crossing: int = 40, digest: str = DIGEST) -> tuple[Header, Arrays]:
    """A prompt padded on the left, two greedy steps, a piece, and a step across a threshold after a random past."""
    random, arrays, stages = np.random.default_rng(1), Arrays(), []
    inputs, outputs = ports(dtype)
    kind, made = np.dtype(BITS.get(dtype, dtype)), Arrays()
    for i, (name, what) in enumerate((*STAGES, (f"across {crossing}", "crossing"))):
        count = {"opening": 7, "piece": 3, "crossing": 13}.get(what, 1)
        feed = {"input_ids": random.integers(0, 31, (1 if what == "crossing" else 2, count))}
        if what == "opening":
            feed["past"] = np.zeros((2, 2, 0, 8), kind)
        if what == "crossing":
            feed["past"] = pack.bits(random.standard_normal((1, 2, crossing - 2, 8)).astype(np.dtype(dtype)))
        arrays |= {fed_key(i, "model", n): a for n, a in feed.items()}
        made = toy_model.run({"past": made.get("present"), **feed}, dtype)
        real = np.ones(feed["input_ids"].shape, bool)
        if what == "opening":
            real[1, :2] = False
        arrays |= {real_key(i): real, expected_key(i, "logits"): widened(made["logits"], dtype)}
        allowed = {"logits": TOLERANCE[dtype]}
        if what == "piece":
            arrays[expected_key(i, "present")] = widened(made["present"], dtype)
            allowed["present"] = TOLERANCE[dtype]
        greedy = what in ("opening", "decode")
        shots = (Shot("model", tuple(feed)),)
        stages.append(pack.Stage(name, what, greedy, shots, allowed, ("present",) if what == "piece" else (), "logits"))
    graph = Graph(digest, inputs, outputs, {"past": "present"})
    header = Header("0.dev0", "llama", dtype, 0, "itself", {"model": graph}, tuple(stages), (), {})
    return header, arrays


def make_pack(path: Path, dtype: str = "float16", **options: object) -> Path:
    pack.write(path, *parts(dtype, **options), force=False)  # type: ignore[arg-type]
    return path

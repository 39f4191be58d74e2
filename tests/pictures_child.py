"""A process in which pictures can be processed: commands, and what transformers makes of the same pictures.

`python tests/pictures_child.py` reads lines of JSON from stdin and answers each on stdout: {"run": [argument, ...]} is
a command; {"generate": ...} is Reference as data.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# PyPI's torchvision has operators for the torch of PyPI, and does not import beside one for CPUs that lacks their
# names. No processor calls one.
OPERATORS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


@dataclass(frozen=True)
class Reference:
    """What transformers' generate shall continue: pictures and a prompt; greedily, in fp32.

    raw: the prompt is the text itself, placeholders included, and nothing that a user says in a chat.
    """

    checkpoint: str
    prompt: str
    images: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()
    raw: bool = False
    tokens: int = 12


def by_transformers(asked: Reference) -> dict[str, Any]:
    """The ids of the prompt, and those that follow it."""
    import torch
    from transformers.image_utils import load_image

    processor, model = _loaded(asked.checkpoint)
    content = [{"type": "image"} for _ in asked.images] + [{"type": "video"} for _ in asked.videos]
    message = {"role": "user", "content": [*content, {"type": "text", "text": asked.prompt}]}
    text = asked.prompt if asked.raw else processor.apply_chat_template([message], add_generation_prompt=True)
    given: dict[str, Any] = {"images": [load_image(p) for p in asked.images]} if asked.images else {}
    if asked.videos:
        videos = [[load_image(str(p)) for p in sorted(Path(v).iterdir())] for v in asked.videos]
        facts = [{"total_num_frames": len(v), "fps": 2, "frames_indices": [*range(len(v))]} for v in videos]
        given |= {"videos": videos, "video_metadata": facts, "do_sample_frames": False}
    made = processor(text=[text], add_special_tokens=asked.raw, return_tensors="pt", **given).to(torch.float32)
    with torch.no_grad():
        config = model.config
        never = [n for k in ("image_token_id", "video_token_id") if (n := getattr(config, k, None)) is not None]
        out = model.generate(**made, max_new_tokens=asked.tokens, do_sample=False, suppress_tokens=never)
    length = made["input_ids"].shape[1]
    return {"prompt_ids": made["input_ids"][0].tolist(), "ids": out[0, length:].tolist()}


@functools.cache
def _loaded(checkpoint: str) -> tuple[Any, Any]:
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    model = transformers.AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    return transformers.AutoProcessor.from_pretrained(checkpoint), model


def main() -> None:
    # What libraries print to stdout is no answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    libraries = _define_operators()
    from misuse import call

    for line in sys.stdin:
        asked = json.loads(line)
        if "run" in asked:
            found = dataclasses.asdict(call(tuple(asked["run"])))
        else:
            found = by_transformers(Reference(**asked["generate"]))
        print(json.dumps(found), file=answers, flush=True)
    del libraries


def _define_operators() -> list[Any]:
    """What must live as long as torchvision does, if it needs anything."""
    import torch

    if "+cpu" not in torch.__version__ or "+" in importlib.metadata.version("torchvision"):
        return []
    library = torch.library.Library("torchvision", "DEF")
    for name, schema in OPERATORS.items():
        library.define(name + schema)
    return [library]


if __name__ == "__main__":
    main()

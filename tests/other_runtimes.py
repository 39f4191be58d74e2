"""Greedy tokens from an export's folder by runtimes that live in environments of their own."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

# Each reads [prompts, tokens to make, whether the prompts are one batch] from stdin, and prints what it made of each.
GENAI = """
import json, sys
import numpy, onnxruntime_genai as genai
prompts, count, together = json.load(sys.stdin)
folder = sys.argv[1]
pad = json.load(open(folder + "/genai_config.json"))["model"].get("pad_token_id", 0)
model = genai.Model(folder)
made = []
for batch in [prompts] if together else [[p] for p in prompts]:
    longest = max(map(len, batch))
    params = genai.GeneratorParams(model)
    # Greedy, and no end before there are as many tokens as asked for.
    limit = longest + count
    params.set_search_options(
        do_sample=False, max_length=limit, min_length=limit, batch_size=len(batch), repetition_penalty=1.0
    )
    generator = genai.Generator(model, params)
    rows = [p + [pad] * (longest - len(p)) for p in batch]
    generator.append_tokens(numpy.array(rows if together else rows[0], dtype=numpy.int32))
    for _ in range(count):
        generator.generate_next_token()
    made += [[int(t) for t in generator.get_sequence(i)[longest:]] for i in range(len(batch))]
print(json.dumps(made))
"""
OPTIMUM = """
import json, sys
import torch
from optimum.onnxruntime import ORTModelForCausalLM
prompts, count, together = json.load(sys.stdin)
model = ORTModelForCausalLM.from_pretrained(sys.argv[1])
exec(sys.argv[2] if len(sys.argv) > 2 else "")
made = []
for prompt in prompts:
    ids = torch.tensor([prompt])
    options = dict(do_sample=False, max_new_tokens=count, min_new_tokens=count, use_cache=True, pad_token_id=0)
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    made.append(out[0, len(prompt):].tolist())
print(json.dumps(made))
"""


def tokens(
    python: str, script: str, folder: Path, prompts: list[list[int]], count: int, *more: str, together: bool = False
) -> list[list[int]]:
    """What the script makes of the export in the folder. Raises RuntimeError with the last line of what it says."""
    command = [python, "-c", script, str(folder), *more]
    asked = json.dumps([prompts, count, together])
    done = subprocess.run(command, input=asked, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1][:500])
    made: list[list[int]] = json.loads(done.stdout.strip().splitlines()[-1])
    return made

"""Greedy tokens from an export's folder by runtimes that live in environments of their own."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

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
# argv: the export, a line for where its cache has other sizes than optimum takes, a checkpoint for transformers 4.
OPTIMUM = """
import json, sys
import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoModelForCausalLM
prompts, count, together = json.load(sys.stdin)
folder, line, checkpoint = (*sys.argv[1:], "", "")[:3]
def make(model):
    made = []
    for ids in (torch.tensor([prompt]) for prompt in prompts):
        options = dict(do_sample=False, max_new_tokens=count, min_new_tokens=count, pad_token_id=0)
        made.append(model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1]:].tolist())
    return made
said = dict(after_line=False)
model = ORTModelForCausalLM.from_pretrained(folder)
try:
    said["optimum"] = make(model)
except Exception as error:
    if not line or "Got invalid dimensions" not in str(error):
        raise
    exec(line)
    said["optimum"], said["after_line"] = make(model), True
if checkpoint:
    said["transformers"] = make(AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager").eval())
print(json.dumps(said))
"""


def asked(
    python: str, script: str, folder: Path, prompts: list[list[int]], count: int, *more: str, together: bool = False
) -> Any:
    """What the script says of the export in the folder. Raises RuntimeError with the last line of its error."""
    command = [python, "-c", script, str(folder), *map(str, more)]
    done = subprocess.run(command, input=json.dumps([prompts, count, together]), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1][:500])
    return json.loads(done.stdout.strip().splitlines()[-1])

"""Prints the memory of this process, in bytes, after each of three times 1,000 decode steps, and that of the states."""

import itertools
import json
import math
import sys
from pathlib import Path

import psutil

from llmexport.export import manifest
from llmexport.run.prompts import row
from llmexport.run.session import RuntimeSession, decode, greedy
from llmexport.validate.feeds import shape_of

STEPS, PROMPT = 1000, (1, 2, 3)
export = manifest.read(Path(sys.argv[1]))
session, found = RuntimeSession(export), []
for _ in range(3):
    assert len(list(itertools.islice(decode(session, row(PROMPT), greedy), STEPS))) == STEPS
    found.append(psutil.Process().memory_info().rss)
sizes = {"batch": 1, "past": len(PROMPT) + STEPS - 1}
states = [p for g in export.graphs for p in g.assembly.inputs if p.name in g.carried]
print(json.dumps({"rss": found, "states": sum(4 * math.prod(shape_of(p, sizes)) for p in states)}))

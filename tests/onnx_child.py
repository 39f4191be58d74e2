"""The process of an engine whose graphs ONNX Runtime computes: `python onnx_child.py FAULT FOLDER`.

FAULT scales the logits: "1.0" is right.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

from llmexport.validate.engine_run import JOB
from llmexport.validate.wire import receive, send


def main(factor: float, work: Path) -> None:
    job = json.loads((work / JOB).read_bytes())
    folder, out = Path(job["folder"]), sys.stdout.buffer
    send(out, {"version": "1.7.1.116"})
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    while received := receive(sys.stdin.buffer):
        message, feed = received
        if "graph" not in message:
            sessions = {n: onnxruntime.InferenceSession(folder / f"{n}.onnx", options) for n in job["plans"]}
            send(out, {"loaded": sorted(sessions)})
            continue
        session = sessions[message["graph"]]
        names = [o.name for o in session.get_outputs()]
        outputs = dict(zip(names, session.run(names, feed), strict=True))
        if "logits" in outputs:
            outputs["logits"] = (outputs["logits"] * factor).astype(outputs["logits"].dtype)
        send(out, {"seconds": 0.5}, {n: np.asarray(a) for n, a in outputs.items()})


if __name__ == "__main__":
    main(float(sys.argv[1]), Path(sys.argv[2]))

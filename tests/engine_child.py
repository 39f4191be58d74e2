"""The process of an engine, without a GPU: `python engine_child.py DTYPE FAULT FOLDER` serves a stand-in.

FAULT says what goes wrong: "version", "crash", "hang", "lost" (an answer that ends in the middle), or "" for nothing.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from engine_folder import ports
from tensorrt_stand_in import APIS, Stand

from llmexport.validate import engine_run


def main(dtype: str, fault: str, folder: Path) -> None:
    job = json.loads((folder / engine_run.JOB).read_bytes())
    [api] = [a for a in APIS if a["module"] == job["module"] and a["version"][:2] != "10"]
    stand = Stand(api | ({"version": "1.6.0"} if fault == "version" else {}), *ports(dtype), dtype)
    engine_run.library.load = lambda trt, path: frozenset()  # type: ignore[assignment]
    make = stand.runner

    def runner(context: str) -> object:
        found = make(context)
        infer = found.infer

        def fail(*arguments: object, **options: object) -> object:
            if fault == "crash":
                print("CUDA error 700", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGSEGV)
            if fault == "hang":
                time.sleep(100)
            if fault == "lost":
                sys.stdout.buffer.write(b'{"seconds": 1.0, "arr')
                sys.stdout.buffer.flush()
                os._exit(1)
            return infer(*arguments, **options)

        found.infer = fail
        return found

    engine_run.serve(stand.trt, runner, stand.place, job, sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))

"""Times the plugin ops on the GPU at hand: python tests/bench/bench_ops.py [--only Rope] [--no-peers].

Ceilings first, then for each case the numbers, and only where those are right the times: ours as TensorRT calls
it, beside torch and, where installed, flashinfer, fla and cuDNN's frontend; and the bounds, which do not compute the
same: a copy of the bytes that it touches, its matrix products alone. Writes tests/bench/results/<gpu>.json, or --out,
after every case: several runs on the same kernels, with --only or with LLMEXPORT_SM90A, add up in one file. Exit code 2
without a GPU, 1 if a number is wrong or a target is missed.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import functools
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

RESULTS = Path(__file__).parent / "results"
# bf16 rounds off 2**-8 of a value; one unit more where a tie falls on the other side.
MOST_ERROR, RMS_ERROR = 2.0**-7, 0.4 * 2.0**-7
PART = 1 << 23  # elements
# As plugins/common/sm90a.h reads $LLMEXPORT_SM90A.
WGMMA = {"0": "never", "1": "always", "cluster": "in clusters", "pingpong": "in turns"}
# Times an empty kernel, of what is hardly more than that (issue 3).
LAUNCH_TARGET = 1.3


def ours(library: Any, case: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> Callable[[], None]:
    """A call of the plugin's enqueue on the current stream, which keeps all memory that it is given."""
    from llmexport.plugins.host import desc

    descs = [desc(t.shape, t.dtype) for t in (*inputs, *outputs)]
    io = (type(descs[0]) * len(descs))(*descs)
    plugin = library.create(case.op, case.attributes).attach()
    plugin.shape_change(descs)
    workspace = torch.empty(plugin.workspace(descs, descs), dtype=torch.uint8, device="cuda")
    ins = (ctypes.c_void_p * len(inputs))(*(t.data_ptr() for t in inputs))
    outs = (ctypes.c_void_p * len(outputs))(*(t.data_ptr() for t in outputs))

    def call(_kept: object = (inputs, outputs)) -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        if plugin.call("Enqueue", io, len(inputs), ins, outs, ctypes.c_void_p(workspace.data_ptr()), stream):
            raise RuntimeError(f"{case.op}: enqueue failed")

    return call


def apart(library: Any, case: Any, inputs: list[torch.Tensor]) -> Callable[[], None]:
    """What a plugin joins, one after another: plugins of ours, and torch between them."""
    steps = [step if callable(step) else ours(library, *step) for step in case.apart(inputs)]

    def call() -> None:
        for step in steps:
            step()

    return call


def right(case: Any, library: Any) -> bool:
    inputs = case.inputs()
    outputs = case.outputs(inputs)
    ours(library, case, inputs, outputs)()
    return all(agree(case, wanted, found) for wanted, found in case.checked(inputs, outputs))


def agree(case: Any, wanted: torch.Tensor, found: torch.Tensor) -> bool:
    """Integers exactly, fp32 within the case's tolerance; what is rounded to bf16 several times may fall on the other
    side of a tie each time.
    """
    from llmexport.validate.compare import compare
    from llmexport.validate.tolerance import Tolerance

    if not found.is_floating_point():
        return bool((ends(wanted) == ends(found)).all())
    in_bf16 = found.dtype == torch.bfloat16
    bound = Tolerance(case.roundings * MOST_ERROR, RMS_ERROR, scaled=True) if in_bf16 else case.fp32_tolerance
    return compare(ends(wanted), ends(found)).excess(bound) <= 1


def ends(tensor: torch.Tensor) -> np.ndarray:
    """All of it or, of what would take minutes to compare on the CPU, the first and the last part."""
    flat = tensor.flatten()
    part = flat if flat.numel() <= 2 * PART else torch.cat((flat[:PART], flat[-PART:]))
    return (part.double() if part.is_floating_point() else part).cpu().numpy()


def attempt(calls: Callable[[], list[Callable[[], object]]]) -> float | str:
    """Seconds, or why it cannot run: a failure of others is a result."""
    from gpu_clock import seconds_each

    try:
        return seconds_each(calls())
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"


def timed(case: Any, library: Any, with_peers: bool) -> dict[str, dict[str, float | str]]:
    """Seconds by who computes the same, and by what bounds it."""
    from gpu_clock import seconds_each, sets_for

    sets = [case.inputs() for _ in range(sets_for(case.bytes))]
    outputs = getattr(case, "timed_outputs", case.outputs)
    calls = [ours(library, case, inputs, outputs(inputs)) for inputs in sets]
    times: dict[str, float | str] = {"llmexport": seconds_each(calls)}
    bounds: dict[str, float | str] = {}
    if hasattr(case, "apart"):
        times["one after another"] = seconds_each([apart(library, case, inputs) for inputs in sets])
    if with_peers:
        for name, peer in case.peers().items():
            times[name] = attempt(lambda peer=peer: [functools.partial(peer, *inputs) for inputs in sets])
        for name, bound in case.bounds().items():
            bounds[name] = attempt(lambda bound=bound: [bound(*inputs) for inputs in sets])
    return {"seconds": times, "bounds": bounds}


def judged(case: Any, times: dict[str, float | str], ceilings: Any) -> dict[str, Any]:
    mine = float(times["llmexport"])
    numbers = {name: t for name, t in times.items() if isinstance(t, float)}
    best = min((t for name, t in numbers.items() if name != "llmexport"), default=mine)
    fraction, launches = case.floor(ceilings) / mine, mine / ceilings.launch
    enough = fraction >= case.target if case.target else launches <= LAUNCH_TARGET
    return {"of_floor": fraction, "of_launch": launches, "best_peer_ratio": best / mine, "met": enough and best >= mine}


def told(item: tuple[str, float | str]) -> str:
    name, time = item
    return f"{name} {time * 1e6:.2f} us" if isinstance(time, float) else f"{name} {time}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="OP", help="ops")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--out", type=Path, help="the file of the results")
    parser.add_argument("--commit", help="of these sources, where they are no checkout; also $LLMEXPORT_COMMIT")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: the ops are timed on a GPU only", file=sys.stderr)
        return 2

    from gpu_clock import ceilings
    from op_cases import cases
    from op_results import Results
    from report import commit, versions

    from llmexport.plugins import library
    from llmexport.plugins.host import Library

    gpu = torch.cuda.get_device_name()
    major, minor = torch.cuda.get_device_capability()
    built = Library(library.build([f"{major}{minor}"], RESULTS.parents[2] / "build" / "bench"))
    limits = ceilings()
    said = f"copy {limits.copy / 1e12:.2f} TB/s, read {limits.read / 1e12:.2f}, gemm {limits.gemm / 1e12:.0f} TFLOP/s, "
    said += f"empty {limits.launch * 1e6:.2f} us"
    print(f"{gpu}: {said}", flush=True)
    run: dict[str, Any] = {
        "gpu": gpu,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(arguments.commit),
        "kernels": library._builds().name,
        "wgmma": WGMMA.get(os.environ.get("LLMEXPORT_SM90A", ""), "where faster"),
        "versions": versions(),
        "ceilings": asdict(limits),
    }
    results = Results(arguments.out or RESULTS / f"{gpu.lower().replace(' ', '-')}.json", run)
    met = True
    for case in cases():
        if case.op not in (arguments.only or [case.op]):
            continue
        row: dict[str, Any] = {"op": case.op, "family": case.family, "B": case.B, "T": case.T, "bytes": case.bytes}
        row["right"] = right(case, built)
        if row["right"]:
            times = timed(case, built, not arguments.no_peers)
            row |= {**times, **judged(case, times["seconds"], limits)}
            said = " | ".join(", ".join(map(told, part.items())) for part in times.values())
            print(
                f"{case.op:14}{case.family:19} B={case.B:<3}T={case.T:<6}{row['of_floor']:6.1%} of floor, "
                f"{row['of_launch']:5.2f} launches {'' if row['met'] else 'MISSED'} | {said}",
                flush=True,
            )
        else:
            print(f"{case.op:14}{case.family:19} B={case.B:<3}T={case.T:<6} WRONG NUMBERS, not timed", flush=True)
        results.add(row)
        met &= row["right"] and row["met"]
        torch.cuda.empty_cache()
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())

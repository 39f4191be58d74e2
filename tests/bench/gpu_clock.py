"""Times GPU work: CUDA graphs, cold L2, medians; and the ceilings and copies that the times are held against."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

import torch

Made = TypeVar("Made")

REPLAYS = 20
# Sets of buffers that follow each other hold this many times the L2, so that none finds its data there.
L2_TIMES = 3
MOST_SETS, FEWEST_NODES = 1024, 16
GIB = 1 << 30
GEMM_SIZE = 8192


def sets_for(bytes_of_one: int) -> int:
    """How many sets of buffers to rotate through."""
    l2 = torch.cuda.get_device_properties().L2_cache_size
    return min(MOST_SETS, max(4, math.ceil(L2_TIMES * l2 / bytes_of_one)))


def seconds_each(calls: Sequence[Callable[[], object]]) -> float:
    """Median time of one of these calls, made one after another in a CUDA graph."""
    side = torch.cuda.Stream()
    # What the calls are given is made on this one.
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # All of them: what a call does once, it does here.
        for call in calls:
            call()
    side.synchronize()
    repeated = list(calls) * math.ceil(FEWEST_NODES / len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in repeated:
            call()
    times = []
    for _ in range(REPLAYS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000 / len(repeated))
    return median(times[3:])


def once(make: Callable[..., Made]) -> Callable[..., Made]:
    """`make`, called once for each first tensor: seconds_each makes all calls before the graph that it times."""
    made: dict[int, Made] = {}

    def kept(*tensors: torch.Tensor) -> Made:
        key = tensors[0].data_ptr()
        if key not in made:
            made[key] = make(*tensors)
        return made[key]

    return kept


def copy_of(touched: int, device: str = "cuda") -> Callable[[], torch.Tensor]:
    """A call of a kernel that reads and writes so many bytes in all: in a graph copy_ is the driver's, and took half as
    long again on an H200.
    """
    source = torch.randint(1 << 30, (touched // 8,), dtype=torch.int32, device=device)
    return functools.partial(torch.add, source, 0, out=torch.empty_like(source))


@dataclass(frozen=True)
class Ceilings:
    """Bytes a second of a copy (read and written) and of reading alone; operations a second of a matrix product in
    bf16; seconds of a kernel that does nothing.
    """

    copy: float
    read: float
    gemm: float
    launch: float


def ceilings() -> Ceilings:
    sources = [torch.randn(GIB // 4, device="cuda") for _ in range(3)]
    target = torch.empty_like(sources[0])
    copy = seconds_each([functools.partial(torch.add, s, 0, out=target) for s in sources])
    read = seconds_each([lambda s=s: torch.sum(s) for s in sources])
    squares = [torch.randn(GEMM_SIZE, GEMM_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    gemm = seconds_each([lambda a=a: a @ squares[0] for a in squares])
    launch = seconds_each([lambda: torch.cuda._sleep(0)] * 64)
    return Ceilings(2 * GIB / copy, GIB / read, 2 * GEMM_SIZE**3 / gemm, launch)

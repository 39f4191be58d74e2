"""What a launch asks of the CUDA runtime, by one that only writes it down."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from native import compiled

SHARED_BYTES = 99 * 1024  # that launch.cpp's device has for a block
EARLY, ANYTHING = 1, 2  # what launch.cpp's device refuses
INVALID_HANDLE = 400  # cudaErrorInvalidResourceHandle
STATIC = 4368  # of sortPairsKernel, whose dynamic bytes go up to the 48 KB that need no asking


class Facts(ctypes.Structure):
    _fields_ = [
        (n, ctypes.c_int)
        for n in ("device", "ptx", "static_bytes", "asked", "times", "dynamic_bytes", "early", "launched")
        + ("cluster", "refuses", "last_error")
    ]


Launched = Callable[..., Facts]


@pytest.fixture
def launched(tmp_path: Path) -> Launched:
    # A copy of its own for each test: what is known of a kernel lasts as long as the library is loaded.
    own = tmp_path / "launch.so"
    own.write_bytes(compiled("launch").read_bytes())
    library = ctypes.CDLL(str(own))
    library.launch_facts.restype = ctypes.POINTER(Facts)
    facts: Facts = library.launch_facts().contents

    def launch(
        second: bool = False,
        early: bool = False,
        dynamic: int = 0,
        device: int = 0,
        ptx: int = 90,
        refuses: int = 0,
        code: int = 0,
        cluster: int = 1,
    ) -> Facts:
        facts.device, facts.ptx, facts.static_bytes, facts.refuses = device, ptx, STATIC, refuses
        assert library.launch_kernel(ctypes.c_bool(second), ctypes.c_bool(early), dynamic, cluster) == code
        assert facts.dynamic_bytes == dynamic
        return facts

    return launch


def test_a_kernel_may_have_all_that_its_static_memory_leaves(launched: Launched) -> None:
    """Under 48 KB too: the limit without asking is of static and dynamic together."""
    assert launched(dynamic=45 * 1024).asked == SHARED_BYTES - STATIC


def test_no_launch_takes_away_what_another_needs(launched: Launched) -> None:
    launched(dynamic=90 * 1024)
    facts = launched(dynamic=1024)
    assert (facts.asked, facts.times, facts.launched) == (SHARED_BYTES - STATIC, 1, 2)
    thread = threading.Thread(target=launched, kwargs={"dynamic": 1024})
    thread.start()
    thread.join()
    assert (facts.asked, facts.times) == (SHARED_BYTES - STATIC, 2)


def test_each_kernel_is_asked_for_on_each_device(launched: Launched) -> None:
    for second in (False, True):
        for device in (0, 1):
            launched(second, device=device)
    assert launched().times == 4


@pytest.mark.parametrize(("ptx", "early"), [(80, 0), (89, 0), (90, 1), (120, 1)])
def test_starts_early_only_where_the_code_has_the_wait(launched: Launched, ptx: int, early: int) -> None:
    """Code for sm_80 that a later GPU runs has none, whatever the GPU."""
    assert launched(early=True, ptx=ptx).early == early
    assert launched(early=False, ptx=ptx).early == 0


def test_an_early_launch_that_is_refused_is_repeated_as_any_other(launched: Launched) -> None:
    """With the same arguments, and no error is left for the caller to find."""
    facts = launched(early=True, dynamic=1024, refuses=EARLY)
    assert (facts.launched, facts.early, facts.last_error) == (2, 0, 0)


@pytest.mark.parametrize("early", [False, True])
def test_a_cluster_is_asked_for_where_there_is_one(launched: Launched, early: bool) -> None:
    assert launched(early=early).cluster == 0
    facts = launched(early=early, cluster=2)
    assert (facts.cluster, facts.early) == (2, early)


def test_a_cluster_stays_one_where_its_early_launch_is_refused(launched: Launched) -> None:
    facts = launched(early=True, cluster=2, refuses=EARLY)
    assert (facts.launched, facts.early, facts.cluster, facts.last_error) == (2, 0, 2, 0)
    assert launched(cluster=2, refuses=ANYTHING, code=INVALID_HANDLE).launched == 3


def test_what_is_refused_for_another_reason_is_an_error(launched: Launched) -> None:
    """Of a launch that is not early at once, and of an early one after the second try."""
    assert launched(refuses=ANYTHING, code=INVALID_HANDLE).launched == 1
    assert launched(early=True, refuses=ANYTHING, code=INVALID_HANDLE).launched == 3

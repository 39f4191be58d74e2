"""A launcher without a plugin in front of it refuses what its kernels do not take, and says why."""

from __future__ import annotations

import ctypes

import pytest
from native import beside_emulated
from plugin_cases import served

INVALID_VALUE = 1
# An op, the sizes of its launcher's struct (MoeRoute: and top_k), the reason.
NET = "mixed has C = {} channels, not G heads of D = 64 of q and of k, where G divides H, and H = 4 heads of V = 64"
CASES = [
    ("Rope", (2, 4, 2**30, 64, 32), "the product of BT is 2147483648, the kernels take 2147483647"),
    ("Rope", (1, 2**18, 1, 64, 32), "the product of H is 262144, the kernels take 262140"),
    ("Rope", (1, 4, 1, 30, 16), "cos has R = 16 angles, but x has D = 30 dimensions, fewer than 2 * R"),
    ("QkNormRope", (2, 2**30, 4, 2, 64, 32, 64), "the product of BT is 2147483648, the kernels take 2147483647"),
    ("QkNormRope", (1, 1, 2**15, 2**14, 64, 32, 64), "q, k and v have 65536 heads, the kernels take 65535"),
    ("QkNormRope", (1, 1, 1, 2**62, 64, 32, 64), f"q, k and v have {2**63 - 1} heads, the kernels take 65535"),
    ("QkNormRope", (1, 1, 4, 2, 30, 16, 30), "cos has R = 16 angles, but k has D = 30 dimensions, fewer than 2 * R"),
    ("QkNormRope", (1, 1, 4, 2, 64, 32, 63), "q has Q = 63 numbers a head, fewer than the D = 64 of k"),
    ("QkNormRope", (1, 1, 4, 2, 64, 32, 2**31), "the product of Q is 2147483648, the kernels take 2147483647"),
    ("QkNormRopeWrite", (2, 2**30, 4, 2, 64, 32, 64, 8), f"the product of BT is {2**31}, the kernels take {2**31 - 1}"),
    ("QkNormRopeWrite", (1, 1, 4, 2, 64, 32, 63, 8), "q has Q = 63 numbers a head, fewer than the D = 64 of k"),
    ("QkNormRopeWrite", (1, 1, 4, 2, 64, 32, 64, 2**31), "the product of S is 2147483648, the kernels take 2147483647"),
    ("AddRmsNorm", (2, 2**30, 8), "the product of BT is 2147483648, the kernels take 2147483647"),
    ("GatedRmsNorm", (2, 2**29, 2, 8), "the product of BTH is 2147483648, the kernels take 2147483647"),
    ("GatedAct", (1, 2**30, 2**10, 0), "the product of BTI is 1099511627776, the kernels take 1099511627264"),
    ("GatedAct", (2, 2**30, 8, 1), "the product of BT is 2147483648, the kernels take 2147483647"),
    ("GatedAct", (1, 1, 2**25, 1), "the product of I is 33554432, the kernels take 33553920"),
    ("CausalConv1d", (1, 1, 8, 5), "weight has K = 5 taps, the kernels are for 2 to 4"),
    ("CausalConv1d", (1, 1, 2**21, 4), "the product of C is 2097152, the kernels take 2097120"),
    ("CausalConv1d", (2**31, 0, 8, 4), "the product of B is 2147483648, the kernels take 2147483647"),
    ("MoeRoute", (1, 1, 513, 4), "E = 513 experts, the kernel holds 512"),
    ("MoeRoute", (1, 1, 8, 9), "top_k is 9, but there are E = 8 experts"),
    ("MoeExperts", (2**30, 2, 8, 64, 64), "the product of BTK is 2147483648, the kernels take 1073741824"),
    ("MoeExperts", (1, 2, 521, 64, 64), "E = 521 experts, the kernels sort 520"),
    ("SinkAttention", (1, 4, 2, 1, 1, 257), "heads have D = 257, over the 256 that the kernels are made for"),
    ("SinkAttention", (1, 4, 3, 1, 1, 64), "q has H = 4 heads, no multiple of the G = 3 of k and v"),
    ("SinkAttention", (1, 4, 0, 1, 1, 64), "q has H = 4 heads, no multiple of the G = 0 of k and v"),
    ("Wkv", (2**16, 1, 8), "the product of B is 65536, the kernels take 65535"),
    ("Wkv", (1, 1, 2**36), "the product of C is 68719476736, the kernels take 68719476704"),
    ("Wkv7", (1, 1, 4, 40, 64), "D is 40, but there are kernels for 16, 32, 64 and 128 only"),
    ("Wkv7", (1, 1, 2**16, 64, 64), "the product of H is 65536, the kernels take 65535"),
    ("GatedDeltaNet", (1, 1, 352, 4, 48, 64, 4), "D is 48, but there are kernels for 16, 32, 64 and 128 only"),
    ("GatedDeltaNet", (1, 2**29, 384, 4, 64, 64, 4), "the product of BTH is 2147483648, the kernels take 2147483647"),
    ("GatedDeltaNet", (1, 1, 640, 4, 64, 64, 4), NET.format(640)),
    ("GatedDeltaNet", (1, 1, 256, 4, 64, 64, 4), NET.format(256)),
    ("GatedDeltaNet", (1, 1, 416, 4, 64, 64, 4), NET.format(416)),
    ("GatedDeltaNet", (1, 1, 512, 4, 64, 64, 5), "weight has K = 5 taps, the kernels are for 2 to 4"),
    ("GatedDeltaNet", (1, 1, 2**21, 2**13, 128, 128, 4), "the product of C is 2097152, the kernels take 2097120"),
    ("GatedDeltaRule", (1, 1, 1, 4, 48, 64), "D is 48, but there are kernels for 16, 32, 64 and 128 only"),
    ("GatedDeltaRule", (1, 1, 0, 4, 64, 64), "v has H = 4 heads, no multiple of the G = 0 of q and k"),
    ("KimiDeltaRule", (1, 1, 4, 64, 12), "V is 12, but there are kernels for 16, 32, 64 and 128 only"),
    ("KimiDeltaRule", (1, 1, 2**16, 64, 64), "the product of H is 65536, the kernels take 65535"),
]


@pytest.fixture(scope="module")
def launchers() -> ctypes.CDLL:
    return beside_emulated("limits.cpp")


@pytest.mark.parametrize(("op", "sizes", "says"), CASES, ids=[f"{op}: {says}" for op, _, says in CASES])
def test_a_launcher_refuses_sizes_that_its_kernels_do_not_take(
    launchers: ctypes.CDLL, capfd: pytest.CaptureFixture[str], op: str, sizes: tuple[int, ...], says: str
) -> None:
    assert getattr(launchers, f"launch_{op}")((ctypes.c_int64 * len(sizes))(*sizes)) == INVALID_VALUE
    assert capfd.readouterr().err == f"llmexport: {op}: {says}\n"


def test_every_launcher_has_limits() -> None:
    assert {op for op, _, _ in CASES} == served()

"""KimiDeltaRule's launch plans: within every architecture's limits, every column and chunk taken, the workspace."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from delta_rule_plans import Launch, Plan, Plans
from hypothesis import given, settings
from hypothesis import strategies as st

FP32, FP16, BF16 = range(3)
MAX_GRID_X = 2**31 - 1
SHARED_BYTES = 99 * 1024  # that sm_86, sm_89 and sm_120 have; the others have more
# As in the kernels.
THREADS, SCAN_THREADS, COLUMNS, CHUNK, CHUNKS_OF_A_BLOCK, FEW_TOKENS = 128, 256, 32, 16, 4, 16
# Two parts of a tile of 32 lanes of 16 bytes, twice; two norms a token.
RECORD = 2 * 2 * 32 * 16 + 2 * CHUNK * 4


Sizes = tuple[int, int, int, int, int]


@pytest.fixture(scope="module")
def plans() -> Plans:
    return Plans("kimi")


@pytest.fixture(scope="module")
def plan(plans: Plans) -> Callable[[Sizes, int, bool], Plan]:
    return plans.plan


@pytest.fixture(scope="module")
def workspace(plans: Plans) -> Callable[[Sizes, int], int]:
    return plans.workspace


@st.composite
def nodes(draw: st.DrawFn) -> Sizes:
    tokens = draw(st.one_of(st.integers(0, 130), st.integers(1, 2**22)))
    rows, columns = (draw(st.sampled_from((16, 32, 64, 128))) for _ in range(2))
    return draw(st.integers(1, 512)), tokens, draw(st.integers(1, 512)), rows, columns


several = settings(max_examples=300, deadline=None, derandomize=True)


@several
@given(nodes(), st.integers(0, 2), st.booleans())
def test_every_column_and_chunk_is_taken_once(plan, sizes, dtype, aligned):
    b, t, h, d, v = sizes
    p, slices = plan(sizes, dtype, aligned), -(-v // COLUMNS)
    assert p.chunked == (aligned and dtype != FP32 and d >= 64 and t > FEW_TOKENS)
    assert p.width == (4 if aligned else 1)
    if not p.chunked:
        assert p.recurrence == Launch((slices, h, b), THREADS, 0)
        return
    blocks = -(-t // (CHUNK * CHUNKS_OF_A_BLOCK))
    assert blocks <= MAX_GRID_X
    assert p.prepare == Launch((blocks, h, b), THREADS, 0)
    assert (p.scan.grid, p.scan.threads) == ((slices, h, b), SCAN_THREADS)
    assert 0 < p.scan.shared <= SHARED_BYTES


@several
@given(nodes(), nodes(), st.integers(0, 2))
def test_workspace_is_a_record_a_chunk_and_enough_for_smaller_sizes(plan, workspace, sizes, others, dtype):
    b, t, h, _, _ = sizes
    needed = b * h * -(-t // CHUNK) * RECORD if plan(sizes, dtype, True).chunked else 0
    assert workspace(sizes, dtype) == needed
    # A profile bounds batch and tokens; the other sizes are the model's.
    largest = (max(b, others[0]), max(t, others[1]), *sizes[2:])
    assert workspace(largest, dtype) >= needed


@pytest.mark.parametrize(("d", "blocks_of_an_sm_90"), [(64, 3), (128, 2)])
def test_scan_leaves_room_for_others(plan, d, blocks_of_an_sm_90):
    """An SM of sm_90 has 228 KiB, of which the system takes 1 KiB of each block's."""
    p = plan((1, 4096, 32, d, d), BF16, True)
    assert (p.scan.shared + 1024) * blocks_of_an_sm_90 <= 228 * 1024

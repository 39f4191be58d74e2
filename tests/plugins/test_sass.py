"""The machine code of the kernels: what the compiler made of vectors, conversions and reads, for SM 90."""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from native import cuda_tool

# An instruction without its address and predicate: `STG.E.128`.
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", re.MULTILINE)
# The element type and the elements of an access are the first two template arguments of all.
WIDE = re.compile(
    r"(rope|qkNormRope|addRmsNorm|addRmsNormTwoPass|gatedAct|gatedActRows|gatedRmsNorm|gatedRmsNormTwoPass|causalConv1d|scaleInput|combine"
    r"|normedCombine|normedCombineTwoPass)Kernel<(__half|__nv_bfloat16|float), (?:\(int\))?(4|8)[,>]"
)
# The same with its address and, of a branch, where it goes.
PLACED = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)(?:(?<=BRA)[^;\n]*0x([0-9a-f]+))?", re.MULTILINE
)
Code = dict[str, list[str]]


def listed(listing: str) -> dict[str, str]:
    """The listing of each kernel, by its name as C++ writes it."""
    parts = re.split(r"^\s+Function : (\S+)$", listing, flags=re.MULTILINE)
    names = subprocess.run(["c++filt"], input="\n".join(parts[1::2]), capture_output=True, text=True, check=True).stdout
    return dict(zip(names.splitlines(), parts[2::2], strict=True))


def dumped(library: Path, what: str, arch: str) -> str:
    # cuobjdump calls nvdisasm.
    folders = [os.path.dirname(cuda_tool("nvdisasm")), os.environ.get("PATH", "")]
    environment = {**os.environ, "PATH": os.pathsep.join(folders)}
    command = [cuda_tool("cuobjdump"), what, "-arch", arch, library]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def listings(cuda_library: Path) -> dict[str, str]:
    return listed("".join(dumped(cuda_library, "-sass", arch) for arch in ("sm_90", "sm_90a")))


@pytest.fixture(scope="module")
def registers(cuda_library: Path) -> dict[str, int]:
    """Those that a thread of each kernel has at launch."""
    found = re.findall(r"^ Function (\S+):\n  REG:(\d+)", dumped(cuda_library, "-res-usage", "sm_90a"), re.MULTILINE)
    names = listed("".join(f"\tFunction : {name}\n" for name, _ in found))
    return dict(zip(names, (int(count) for _, count in found), strict=True))


@pytest.fixture(scope="module")
def code(listings: dict[str, str]) -> Code:
    """The instructions of each kernel."""
    return {name: INSTRUCTION.findall(listing) for name, listing in listings.items()}


@dataclass(frozen=True)
class Placed:
    """An instruction: its address and, of a branch, that of the next."""

    at: int
    op: str
    to: int


def placed(listing: str) -> list[Placed]:
    return [Placed(int(at, 16), op, int(to or "0", 16)) for at, op, to in PLACED.findall(listing)]


def loops(every: list[Placed]) -> list[list[Placed]]:
    """The instructions of each loop, that of a branch back to them included."""
    return [[i for i in every if b.to <= i.at <= b.at] for b in every if 0 < b.to < b.at]


def products(listing: str) -> list[Placed]:
    """The outermost loop over products of tensor cores."""
    return max((loop for loop in loops(placed(listing)) if any("HMMA" in i.op for i in loop)), key=len)


def wide(code: Code) -> Iterator[tuple[str, list[str]]]:
    """Kernels whose accesses have 16 bytes."""
    found = {name: match for name in code if (match := WIDE.search(name))}
    assert {match[1] for match in found.values()} == set(WIDE.pattern.split(")Kernel")[0].lstrip("(").split("|"))
    return ((name, code[name]) for name in found)


def test_vector_kernels_store_whole_vectors(code: Code) -> None:
    """gated_act's last blocks also have the elements that fill no vector: one store."""
    for name, instructions in wide(code):
        narrow = [i for i in instructions if i.startswith(("STG", "ST.")) and "128" not in i]
        assert len(narrow) <= ("gatedAct" in name), (name, narrow)
        assert any(i.startswith("STG") and "128" in i for i in instructions), name


def test_vector_kernels_load_whole_vectors(code: Code) -> None:
    """scale and what combines also read weights and experts, one at a time, a convolution where its row ends, and who
    writes a cache where its row begins."""
    for name, instructions in wide(code):
        loads = [i for i in instructions if i.startswith("LDG.")]
        assert any("128" in i for i in loads), name
        scalars = {"gatedActKernel": 2, "gatedActRowsKernel": 2, "causalConv1dKernel": 1}.get(
            name.partition("<")[0].rpartition("::")[2], "CacheRows" in name
        )
        if not re.search("scaleInput|[cC]ombine", name):
            assert len([i for i in loads if "128" not in i]) <= scalars, (name, loads)


def test_nothing_converts_one_value_to_16_bits(code: Code) -> None:
    """F2F has a sixteenth of the rate of F2FP, which converts a pair."""
    assert {n: i for n, its in code.items() for i in its if re.match(r"F2F\.(BF16|F16)", i)} == {}
    assert any(i.startswith("F2FP.BF16") for its in code.values() for i in its)


def test_exp_and_reciprocal_of_16_bit_results_take_one_instruction(code: Code) -> None:
    """Each: those that keep subnormals scale before and after, by a comparison and two products."""
    for name in (n for n in code if re.search(r"gatedActKernel<(__half|__nv_bfloat16), .*Silu", n)):
        assert not [i for i in code[name] if i.startswith("FSETP")], name


def test_no_16_bit_result_of_a_delta_rule_is_stored_on_its_own(code: Code) -> None:
    scans = [n for n in code if re.search("[sS]canKernel<", n)]
    assert len(scans) == 8
    assert [n for n in scans if any(i.startswith("STG.E.U16") for i in code[n])] == []


def test_a_recurrence_moves_its_state_by_whole_vectors(code: Code) -> None:
    """Eight rows of a thread's four columns, and y's four."""
    recurrences = [n for n in code if re.search(r"recurrenceKernel<\w+, (\(bool\)1|true), ", n)]
    assert len(recurrences) == 6
    for name in recurrences:
        stores = [i for i in code[name] if i.startswith("STG")]
        assert (len(stores), {*stores} <= {"STG.E.64", "STG.E.128"}) == (9, True), (name, stores)
        assert code[name].count("LDG.E.128") >= 8, name


# Of a chunk of the scan of GatedDeltaRule, by D: mma and instructions of the warps that carry the state, then of those
# that read it. Each has two branches of 30 mma of which a warp takes one.
SCAN_CHUNK = {"128": ((188, 853), (124, 800)), "64": ((124, 700), (92, 685))}
SCALING = 420  # instructions more of fp16, whose state is scaled by rows


# The same of KimiDeltaRule: of the warps that carry the state, and of those that make operands, which have no mma.
KIMI_SCAN_CHUNK = {"128": ((81, 380), (0, 701)), "64": ((45, 255), (0, 476))}


def is_move(op: str) -> bool:
    return op in ("MOV", "IMAD.MOV", "IMAD.MOV.U32", "PRMT")


def outermost(found: list[list[Placed]]) -> list[list[Placed]]:
    def inside(loop: list[Placed], other: list[Placed]) -> bool:
        return loop is not other and other[0].at <= loop[0].at and loop[-1].at <= other[-1].at

    return [loop for loop in found if not any(inside(loop, other) for other in found)]


def roles(listings: dict[str, str], kernel: str) -> Iterator[tuple[str, str, list[list[str]]]]:
    """Of each scan its type, D, and the instructions of a chunk of either half of its warps, copies last."""
    scans = {m: listings[n] for n in listings if (m := re.search(rf":{kernel}<(\w+), (?:\(int\))?(64|128)>", n))}
    assert len(scans) == 4
    for match, listing in scans.items():
        found = outermost(loops(placed(listing)))
        both = [ops for loop in found if len(ops := [i.op for i in loop if i.op != "NOP"]) > 100]
        assert len(both) == 2
        yield match[1], match[2], sorted(both, key=lambda ops: any(op.startswith("LDGSTS") for op in ops))


def spills_or_narrow(ops: list[str]) -> list[str]:
    return [op for op in ops if op.startswith(("LDL", "STL", "STS.U16", "LDS.U16", "STG.E.U16"))]


def test_a_scan_multiplies_what_lies_ready(listings: dict[str, str]) -> None:
    """No more instructions a chunk, and hardly a move: what a product takes lies in neighbouring registers."""
    for dtype, depth, both in roles(listings, "scanKernel"):
        for ops, (products, most) in zip(both, SCAN_CHUNK[depth], strict=True):
            assert sum("HMMA" in op for op in ops) == products, (dtype, depth)
            assert len(ops) <= most + (SCALING if dtype == "__half" else 0), (dtype, depth, len(ops))
            assert sum(map(is_move, ops)) <= (31 if dtype == "__half" else 8), (dtype, depth)
            assert spills_or_narrow(ops) == [], (dtype, depth)


def test_a_scan_of_kimi_multiplies_what_others_made(listings: dict[str, str]) -> None:
    for dtype, depth, both in roles(listings, "kimiScanKernel"):
        for ops, (products, most) in zip(both, KIMI_SCAN_CHUNK[depth], strict=True):
            assert sum("HMMA" in op for op in ops) == products, (dtype, depth)
            assert len(ops) <= most, (dtype, depth, len(ops))
            assert sum(map(is_move, ops)) <= 8, (dtype, depth)
            assert spills_or_narrow(ops) == [], (dtype, depth)


def test_a_chunk_is_prepared_by_vectors(code: Code) -> None:
    """Of the inverse of a tile four entries at a time are read; what is read alone are numbers of rows. No entry above
    the diagonal has a branch."""
    found = [n for n in code if re.search(r":prepareKernel<(__half|__nv_bfloat16), ", n)]
    assert len(found) == 4
    for name in found:
        ops = [op for op in code[name] if op != "NOP"]
        assert len(ops) <= 3080, (name, len(ops))
        assert ops.count("LDS") <= 60, (name, ops.count("LDS"))
        assert ops.count("BSSY") <= 8, (name, ops.count("BSSY"))
        assert {op for op in ops if op.startswith("STG")} <= {"STG.E", "STG.E.128"}, name


def test_decode_of_a_delta_net_moves_its_state_by_whole_vectors(code: Code) -> None:
    """As a recurrence; what it norms is stored last. A thread's channel of the convolution stores its last three inputs
    one by one, either those that moved up or those that did not."""
    kernels = [n for n in code if re.search(r"decodeKernel<\w+, (\(bool\)1|true)>", n)]
    assert len(kernels) == 3
    for name in kernels:
        stores = [i for i in code[name] if i.startswith("STG")]
        whole = [i for i in stores if i in ("STG.E.64", "STG.E.128")]
        assert (len(whole), len(stores) - len(whole) <= 6) == (9, True), (name, stores)
        assert code[name].count("LDG.E.128") >= 8, name


def projections(code: Code) -> list[str]:
    found = [n for n in code if "tensorCoreProjectionKernel<" in n]
    assert found
    return found


def is_for_few_rows(name: str) -> bool:
    return bool(re.search(r"TileShape<(\(int\))?16, ", name))


def test_a_projection_reads_what_was_sorted_past_the_l1(code: Code) -> None:
    """It may read before its own wait, when nothing has emptied that: the tile, and the pairs of its rows."""
    for name in projections(code):
        strong = {i for i in code[name] if i.startswith("LDG.E") and "STRONG.GPU" in i}
        assert strong == {"LDG.E.128.STRONG.GPU", "LDG.E.STRONG.GPU"}, name


def test_scales_of_mxfp4_are_read_eight_at_a_time(code: Code) -> None:
    """Of many rows; those of few are copied as they lie, and no register has them before their use."""
    for name in (n for n in projections(code) if "Mxfp4" in n):
        if is_for_few_rows(name):
            assert not {"LDG.E.U8", "STS.U8"} & {*code[name]}, name
            continue
        scales = [i for i in code[name] if i in ("LDG.E.U8", "STS.U8")]
        runs = [len(run) for run in re.findall("(?:L)+", "".join(i[0] for i in scales))]
        assert scales[0] == "LDG.E.U8", name
        assert min(runs) >= 8, (name, runs)


# A warp's part of a stage of MXFP4 for few rows: 32 columns, 128 deep.
STAGE_BYTES = 32 * 128 // 2
# 52 instructions for 256 bytes. An SM of an H100 reads 12.8 bytes a cycle, of an H200 16.5: these take 2.6 and 3.4 of
# the 4 instructions that it issues at most.
BYTES_PER_INSTRUCTION = 4.9
SUMS = 4  # of a warp, each of which waits for its product before


def for_few_rows(listings: dict[str, str], weights: str) -> list[str]:
    found = [n for n in listings if "tensorCoreProjectionKernel<" in n and f"{weights}, " in n]
    few = [n for n in found if is_for_few_rows(n)]
    assert len(few) == 2
    return few


def usual_products(listing: str) -> list[Placed]:
    """The loop of MXFP4 without what it skips if no scale of a warp is rare: that alone packs floats."""
    loop = products(listing)
    skipped = [[i for i in loop if b.at < i.at < b.to] for b in loop if b.at < b.to <= loop[-1].at]
    rare = min((part for part in skipped if any(i.op.startswith("F2FP") for i in part)), key=len)
    return [i for i in loop if i not in rare and i.op != "NOP"]


def test_decode_of_mxfp4_reads_as_fast_as_an_h100(listings: dict[str, str]) -> None:
    for name in for_few_rows(listings, "Mxfp4"):
        run = usual_products(listings[name])
        assert sum("HMMA" in i.op for i in run) == STAGE_BYTES // 64, name
        assert STAGE_BYTES / len(run) >= BYTES_PER_INSTRUCTION, (name, len(run))


def test_products_of_mxfp4_are_apart(listings: dict[str, str]) -> None:
    """A sum takes its next product some 33 cycles later; in the meantime the warp decodes."""
    for name in for_few_rows(listings, "Mxfp4"):
        at = [i for i, its in enumerate(usual_products(listings[name])) if "HMMA" in its.op]
        apart = [b - a for a, b in zip(at, at[SUMS:], strict=False)]
        assert min(apart) >= 16, (name, apart)


@pytest.mark.parametrize(("weights", "divisions"), [("Packed4", 0), ("Packed8", 1)])
def test_a_stage_of_packed_weights_divides_once_at_most(listings: dict[str, str], weights: str, divisions: int) -> None:
    """For a column's factor. The groups of its entries come of products: a division takes 20 instructions."""
    for name in for_few_rows(listings, weights):
        reciprocals = [i.op for i in products(listings[name]) if i.op == "MUFU.RCP"]
        assert len(reciprocals) == divisions, (name, reciprocals)


def test_decode_of_4_bits_reads_scales_from_shared_memory(listings: dict[str, str]) -> None:
    for name in for_few_rows(listings, "Packed4"):
        accesses = {i.op for i in products(listings[name]) if i.op.startswith(("LDG.", "STS"))}
        assert accesses == set(), name


def test_a_router_of_whole_warps_finds_the_best_key_in_one_instruction(listings: dict[str, str]) -> None:
    """Of 8 keys a lane, which move up where the best one was; no place is divided by lanes."""
    found = [n for n in listings if re.search(r"moeRouteKernel<\w+, unsigned int, (\(int\))?8>", n)]
    assert len(found) == 2
    for name in found:
        best = [loop for loop in loops(placed(listings[name])) if any(i.op.startswith("REDUX") for i in loop)]
        assert min(map(len, best)) <= 24, name
        assert not [i for loop in best for i in loop if i.op.startswith(("I2F", "MUFU"))], name


def test_warpgroups_take_no_more_registers_than_a_block_has(
    listings: dict[str, str], registers: dict[str, int]
) -> None:
    """One warpgroup of three gives, two take; those would wait for ever for a register that is not there."""
    found = {name: its for name in registers if (its := re.findall(r"USETMAXREG\.\w+.*?0x([0-9a-f]+)", listings[name]))}
    assert len(found) == 2 * 10 + 12 + 2 * 6
    for name, (taken, given) in found.items():
        assert 2 * int(taken, 16) + int(given, 16) <= 3 * registers[name], name


def in_clusters(listings: dict[str, str]) -> list[str]:
    found = [n for n in listings if "groupedGemmKernel<" in n and "::ClusterRing>" in n]
    assert len(found) == 10
    return found


def test_a_block_of_a_cluster_loads_its_half_of_the_weights_for_all(listings: dict[str, str]) -> None:
    """A box, or two of weights that are transposed, and nothing that the other block does not get."""
    for name in in_clusters(listings):
        boxes = 2 if re.search(r"<\w+, (\(bool\)1|true),", name) else 1
        assert re.findall(r"UTMALDG[\w.]*", listings[name]) == boxes * ["UTMALDG.4D.MULTICAST"], name


def test_no_step_of_a_cluster_is_a_fence_for_the_whole_gpu(listings: dict[str, str]) -> None:
    """A release for the cluster would be one, and an acquire would empty the L1, in each step."""
    for name in in_clusters(listings):
        every = [[i.op for i in loop] for loop in loops(placed(listings[name]))]
        multiplying, loading = (
            min((ops for ops in every if any(op.startswith(its) for op in ops)), key=len)
            for its in ("HGMMA", "UTMALDG")
        )
        assert sum(op.startswith("HGMMA") for op in multiplying) == 4, name
        assert [op for op in multiplying if op.startswith(("MEMBAR", "CCTL"))] == [], name
        assert {op for op in loading if op.startswith(("MEMBAR", "CCTL"))} == {"MEMBAR.ALL.CTA"}, name


def test_blocks_of_a_cluster_wait_for_each_other_twice(listings: dict[str, str]) -> None:
    """For the barriers of both, and before either ends."""
    for name in in_clusters(listings):
        found = re.findall(r"UCGABAR_\w+", listings[name])
        assert found == 2 * ["UCGABAR_ARV", "UCGABAR_WAIT"], name


def test_a_routing_cluster_waits_for_no_store_and_has_weights_under_way(listings: dict[str, str]) -> None:
    """It writes behind its first barrier, the last shows nothing, and of each step of a product, of which two are read
    at a time, a lane has whole vectors: of two rows, and of two or five tiles of weights."""
    found = [n for n in listings if re.search(r"normedRouteClusterKernel<(__half|__nv_bfloat16),", n)]
    assert len(found) == 12
    for name in found:
        code = placed(listings[name])
        ops = [i.op for i in code]
        assert [op for op in ops if op.startswith("UCGABAR")] == 3 * ["UCGABAR_ARV", "UCGABAR_WAIT"], name
        assert ops.count("MEMBAR.ALL.GPU") == 2, name
        assert not [op for op in ops[: ops.index("UCGABAR_ARV")] if op.startswith("STG")], name
        steps = [Counter(i.op.split(".16816")[0] for i in loop) for loop in loops(code)]
        inner = {(c["HMMA"], c["LDG.E.128"]) for c in steps if c["HMMA"]}
        assert {(2 * 2 * 2, 2 * (2 + 2)), (2 * 2 * 5, 2 * (2 + 5))} <= inner, (name, inner)


# What a warpgroup does with the barriers of a step: it waits for keys, values and its turn, and gives that before it
# waits for a product.
TURN = ["TRYWAIT", "TRYWAIT", "TRYWAIT", "HGMMA", "ARRIVE", "DEPBAR", "ARRIVE", "DEPBAR", "ARRIVE"]


def test_an_attending_warpgroup_starts_all_products_of_its_turn_at_once(listings: dict[str, str]) -> None:
    found = [n for n in listings if re.search(r"sinkAttentionSm90aKernel<\w+, (\(int\))?\d+, (\(bool\)1|true)>", n)]
    assert len(found) == 6
    for name in found:
        ops = re.findall(r"SYNCS\.\w+\.TRANS64\.(TRYWAIT)|(HGMMA)|SYNCS\.(ARRIVE)|WARPGROUP\.(DEPBAR)", listings[name])
        steps = [next(filter(None, op)) for op in ops]
        merged = [op for op, before in zip(steps, ["", *steps], strict=False) if (op, before) != ("HGMMA", "HGMMA")]
        assert any(merged[i : i + len(TURN)] == TURN for i in range(len(merged))), (name, merged)

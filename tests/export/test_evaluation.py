"""What TensorRT reads of an export, computed in a process of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import planted
import pytest
from arch_cases import COMPUTED, MATRIX, ONCE, UNBOUND, Case, others_slow
from first_feed import first_feed
from native import emulated_library

from llmexport.export import beside, builder, manifest
from llmexport.export.engine_record import WEIGHTS
from llmexport.export.errors import EngineError
from llmexport.export.evaluation import Uncomputed, evaluator
from llmexport.plugins import library
from llmexport.plugins.joined import JOINED
from llmexport.plugins.shared_route import SHARED_ROUTES
from llmexport.validate import stages
from llmexport.validate.compare import compare
from llmexport.validate.tolerance import TOLERANCE

pytestmark = pytest.mark.engine


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def test_one_process_computes_any_number_of_feeds(exported, work: Path) -> None:
    export = manifest.read(exported("gemma"))
    [graph] = export.graphs
    with evaluator(export, graph, work) as network:
        prompts = [stages.prompt(export, batch=b, tokens=t, seed=b) for b, t in ((1, 2), (3, 9), (1, 2))]
        feeds = [first_feed(graph, prompt) for prompt in prompts]
        first, other, again = (network.run(feed) for feed in feeds)
        assert network.child.poll() is None
    assert network.child.poll() is not None
    assert list(first) == [p.name for p in graph.assembly.outputs]
    assert all((first[n] == again[n]).all() and first[n].shape != other[n].shape for n in first)


def test_a_layer_that_is_not_known_is_named(exported, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = """
image = network.add_constant((1, 1, 4, 4), np.zeros(16, np.float32)).get_output(0)
network.add_pooling_nd(image, trt.PoolingType.MAX, (2, 2))
"""
    monkeypatch.setattr(builder, "COMMAND", planted.builder(pool))
    export = manifest.read(exported("llama", block="embedding"))
    reason = r"^TensorRT's network cannot be computed: layer .* \(POOLING\): layers of this kind are not known here$"
    with pytest.raises(Uncomputed, match=reason), evaluator(export, export.graphs[0], work):
        raise AssertionError("it is ready")


def test_a_layer_that_cannot_be_computed_of_these_numbers_is_named_and_others_still_are(exported, work: Path) -> None:
    export = manifest.read(exported("llama", block="embedding"))
    [graph] = export.graphs
    with evaluator(export, graph, work) as network:
        right = {p.name: np.zeros((1, 2), np.int64) for p in graph.assembly.inputs}
        with pytest.raises(Uncomputed, match=r"layer .* \(GATHER\) of .*: reads -1 to -1 of \d+ entries$"):
            network.run({n: a - 1 for n, a in right.items()})
        assert network.run(right)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("os.kill(os.getpid(), 11)", "was killed by SIGSEGV"),
        ("raise SystemExit(3)", "ended with exit code 3"),
        ("time.sleep(60)", "was stopped after 3 s"),
    ],
)
@pytest.mark.parametrize("when", ["as it is read", "as it is computed"])
def test_a_death_is_an_error(
    change: str, reason: str, when: str, exported, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = manifest.read(exported("llama", block="embedding"))
    [graph] = export.graphs
    dies = change if when == "as it is read" else f"def run(self, feed): {change}\nprogram.Program.run = run"
    monkeypatch.setattr(builder, "COMMAND", planted.builder(dies))
    timeout = 3 if "sleep" in change else None
    dead = pytest.raises(EngineError, match=f"^TensorRT's builder {reason}")
    with dead, evaluator(export, graph, work, timeout=timeout) as network:
        network.run({p.name: np.zeros((1, 2), np.int64) for p in graph.assembly.inputs})


def test_a_plugin_says_every_attribute_that_it_holds(exported, work: Path) -> None:
    """What TensorRT's parser gave the plugins is read back from them, and computed by the references."""
    export = manifest.read(exported("gpt_oss"))
    [graph] = export.graphs
    feed = first_feed(graph, stages.prompt(export))
    (work / "bodies").mkdir()
    (work / "plugins").mkdir()
    with evaluator(export, graph, work / "bodies") as network:
        wanted = network.run(feed)
    with evaluator(export, graph, work / "plugins", plugins=emulated_library()) as network:
        found = network.run(feed)
    assert max(compare(wanted[n], found[n]).excess(TOLERANCE["float32"]) for n in wanted) <= 1


@pytest.mark.parametrize(("case", "dtype"), others_slow(ONCE, ONCE[:1]), ids=str)
def test_weights_beside_the_network_are_what_they_are_inside(
    case: Case, dtype: str, exported, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products read them transposed, as they are stored, and the numbers are the same."""
    monkeypatch.setattr(beside, "LARGE", MATRIX)
    export = manifest.read(exported(case, dtype))
    graph = export.graphs[0]
    if case.arch in COMPUTED:
        with pytest.raises(EngineError, match=UNBOUND), evaluator(export, graph, work, weights="beside"):
            pass
        return
    made = []
    for weights in WEIGHTS:
        (work / weights).mkdir()
        with evaluator(export, graph, work / weights, weights=weights) as network:
            made.append(network.run(first_feed(graph, stages.prompt(export), dtype)))
    inside, outside = made
    worst = max(compare(inside[n], outside[n]).excess(TOLERANCE[dtype]) for n in inside)
    assert worst <= 1


@pytest.mark.parametrize(("arch", "dtype"), [("gpt_oss", "float32"), ("glm4_moe", "float16")])
def test_routers_that_are_one_with_a_norm_read_weights_beside_the_network_too(
    arch: str, dtype: str, exported_as_stored, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways round the same plugins compute the same, with shared experts and all products apart."""
    served = library.served(emulated_library()) - {*SHARED_ROUTES}
    served -= {name for name in served if JOINED in name}
    monkeypatch.setattr(library, "served", lambda path: served)
    monkeypatch.setattr(beside, "LARGE", MATRIX // 8)
    export = manifest.read(exported_as_stored(arch, dtype))
    [graph] = export.graphs
    feed, made = first_feed(graph, stages.prompt(export), dtype), []
    for weights in WEIGHTS:
        (work / weights).mkdir()
        with evaluator(export, graph, work / weights, plugins=emulated_library(), weights=weights) as network:
            assert [*network.nodes.values()].count("NormedMoeRoute") == graph.ops["MoeRoute"]
            made.append(network.run(feed))
    inside, outside = made
    assert max(compare(inside[n], outside[n]).excess(TOLERANCE[dtype]) for n in inside) <= 1

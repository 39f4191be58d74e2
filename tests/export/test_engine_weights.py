"""Networks whose weights are inputs: a real parser and builder, no GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from arch_cases import FIRST, ONCE, Case, others_slow
from native import emulated_library
from test_beside import SMALL

from llmexport.export import beside, builder, engine, manifest
from llmexport.export.spec import DTYPES

trt = pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx")
pytestmark = pytest.mark.engine
Exporter = Callable[..., Path]


class Read(Exception):
    """The network was read, and what follows is no part of the test."""


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "LARGE", SMALL)


EACH = [(c, d, p) for c in FIRST for d in DTYPES for p in (True, False)]
AT_ONCE = [(c, d, i % 3 > 0) for i, (c, d) in enumerate(ONCE)]


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("case", "dtype", "plugins"), others_slow(EACH, AT_ONCE), ids=str)
def test_no_network_makes_a_weight_anew_at_every_step(
    case: Case, dtype: str, plugins: bool, exported: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks: list[builder.Network] = []
    run = builder.run

    def read(work: Path, module: str, timeout: float | None, check: Callable[[builder.Network], None]) -> None:
        def then_end(network: builder.Network) -> None:
            networks.append(network)
            check(network)
            raise Read

        run(work, module, timeout, then_end)

    monkeypatch.setattr(builder, "run", read)
    export = manifest.read(exported(case, dtype))
    with pytest.raises(Read):
        engine.build(export.folder, plugins=emulated_library() if plugins else None, weights="beside")
    [network] = networks
    assert network.computed == []
    assert len(network.inputs) > len(export.graphs[0].assembly.inputs) + 2 * len(export.blocks)

"""From an export to TensorRT engines: `<graph>.plan` for each graph, and `engine.json`, in the export's own folder."""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmexport.export import builder, device, engine_job, engine_kernels, manifest
from llmexport.export.engine_backend import check_backend
from llmexport.export.engine_build import PLAN
from llmexport.export.engine_record import RECORD, WEIGHTS, Engine, Library, Plan
from llmexport.export.errors import EngineError
from llmexport.export.exported import Export, ExportedGraph
from llmexport.export.output import write_errors
from llmexport.export.packed.engine_form import needs
from llmexport.export.profile import Profile
from llmexport.export.progress import Progress, silent
from llmexport.export.spec import Port, Sizes
from llmexport.export.workspace import workspace
from llmexport.plugins import library
from llmexport.plugins.dtypes import BY_TENSORRT
from llmexport.plugins.regular import sha256

LONGEST = 10**8  # seconds: three years, which a timer still takes


def build(
    folder: Path,
    *,
    backend: str = "tensorrt-rtx",
    profile: Profile | None = None,
    plugins: Path | None = None,
    weights: str = "inside",
    timeout: float | None = None,
    verify: bool = False,
    progress: Progress = silent,
) -> Engine:
    """Builds an engine of every graph of the export in `folder` and writes them there, `engine.json` last.

    plugins: the plugin library, whose kernels take the place of the ops it serves; other ops, or all if it is
    None, are built from their function bodies.

    weights: "inside" the plans, or "beside" them: the large ones are inputs, as `binding.weights` gives them.

    timeout: seconds until the builder of a graph is given up, None to wait. Whatever fails before all plans are built,
    earlier engines stay. verify: every byte of the weights is held against the digests of the export.
    Raises EngineError, and ExportError if `folder` is no export, was changed since, or cannot be written.
    """
    chosen = check_backend(backend)
    if timeout is not None and not 1 <= timeout <= LONGEST:
        raise EngineError(f"timeout is {timeout:g}: make it 1 to {LONGEST} seconds")
    if weights not in WEIGHTS:
        raise EngineError(f"weights is {weights!r}: choose one of {', '.join(WEIGHTS)}")
    folder = Path(os.path.realpath(folder))
    export = manifest.read(folder)
    sizes = (profile or Profile()).resolve((p for g in export.graphs for p in g.assembly.inputs), export.blocks)
    if verify:
        progress("verify the weights", 0, 1)
        export = manifest.verified(export)
    served = library.served(plugins) if plugins else frozenset()
    gpu = None if chosen.least else device.first()
    built_on = gpu if isinstance(gpu, device.Device) else None
    least, why = max((chosen.least or (0, 0), ""), needs(export.plain_matrices(export.checkpoint())) or ((0, 0), ""))
    if built_on and built_on.capability < least:
        raise EngineError(f"{why} weights need compute capability {_text(least)} or later, here is {built_on.text}")
    with write_errors(folder / plan_name(export.graphs[0].name)), workspace(folder) as work:
        wants = f" for compute capability {_text(least)} and later, as weights are {why}" if why else ""
        job = _Job(export, chosen.module, sizes, plugins, served, weights, timeout, work, progress, wants)
        plans: dict[str, Plan] = {}
        for place, graph in enumerate(export.graphs):
            try:
                plans[graph.name], version = job.build(place, graph)
            except EngineError as error:
                if len(export.graphs) == 1:
                    raise
                raise EngineError(f"{graph.name}: {error}") from error
        used = any(p.plugins for p in plans.values())
        engine = Engine(
            backend=backend,
            version=version,
            target=chosen.runs_on(_text(least)) + (f", as weights are {why}" if why else ""),
            least=least if chosen.least or why else None,
            built_on=built_on,
            arch=export.arch,
            block=export.block,
            dtype=export.dtype,
            weights_at=weights,
            weights=export.weights,
            checked=export.checked,
            profile=sizes,
            plugins=(Library(str(plugins), _sha256(plugins)),) if plugins and used else (),
            graphs=plans,
        )
        export.check_untouched()
        _place(work, folder, engine)
    progress("engine", 2 * len(plans), 2 * len(plans))
    return engine


def _text(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def plan_name(graph: str) -> str:
    return f"{graph}.plan"


@dataclass(frozen=True)
class _Job:
    """The graphs of an export to build, each in a folder of its own in `work`."""

    export: Export
    module: str
    sizes: Mapping[str, Sizes]
    library: Path | None
    served: frozenset[str]
    weights: str
    timeout: float | None
    work: Path
    progress: Progress
    wants: str

    def build(self, place: int, graph: ExportedGraph) -> tuple[Plan, str]:
        """Leaves the plan of a graph, the `place`-th, in its folder; returns it and the version of TensorRT."""
        steps, assembly, work = 2 * len(self.export.graphs), graph.assembly, self.work / graph.name
        self.progress("engine: read", 2 * place, steps)
        job = engine_job.prepare(self.export, graph, self.module, self.library, self.served, self.weights)
        nodes, bindings = job.nodes, job.bindings
        work.mkdir()
        job.write(work, profile={p.name: _shapes(p, self.sizes) for p in assembly.inputs})
        dtype = self.export.dtype
        inputs, outputs = (tuple(p.typed(dtype) for p in ports) for ports in (assembly.inputs, assembly.outputs))

        def check(read: builder.Network) -> None:
            check_plugins(nodes, read.plugins)
            check_ports((*inputs, *(Port(n, b.shape, b.dtype) for n, b in bindings.items())), read.inputs)
            check_ports(outputs, read.outputs)
            if read.computed:
                raise EngineError(f"TensorRT would compute weights at every step, by {', '.join(read.computed[:5])}")
            self.progress(f"engine: build{self.wants}", 2 * place + 1, steps)

        ran = builder.run(work, self.module, self.timeout, check)
        plan = Plan(
            file=plan_name(graph.name),
            bytes=(work / PLAN).stat().st_size,
            sha256=_sha256(work / PLAN),
            model_sha256=graph.sha256,
            inputs=inputs,
            outputs=outputs,
            carried=graph.carried,
            bindings=bindings,
            layers=ran.network.layers,
            plugins=dict(collections.Counter(nodes.values())),
            messages=ran.messages,
            seconds=ran.seconds,
            kernels=engine_kernels.with_launches(ran.kernels, job.launches),
        )
        return plan, ran.network.version


def _shapes(port: Port, sizes: Mapping[str, Sizes]) -> list[list[int]]:
    """Its least, best and largest shape."""
    return [[d if isinstance(d, int) else sizes[d][i] for d in port.shape] for i in range(3)]


def check_plugins(nodes: dict[str, str], layers: list[str]) -> None:
    """Every node left to a plugin must be a plugin layer, and no other may."""
    if sorted(layers) != sorted(nodes):
        odd = sorted(set(nodes).symmetric_difference(layers))[:5]
        raise EngineError(f"TensorRT made {len(layers)} plugin layers of {len(nodes)} ops, see {', '.join(odd)}")


def check_ports(ports: tuple[Port, ...], found: list[list[Any]]) -> None:
    """What TensorRT read, [name, type, shape with -1] each, must be what the export says."""
    said = {p.name: [p.dtype, [d if isinstance(d, int) else -1 for d in p.shape]] for p in ports}
    read = {name: [BY_TENSORRT[kind].name if kind in BY_TENSORRT else kind, shape] for name, kind, shape in found}
    for name in said | read:
        if said.get(name) != read.get(name):
            raise EngineError(f"TensorRT reads {name} as {read.get(name)}, the export says {said.get(name)}")


def _place(work: Path, folder: Path, engine: Engine) -> None:
    with open(work / RECORD, "x") as file:
        json.dump(engine.as_data(), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for name, plan in engine.graphs.items():
        os.replace(work / name / PLAN, folder / plan.file)
    # The record last: its digests of the plans say whether they belong together.
    os.replace(work / RECORD, folder / RECORD)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return sha256(file)

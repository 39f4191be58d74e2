"""What a validation found, and the files that say so beside the model: `report.json` and `report.html`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from llmexport.export.values import finite
from llmexport.validate.compare import Difference
from llmexport.validate.metrics import Metrics
from llmexport.validate.tolerance import MOST, Tolerance

REFERENCE = "PyTorch / transformers"  # the rung against code that nobody here wrote

LISTED = 10  # tensors that people are told of


@dataclass
class Rung:
    """One comparison; `difference` is the worst of its `details`.

    `status` is pass, fail or not run; `note` says why a rung was not run, or what it lacks; `key` is the name that
    users choose it by; `metrics` are of a whole model with logits.
    """

    name: str
    status: str
    note: str = ""
    difference: Difference | None = None
    tolerance: Tolerance | None = None
    details: list[dict[str, Any]] = field(default_factory=list)
    key: str = ""
    metrics: Metrics | None = None


@dataclass(frozen=True)
class Node:
    """A node of a graph's file that computes another output than it should.

    over: it leaves tolerance alone; else it is the one that is furthest off. said: how it differs from the node that
    an export makes.
    """

    name: str
    op: str
    output: str
    difference: Difference | None
    allowed: Tolerance
    over: bool
    said: str


@dataclass(frozen=True)
class Bisection:
    """Where an export leaves tolerance first.

    block: the detail of the rung over blocks, None if no block does. node: in that block. said: why there is no block,
    or no node. weights: sentences on the tensors that are not the checkpoint's. rungs: the others that failed, with
    what they say of the place.
    """

    block: dict[str, Any] | None
    node: Node | None
    said: str
    weights: tuple[str, ...]
    rungs: dict[str, str]

    @property
    def found(self) -> bool:
        return bool(self.block or self.weights or self.rungs)

    @property
    def lines(self) -> list[tuple[str, str]]:
        """What was found, for people: of what, and what."""
        if not self.found:
            return [("bisect", "nothing leaves tolerance")]
        lines = []
        if self.block:
            where = f"{self.block['step']} ({self.block['kind']}), {self.block['output']} in {self.block['run']}"
            difference = self.block["difference"]
            off = _off(difference, self.block["allowed"]) if difference else "ONNX Runtime stops in it"
            lines.append(("first block", f"{where}: {off}"))
        else:
            lines.append(("first block", self.said or "none leaves tolerance"))
        if self.node:
            off = f"{_off(self.node.difference, self.node.allowed)}; " if self.node.difference else ""
            near = "" if self.node.over else "within tolerance, and the furthest off; "
            text = f"{self.node.name} ({self.node.op}), {self.node.output}: {off}{near}{self.node.said}"
            lines.append(("first node", text))
        elif self.block:
            lines.append(("first node", self.said))
        lines += [("weight", said) for said in self.weights[:LISTED]]
        lines += [("weight", f"and {len(self.weights) - LISTED} more")] if len(self.weights) > LISTED else []
        return lines + [("fails", f"{name}: {note}" if note else name) for name, note in self.rungs.items()]


def _off(difference: Difference, allowed: Tolerance) -> str:
    return f"{difference.max_abs:.1e} max abs, {difference.rms_ratio:.1e} rms ratio (allowed {allowed.text})"


@dataclass
class Report:
    """All rungs, in order, and how long the runners took.

    seconds: by runner, the medians of `prefill` (further calls of the prompt, once all stages have been run) and of
    `decode` (the decode steps, one call each): of PyTorch the time in its modules, of ONNX Runtime that in `run`.
    prompt: the sizes of what was run. weights: how much of them was read to tell that they are those exported.
    asked: the rungs that the user chose; none if all were to be run that can. calls: of how many calls each median is.
    bisect: where it leaves tolerance first, if that was asked for. largest: in float16, the largest magnitude that
    each block makes over all stages, by its place. warning: what that is to tell, or nothing. moved: what the tokens
    of the unquantised checkpoint tell, where one was given.
    """

    rungs: list[Rung]
    seconds: dict[str, dict[str, float]]
    prompt: dict[str, Any]
    weights: str = ""
    asked: tuple[str, ...] = ()
    calls: dict[str, dict[str, int]] = field(default_factory=dict)
    bisect: Bisection | None = None
    largest: dict[str, float] = field(default_factory=dict)
    warning: str = ""
    moved: Metrics | None = None

    @property
    def passed(self) -> bool:
        """No rung failed, at least one was run, and none that the user chose was not."""
        ran = [r for r in self.rungs if r.status != "not run"]
        left = [r for r in self.rungs if r.status == "not run" and r.key in self.asked]
        wrong = self.bisect is not None and self.bisect.found
        return bool(ran) and not left and not wrong and all(r.status == "pass" for r in ran)

    @property
    def verdict(self) -> str:
        """One line for people, which does not claim more than was run."""
        if not self.passed:
            return "not proven: see the rungs"
        compared = any(r.name.startswith(REFERENCE) and r.status == "pass" for r in self.rungs)
        return "every rung that was run passed" + ("" if compared else "; not compared with transformers")

    def as_data(self) -> dict[str, Any]:
        """JSON data, in which a number that is not finite is text."""
        return finite(asdict(self) | {"passed": self.passed, "verdict": self.verdict})


def rung_of(name: str, details: list[dict[str, Any]]) -> Rung:
    """Passes if every detail is within what is allowed of it, and no step's reference is everywhere one number, which
    a model that computes nothing would equal too; shows the one that comes nearest to what is allowed."""
    worst = max(details, key=lambda d: d["difference"].excess(d["allowed"]))
    difference, tolerance = worst["difference"], worst["allowed"]
    varied = {d["step"] for d in details if d["difference"].spread != 0}
    flat = list(dict.fromkeys(d["step"] for d in details if d["step"] not in varied))
    status = "pass" if difference.excess(tolerance) <= 1 and not flat else "fail"
    note = f"proves nothing: the reference is one number everywhere, in step {flat[0]}" if flat else ""
    if status == "fail" and tolerance.cut and not flat:
        note = f"tells little: a right run may be {MOST} from fp32 in this type, validate a float32 export too"
    return Rung(name, status, note, difference, tolerance, details)

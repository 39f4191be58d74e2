"""What a validation found, and the files that say so beside the model: `report.json` and `report.html`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from llmexport.export.values import finite
from llmexport.validate.compare import Difference
from llmexport.validate.tolerance import Tolerance

REFERENCE = "PyTorch / transformers"  # the rung against code that nobody here wrote


@dataclass
class Rung:
    """One comparison; `difference` is the worst of its `details`.

    `status` is pass, fail or not run; `note` says why a rung was not run, or what it lacks; `key` is the name that
    users choose it by.
    """

    name: str
    status: str
    note: str = ""
    difference: Difference | None = None
    tolerance: Tolerance | None = None
    details: list[dict[str, Any]] = field(default_factory=list)
    key: str = ""


@dataclass
class Report:
    """All rungs, in order, and how long the runners took.

    seconds: by runner, the medians of `prefill` (further calls of the prompt, once all stages have been run) and of
    `decode` (the decode steps, one call each): of PyTorch the time in its modules, of ONNX Runtime that in `run`.
    prompt: the sizes of what was run. weights: how much of them was read to tell that they are those exported.
    asked: the rungs that the user chose; none if all were to be run that can.
    """

    rungs: list[Rung]
    seconds: dict[str, dict[str, float]]
    prompt: dict[str, Any]
    weights: str = ""
    asked: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """No rung failed, at least one was run, and none that the user chose was not."""
        ran = [r for r in self.rungs if r.status != "not run"]
        left = [r for r in self.rungs if r.status == "not run" and r.key in self.asked]
        return bool(ran) and not left and all(r.status == "pass" for r in ran)

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

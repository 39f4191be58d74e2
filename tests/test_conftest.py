"""What the tests need of the machine they run on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import NOT_FOR_KERNELS

TESTS = Path(__file__).parent
BLOCK = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {NOT_FOR_KERNELS}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
"""


def ran(cwd: Path, ahead: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """pytest in a process of its own, with a folder ahead of its path."""
    path = os.pathsep.join(filter(None, [str(ahead), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    env = {**os.environ, "PYTHONPATH": path, **variables}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.mark.kernel
def test_gpu_tests_are_collected_without_what_kernels_do_not_need(tmp_path: Path) -> None:
    """All of them: a file that is skipped then has none."""
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    done = ran(TESTS.parent, tmp_path, "-m", "gpu", "--collect-only")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    skipped = set(re.findall(r"^SKIPPED \[1\] (\S+):0: \w+ is not installed", done.stdout, re.MULTILINE))
    assert "tests/graphs/test_pipeline.py" in skipped
    gpu = {f for f in skipped if re.search(r"mark\.gpu\b|\bmachine: Machine\b", (TESTS.parent / f).read_text())}
    # These run whole models by what validate does, which needs Polygraphy.
    assert gpu == {"tests/validate/test_engine_gpu.py", "tests/validate/test_kernels.py"}
    assert re.search(r"^[1-9]\d{3}/\d+ tests collected", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(("until", "skipped"), [("1", 1), ("99999999999", 0)])
def test_slow_tests_begin_while_there_is_time(tmp_path: Path, until: str, skipped: int) -> None:
    """What is not slow always runs."""
    (tmp_path / "test_two.py").write_text(
        "import pytest\n\n@pytest.mark.slow\ndef test_one():\n    pass\n\ndef test_other():\n    pass\n"
    )
    done = ran(tmp_path, TESTS, "-p", "conftest", "-c", os.devnull, ".", LLMEXPORT_SLOW_UNTIL=until)
    assert ("2 passed", "1 passed, 1 skipped")[skipped] in done.stdout, done.stdout

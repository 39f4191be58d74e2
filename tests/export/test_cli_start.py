"""Commands that do little import little: what each may not import is what its start would wait for."""

import json
import subprocess
import sys

import pytest

HEAVY = {"numpy", "onnx", "torch", "onnxruntime", "onnxscript", "sympy", "ml_dtypes", "polygraphy", "jinja2", "rich"}
COMMANDS = ("onnx", "engine", "validate", "generate", "bench", "triton", "checkpoint", "deploy", "golden", "plugins")
# Arguments, and what else stays unimported.
CASES = {
    "archs": set(),
    "ops": set(),
    "doctor": set(),
    "--help": {"llmexport.export.spec"},
    "nope": {"llmexport.export.spec"},
    **{f"{c} --nope": {"llmexport.export.spec", "llmexport.export.onnx_file"} for c in COMMANDS},
}
CODE = """
import json, sys
from llmexport.export.cli.main import main
try: main()
except SystemExit: print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", CASES)
def test_a_command_imports_no_library_that_it_does_not_use(arguments: str) -> None:
    command = [sys.executable, "-c", CODE, *arguments.split()]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    imported = set(json.loads(said.splitlines()[-1]))
    assert "click" in imported
    assert imported & (HEAVY | CASES[arguments]) == set()


def test_choices_of_an_option_are_shown_and_checked_all_the_same() -> None:
    def told(*arguments: str) -> str:
        command = [sys.executable, "-m", "llmexport.export.cli.main", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    assert "[auto|link|copy]" in told("onnx", "--help")
    assert "'move' is not one of 'auto', 'link', 'copy'" in told("onnx", "-o", "x", "--weights", "move")


@pytest.mark.parametrize(("command", "enabled"), [("onnx", "False"), ("archs", "True")])
def test_an_export_looks_for_no_cycles(command: str, enabled: str) -> None:
    code = f"""
import gc, sys
from llmexport.export.cli import main
main._call = lambda: (print(gc.isenabled()), "")
sys.argv = ["llmexport", "{command}", "-o", "x"]
main.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == f"{enabled}\n"


def test_the_end_of_a_command_looks_for_no_cycles() -> None:
    """What is registered first is called last."""
    code = """
import atexit, gc, sys
atexit.register(lambda: print(gc.get_freeze_count() > 0))
from llmexport.export.cli import main
sys.argv = ["llmexport", "ops", "-q"]
main.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"

"""The rules of the house (DESIGN, section 1; STYLE), as tests: one a rule, each names the files that break it."""

from __future__ import annotations

import ast
import functools
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from arch_cases import CASES

from llmexport.export import archs
from llmexport.export.assembly import parts
from llmexport.export.onnx_file import read_model
from llmexport.export.spec import AXES
from llmexport.plugins.dtypes import BY_NAME
from llmexport.plugins.spec import all_ops

ROOT = Path(__file__).parent.parent
FOLDERS = ("plugins", "graphs", "export", "validate", "run")
# What each part may import of ours. The command line is a part of its own.
MAY_IMPORT = {
    "plugins": {"plugins"},
    "graphs": {"graphs", "plugins"},
    "export": {"export", "graphs", "plugins"},
    "validate": {"validate", "export", "plugins"},
    "run": {"run", "export", "validate", "plugins"},
    "export.cli": {"export.cli", "export", "validate", "run", "graphs", "plugins"},
}
ENGINE_LIBRARIES = {"tensorrt", "tensorrt_rtx", "tensorrt_lean", "polygraphy"}
SOFT, HARD, DATA = 250, 500, 150  # lines of a source file, of any file, of an architecture's data
# Files over the soft limit, each with the reason why it is one file.
LONG: dict[str, str] = {
    "export/rope.py": "every published form of RoPE's keys is read in one place, which refuses what is left",
    "export/spec/context.py": "what layers read besides hidden states, dynamic and static side by side",
    "export/spec/model.py": "the two ends of a model, the model, and what an architecture says of itself",
    "validate/feeds.py": "one case for each use of a port",
}
# Imported by an export whose blocks are all known, which must not pay for torch.
WARM = [
    "export.onnx_file",
    "export.manifest",
    "export.checkpoint",
    "export.output",
    "export.archs",
    "export.cli.main",
    "graphs.pipeline",
    *(f"export.archs.{n}" for n in archs.names()),
]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def python(*folders: str) -> list[Path]:
    return sorted(p for f in folders for p in (ROOT / f).rglob("*.py"))


SOURCES = python(*FOLDERS)
ALL_PYTHON = python(*FOLDERS, "tests")


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def broken(files: Iterable[Path], finds: Callable[[Path], Iterable[object]]) -> dict[str, list[object]]:
    """What a rule finds wrong, by file."""
    return {name(p): found for p in files if (found := sorted(finds(p), key=str))}


def part(module: str) -> str:
    """The part of the house that a module belongs to: `llmexport.export.cli.main` is in export.cli."""
    names = module.split(".")[1:]
    return "export.cli" if names[:2] == ["export", "cli"] else names[0]


def module(path: Path) -> str:
    return "llmexport." + name(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def is_module(dotted: str) -> bool:
    path = ROOT.joinpath(*dotted.split(".")[1:])
    return path.with_suffix(".py").is_file() or path.is_dir()


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it, and those that it names to import_module."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from llmexport.export import weights` imports a module or a name: the file system knows which.
            inner = [f"{node.module}.{a.name}" for a in node.names]
            ours = [m for m in inner if m.startswith("llmexport.") and is_module(m)]
            yield from ours or [node.module]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant))


def roots(path: Path) -> set[str]:
    return {m.split(".")[0] for m in imports(path)}


def test_imports_go_one_way():
    def forbidden(path: Path) -> Iterable[str]:
        allowed = MAY_IMPORT[part(module(path))]
        return {m for m in imports(path) if m.startswith("llmexport.") and part(m) not in allowed}

    assert broken(SOURCES, forbidden) == {}


def test_an_import_without_llmexport_is_the_file_path():
    def homeless(path: Path) -> Iterable[str]:
        return {m for m in imports(path) if m.startswith("llmexport.") and not is_module(m)}

    assert broken(ALL_PYTHON, homeless) == {}


def test_no_import_is_relative():
    def relative(path: Path) -> Iterable[int]:
        return [n.lineno for n in ast.walk(tree(path)) if isinstance(n, ast.ImportFrom) and n.level]

    assert broken(ALL_PYTHON, relative) == {}


def test_engines_are_built_and_run_in_their_own_files_alone():
    elsewhere = [p for p in SOURCES if not name(p).startswith(("validate/", "export/engine"))]
    assert broken(elsewhere, lambda path: ENGINE_LIBRARIES & roots(path)) == {}


def test_onnx_runtime_is_imported_where_its_telemetry_is_turned_off():
    elsewhere = [p for p in SOURCES if name(p) != "validate/runtime.py"]
    assert broken(elsewhere, lambda path: {"onnxruntime"} & roots(path)) == {}


def test_torch_onnx_is_called_in_one_file_and_sped_up_in_another():
    elsewhere = [p for p in SOURCES if name(p) not in ("export/trace.py", "export/shortcuts.py")]
    assert broken(elsewhere, lambda path: re.findall(r"^.*\btorch\.onnx\b.*$", path.read_text(), re.M)) == {}


def test_graphs_never_import_torch():
    assert broken(python("graphs"), lambda path: {"torch"} & roots(path)) == {}


def loaded(modules: Iterable[str]) -> set[str]:
    """The modules that a fresh interpreter holds after importing these of ours."""
    code = "import sys\n" + "".join(f"import llmexport.{m}\n" for m in modules) + "print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_a_warm_export_imports_neither_torch_nor_what_builds_engines():
    unwanted = {"torch", "onnxscript", "transformers", "onnxruntime", *ENGINE_LIBRARIES}
    assert loaded(WARM) & unwanted == set()


def test_a_graph_is_read_without_torch():
    assert "torch" not in loaded(module(p).removeprefix("llmexport.") for p in python("graphs"))


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_no_file_is_too_long():
    assert {name(p): lines(p) for p in ALL_PYTHON if lines(p) > HARD} == {}


def test_a_long_file_has_a_reason_and_a_reason_has_a_long_file():
    assert {name(p) for p in SOURCES if lines(p) > SOFT} == LONG.keys()


def test_an_architecture_is_a_short_data_file():
    assert {name(p): lines(p) for p in python("export/archs") if lines(p) > DATA} == {}


def test_architectures_are_those_with_a_row_in_arch_cases():
    assert {c.arch for c in CASES} == set(archs.names())


def is_use(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "use"


def decided_on(path: Path) -> Iterator[str]:
    """The strings that code decides on: compared, matched, searched for, looked up, or the keys of a choice.

    Not those that the use of a port is compared with.
    """
    every = list(ast.walk(tree(path)))
    matches = [n for n in every if isinstance(n, ast.Match) and is_use(n.subject)]
    uses = {id(n) for match in matches for case in match.cases for n in ast.walk(case.pattern)}
    for node in every:
        parts: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            parts = [] if is_use(node.left) else [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            parts = [] if id(node) in uses else [node.value]
        elif isinstance(node, ast.Dict):
            parts = [k for k in node.keys if k]
        elif isinstance(node, ast.Subscript):
            parts = [node.slice]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            asks = node.func.attr in ("startswith", "endswith", "get", "match", "search")
            parts = list(node.args) if asks else []
        leaves = [leaf.value for p in parts for leaf in ast.walk(p) if isinstance(leaf, ast.Constant)]
        yield from (v for v in leaves if isinstance(v, str))


def test_no_code_asks_which_architecture_it_is():
    known = [archs.load(n) for n in archs.names()]
    taken = {n.lower() for k in known for n in (k.name, *k.model_types, k.reference.model_class)}

    def asked(path: Path) -> set[str]:
        return taken & {word for text in decided_on(path) for word in re.findall(r"\w+", text.lower())}

    assert broken([p for p in SOURCES if p.parent.name != "archs"], asked) == {}


# Keys of JSON files, and attributes of operators, that are called like a port, an axis or a graph.
KEYS = {
    "export/cli/validate.py": ["batch"],
    "export/decoder.py": ["experts.down_proj", "experts.gate_up_proj"],
    "export/disentangled.py": ["bias"],
    "export/earlier.py": ["weights"],
    "export/engine_job.py": ["model", "weights"],
    "export/engine_build.py": ["model", "weights"],
    "export/genai.py": ["attention_mask", "decoder", "input_ids", "logits", "model", "position_ids"],
    "export/manifest.py": ["logits", "weights"],
    "export/network/serve.py": ["model"],
    "export/packed/scheme.py": ["weights"],
    "export/quantised.py": ["weights"],
    "export/quantize.py": ["weights"],
    "graphs/sums.py": ["start"],
    "run/bench.py": ["batch"],
    "run/pictures.py": ["images", "input_ids"],
    "run/settings.py": ["temperature"],
    "validate/bound.py": ["length"],
    "validate/engine.py": ["weights"],
    "validate/engine_run.py": ["weights"],
    "validate/facts.py": ["model"],
    "validate/ladder.py": ["batch"],
}


def test_no_name_of_a_port_an_axis_or_a_graph_decides_anything():
    """Names are given in spec and wiring; a module reads those of its own block; an architecture maps names."""
    cases = [(archs.load(c.arch), {**archs.load(c.arch).tiny, **c.changes}) for c in CASES]
    graphs = [g for named, config in cases for g in read_model(named, config).graphs]
    blocks = {part.block for g in graphs for step in g.assembly.steps for part in parts(step)}
    ports = [p for b in blocks for p in (*b.inputs, *b.outputs)]
    values = [p for g in graphs for p in (*g.assembly.inputs, *g.assembly.outputs)]
    # Of `past_key_values.0.key` what stands before the place.
    names = {p.name.partition(".")[0] for p in (*ports, *values)} | AXES.keys() | {g.name for g in graphs}
    # A reference has the names of its own checkpoint.
    their_own = ("plugins/", "export/spec/", "export/wiring.py", "export/blocks/", "export/archs/")
    their_own += ("validate/references/",)
    assert {"input_ids", "past_key_values", "present", "mask", "total", "model"} <= names

    def decides(path: Path) -> set[str]:
        return {text for text in decided_on(path) if text.partition(".")[0] in names}

    assert broken([p for p in SOURCES if not name(p).startswith(their_own)], decides) == KEYS


def test_no_model_type_is_claimed_twice():
    # Of a type that two architectures have, one is told by a key of its configs.
    claimed = [f"{t} {archs.load(n).told_by}" for n in archs.names() for t in archs.load(n).model_types]
    # Of a multimodal type that several text models are published in, each has types of its own.
    within = [(m.model_type, m.text_types) for n in archs.names() for m in archs.load(n).multimodal]
    claimed += [f"{t} " for t, _ in within if sum(t == u for u, _ in within) == 1]
    shared = [(t, texts or ()) for t, texts in within if sum(t == u for u, _ in within) > 1]
    assert len(shared) == len(set(shared))
    assert sorted(claimed) == sorted(set(claimed))


def test_types_are_named_in_one_table():
    foreign = {n for d in BY_NAME.values() for n in (d.safetensors, d.tensorrt) if n}

    def named(path: Path) -> set[str]:
        nodes = list(ast.walk(tree(path)))
        texts = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        pairs = [p for n in nodes if isinstance(n, ast.Dict) for p in zip(n.keys, n.values, strict=True)]
        # {1: "float32"}, {"float32": TensorProto.FLOAT} and their like.
        ours = {ast.unparse(k or v) for k, v in pairs if {*map(label, (k, v))} >= {"name", "number"}}
        return (texts & foreign) | ours

    def label(node: ast.expr | None) -> str:
        if isinstance(node, ast.Constant):
            return "name" if node.value in BY_NAME else "number" if isinstance(node.value, int) else ""
        return "number" if node and ".TensorProto." in f".{ast.unparse(node)}" else ""

    assert broken([p for p in SOURCES if name(p) != "plugins/dtypes.py"], named) == {}


def test_no_code_asks_how_the_name_of_a_stored_tensor_ends():
    storage = ROOT / "export/spec/storage.py"
    calls = [n for n in ast.walk(tree(storage)) if isinstance(n, ast.Call) and ast.unparse(n.func) == "Stored"]
    endings = tuple({ast.literal_eval(c.args[0]) for c in calls} - {""})
    assert endings

    def asked(path: Path) -> set[str]:
        return {text for text in decided_on(path) if text.endswith(endings)}

    assert broken([p for p in python("export", "validate") if p != storage], asked) == {}


OP_FOLDERS = sorted(p.parent for p in (ROOT / "plugins").glob("*/__init__.py"))


@pytest.mark.parametrize("folder", OP_FOLDERS, ids=lambda p: p.name)
def test_an_op_folder_has_the_reference_of_its_op(folder):
    op = {o.torch_name: o for o in all_ops().values()}[folder.name]
    assert op.name == "".join(word.capitalize() for word in folder.name.split("_"))
    assert op.reference.__module__ == f"llmexport.plugins.{folder.name}"
    assert op.reference.__doc__


def test_every_op_has_a_folder():
    assert {o.torch_name for o in all_ops().values()} == {p.name for p in OP_FOLDERS}


def test_every_op_and_every_pass_has_a_test_file_of_its_name():
    wanted = [f"plugins/test_{p.name}.py" for p in OP_FOLDERS]
    wanted += [f"graphs/test_{p.name}" for p in python("graphs") if p.stem.startswith("fuse_")]
    assert [f for f in wanted if not (ROOT / "tests" / f).is_file()] == []


def test_no_init_file_in_tests():
    assert [name(p) for p in python("tests") if p.stem == "__init__"] == []


def test_llmexport_is_a_namespace():
    assert [n for n in ("__init__.py", "llmexport") if (ROOT / n).exists()] == []


def test_every_portion_of_the_namespace_says_that_it_is_typed():
    assert [f for f in FOLDERS if not (ROOT / f / "py.typed").is_file()] == []


def says_nothing(node: ast.stmt) -> bool:
    return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def test_no_error_is_swallowed():
    def swallows(path: Path) -> Iterable[int]:
        handlers = [n for n in ast.walk(tree(path)) if isinstance(n, ast.ExceptHandler)]
        return [h.lineno for h in handlers if h.type is None or all(map(says_nothing, h.body))]

    assert broken(ALL_PYTHON, swallows) == {}


def test_arrays_are_compared_in_one_place():
    private = {"allclose", "isclose", "assert_allclose", "assert_close", "assert_array_almost_equal"}

    def compares(path: Path) -> Iterable[str]:
        return private & {n.attr for n in ast.walk(tree(path)) if isinstance(n, ast.Attribute)}

    assert broken(ALL_PYTHON, compares) == {}


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """The files of the repository, whatever else lies beside them."""
    git = shutil.which("git")
    run = git and subprocess.run([git, "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True)
    if not run or run.returncode:
        pytest.skip("needs a git checkout, which says which files are the repository's")
    return [p for f in run.stdout.split("\0") if (p := ROOT / f).is_file()]


def test_no_file_names_a_place_on_one_machine(tracked):
    def places(path: Path) -> Iterable[str]:
        folders = r"work|root|home/\w+|Users/\w+" + ("" if name(path).startswith("tests/") else "|tmp")
        return re.findall(rf"(?<![\w.])/(?:{folders})/\S*", path.read_text(errors="replace"))

    assert broken(tracked, places) == {}


def test_every_link_of_a_document_leads_somewhere(tracked):
    def lost(path: Path) -> Iterable[str]:
        links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text())
        return [link for link in links if not (path.parent / link).exists()]

    assert broken([p for p in tracked if p.suffix == ".md"], lost) == {}


def test_the_top_level_is_the_list_that_was_agreed(tracked):
    agreed = {*FOLDERS, "tests", "pyproject.toml", "README.md", "LICENSE", "constraints.txt"}
    there = {name(p).split("/")[0] for p in tracked}
    assert {n for n in there if not n.startswith(".")} == agreed

"""The tables of plugin.cpp, as the library says them, word by word against @op."""

from __future__ import annotations

import ctypes

from native import emulated_library
from plugin_cases import OPS, served

from llmexport.plugins import library
from llmexport.plugins.spec import Op

KINDS = {bool: "bool", int: "int", float: "float"}


def table(op: Op) -> str:
    """What llmexportOps() of trt/library.cpp should say of it."""

    def tensors(dims: dict[str, tuple[str, ...]]) -> str:
        return ", ".join(f"{n}: {op.types[n]}[{''.join(d)}]{'?' * (n in op.optional)}" for n, d in dims.items())

    def kind(attribute: str) -> str:
        if attribute in op.choices:
            return "|".join(op.choices[attribute])
        return " ".join([KINDS[op.attributes[attribute]], *op.sizes.get(attribute, "")])

    attributes = ", ".join(f"{n}: {kind(n)}" for n in op.attributes)
    return f"{op.name}({tensors(op.inputs)}; {attributes}) -> {tensors(op.outputs)}"


def test_tables_say_what_the_references_say() -> None:
    """Names, dimensions and types of inputs and outputs, which are optional, attributes, their kinds and choices."""
    ops = ctypes.CDLL(str(emulated_library())).llmexportOps
    ops.restype = ctypes.c_char_p
    assert ops().decode().splitlines() == sorted(table(OPS[name]) for name in served())


def test_the_library_serves_the_ops_of_its_tables() -> None:
    assert library.served(emulated_library()) == served()

"""The list of ops that is read from their source is the list of the ops."""

from llmexport.plugins.declared import Declared, declared
from llmexport.plugins.spec import VERSION, all_ops


def test_it_says_what_the_ops_themselves_say() -> None:
    ops = {
        name: Declared(
            *(name, op.version, op.inputs, op.outputs, {n: t.__name__ for n, t in op.attributes.items()}),
            *(op.aliases, op.joins),
        )
        for name, op in all_ops().items()
    }
    assert {op.name: op for op in declared()} == ops


def test_graphs_import_the_version_of_the_latest_op() -> None:
    assert max(op.version for op in declared()) == VERSION

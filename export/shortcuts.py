"""Spares torch's exporter work that our blocks do not need: most of the time of a trace.

All places here are private to torch and to onnxscript. Where a version lacks one of them, a trace takes longer and
gives the same graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

Patch = tuple[Any, str, Any]  # an object, the name of an attribute of it, and what stands there meanwhile


@contextmanager
def shortcuts() -> Iterator[None]:
    """A context in which torch's exporter takes every shortcut that this version has a place for."""
    with _taken(SHORTCUTS):
        yield


@contextmanager
def _taken(ways: Iterable[Callable[[], list[Patch]]]) -> Iterator[None]:
    with ExitStack() as stack:
        for find in ways:
            for place, name, instead in _found(find):
                stack.enter_context(mock.patch.object(place, name, instead))
        yield


def _found(find: Callable[[], list[Patch]]) -> list[Patch]:
    try:
        patches = find()
    except (ImportError, KeyError, AttributeError):
        return []
    return patches if all(hasattr(place, name) for place, name, _ in patches) else []


def _shared_table() -> list[Patch]:
    """All traces of a process share one table of operators, in which a function is read when it is first used."""
    from torch.onnx._internal.exporter import _registration

    build = _registration.ONNXRegistry.__dict__["from_torchlib"].__func__

    def shared(cls: Any, *args: Any, **kwargs: Any) -> Any:
        key = (args, tuple(kwargs.items()))
        if key not in _TABLES:
            try:
                with _taken((_unread_functions, _unsigned_entries)):
                    _TABLES[key] = build(cls, *args, **kwargs)
            except Exception:
                # A version that reads more of a function than ours.
                _TABLES[key] = build(cls, *args, **kwargs)
        return _TABLES[key]

    return [(_registration.ONNXRegistry, "from_torchlib", classmethod(shared))]


_TABLES: dict[Any, Any] = {}


@functools.cache
def _unread_functions() -> list[Patch]:
    """The operators' functions, whose parameters and source are read when they are asked for: 400 are not."""
    import onnxscript.values
    from onnxscript._internal.values import Op, TracedOnnxFunction

    if not {"function_ir", "op_signature"} <= TracedOnnxFunction.__dict__.keys():
        return []

    class Unread(TracedOnnxFunction):
        def __init__(self, opset: Any, func: Callable[..., Any]) -> None:
            Op.__init__(self, opset, func.__name__)
            self.func = func
            functools.update_wrapper(self, func)

        @functools.cached_property
        def op_signature(self) -> Any:  # type: ignore[override]
            return TracedOnnxFunction(self._opset, self.func).op_signature

        @property
        def function_ir(self) -> Any:
            return _Header(self._opset.domain, lambda: TracedOnnxFunction(self._opset, self.func).function_ir)

    return [(onnxscript.values, "TracedOnnxFunction", Unread)]


class _Header:
    """The domain of a function, and whatever else it has by reading its source."""

    def __init__(self, domain: str, read: Callable[[], Any]) -> None:
        self.domain, self._read = domain, read

    def __getattr__(self, name: str) -> Any:
        return getattr(self._read(), name)


@functools.cache
def _unsigned_entries() -> list[Patch]:
    """Entries of the table whose signature is made when it is asked for."""
    from torch.onnx._internal.exporter import _registration

    class Unsigned(_registration.OnnxDecompMeta):
        def __post_init__(self) -> None:
            if self.signature is None:
                del self.signature

        def __getattr__(self, name: str) -> Any:
            if name != "signature":
                raise AttributeError(name)
            self.signature = None
            super().__post_init__()
            return self.signature

    return [(_registration, "OnnxDecompMeta", Unsigned)]


def _as_captured() -> list[Patch]:
    """The program is translated as captured, not decomposed first: blocks are of operators that have a translation."""
    from torch.onnx._internal.exporter import _fx_passes

    return [(_fx_passes, "decompose_with_registry", lambda program, registry: program)]


def _no_fake_cache() -> list[Patch]:
    """No cache of what operators give on tensors without values: entries with symbols cost more than they save."""
    import torch._dynamo.config as config

    return [(config, "fake_tensor_cache_enabled", False)]


def _values_at_hand() -> list[Patch]:
    """Looking for types to promote, the exporter takes the values of the capture until it has changed a node."""
    from torch.fx import Interpreter
    from torch.onnx._internal.fx.passes import type_promotion

    looking = type_promotion._TypePromotionInterpreter
    original, rule_of = looking.run_node, type_promotion.get_type_promotion_rule

    def run_node(self: Any, node: Any) -> Any:
        if node.op != "call_function" or "val" not in node.meta or self.__dict__.get("promoted"):
            return original(self, node)
        given, length = (node.args, node.kwargs), len(node.graph.nodes)
        with self._set_current_node(node):
            if rule := rule_of(node, self.type_promotion_table):
                self._maybe_promote_node(node, rule)
        if (node.args, node.kwargs) == given and len(node.graph.nodes) == length:
            return node.meta["val"]
        self.promoted = True
        return Interpreter.run_node(self, node)

    return [(looking, "run_node", run_node)]


def _no_stacks() -> list[Patch]:
    """No node is told which lines of Python made it."""
    from torch.fx import config

    return [(config, "do_not_emit_stack_traces", True)]


def _rules_of_the_operator() -> list[Patch]:
    """A rewrite is tried on nodes of the operator that its pattern ends in, not on all, of which most have another."""
    from onnxscript.rewriter._matcher import SimplePatternMatcher
    from onnxscript.rewriter._rewrite_rule import RewriteRule

    original = RewriteRule.try_rewrite

    def try_rewrite(self: Any, model: Any, graph: Any, node: Any, **options: Any) -> Any:
        pattern = self._target_pattern
        if type(self._matcher) is SimplePatternMatcher and pattern.has_single_output_node:
            operator = pattern.output_node.op_identifier()
            if operator and operator[1] != node.op_type:
                return None
        return original(self, model, graph, node, **options)

    return [(RewriteRule, "try_rewrite", try_rewrite)]


SHORTCUTS = (
    _shared_table,
    _as_captured,
    _no_fake_cache,
    _values_at_hand,
    _no_stacks,
    _rules_of_the_operator,
)

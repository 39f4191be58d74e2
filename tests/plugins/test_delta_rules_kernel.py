"""What holds of the kernels of every delta rule, against float64.

Imports neither torch nor onnx: test_sanitizers.py runs it again under sanitizers.
"""

from __future__ import annotations

import numpy as np
import pytest
from delta_rules import GATED, KIMI, STATE, DeltaRule, K, Q, V, exact, in_chunks, right, right_state
from kernel_numbers import wide
from native import ORDERS
from plugin_host import DTYPES, Machine, lay_out
from plugin_memory import Output

from llmexport.validate.compare import compare

FP16_INFINITE = 65520.0  # and more is rounded up
pytestmark = pytest.mark.parametrize("rule", [GATED, KIMI], ids=lambda rule: rule.op)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_chunks_do_not_serve_goes_token_by_token(rule: DeltaRule, machine: Machine, dtype: str) -> None:
    """fp32, and pointers that no 16 bytes can be copied from."""
    inputs, shift = rule.tensors((1, 65, 2, 64, 16), dtype), int(dtype != "fp32")
    assert not in_chunks(inputs, shift)
    assert right(rule.run(machine, inputs, shift=shift), inputs, shift=shift)


@pytest.mark.parametrize("many", [False, True])
def test_keys_as_they_are(rule: DeltaRule, machine: Machine, many: bool) -> None:
    inputs = rule.tensors((1, rule.many if many else 7, 2, 64, 32), "bf16")
    for i in (Q, K):
        norm = np.linalg.norm(wide(inputs[i])[0], axis=-1, keepdims=True)
        inputs[i] = (wide(inputs[i])[0] / norm).astype(inputs[i].dtype)
    assert right(rule.run(machine, inputs, l2_norm=False), inputs, l2_norm=False)


@pytest.mark.parametrize("many", [False, True])
def test_keys_of_nothing(rule: DeltaRule, machine: Machine, many: bool) -> None:
    """The norm of a zero key is not zero."""
    inputs = rule.tensors((1, rule.many if many else 7, 2, 64, 32), "bf16")
    inputs[K][:, 3:6], inputs[Q][:, 4:5] = 0, 0
    assert right(rule.run(machine, inputs), inputs)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("size", [2.0**-12, 2.0**13])
def test_values_of_any_size(rule: DeltaRule, machine: Machine, size: float, dtype: str, many: bool) -> None:
    inputs = rule.tensors((1, rule.many if many else 7, 1, 64, 32), dtype)
    inputs[V] *= np.array(size, inputs[V].dtype)
    inputs[STATE] *= np.float32(size * 8)
    y, state = exact(inputs)
    found = rule.run(machine, inputs)
    assert right_state(found[1], state, in_chunks(inputs))
    # The smaller of fp16 have fewer bits as subnormals: half of the smallest is off.
    unit = 2.0**-24 if dtype == "fp16" and size < 1 else 0.0
    most = {"fp16": 2.0**-10, "bf16": 2.0**-7}[dtype] * np.abs(y).max() + unit
    assert compare(y, found[0]).max_abs <= most


@pytest.mark.parametrize("many", [False, True])
def test_what_fp16_cannot_hold_is_infinite(rule: DeltaRule, machine: Machine, many: bool) -> None:
    """As the reference rounds it. The state goes on."""
    inputs = rule.tensors((1, rule.many if many else 7, 1, 64, 32), "fp16")
    inputs[STATE] *= np.float32(2.0**22)
    y, state = exact(inputs)
    found = rule.run(machine, inputs)
    assert np.isinf(found[0][:, 0]).any()
    assert (np.isinf(found[0]) == (np.abs(y) >= FP16_INFINITE)).all()
    assert right_state(found[1], state, in_chunks(inputs))


@pytest.mark.parametrize("tokens", [1, 9, 0], ids=["one", "few", "many"])
def test_state_is_updated_in_place(
    rule: DeltaRule, machine: Machine, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    """Also of 128 columns, which several blocks take."""
    inputs = rule.tensors((2, tokens or rule.many, 1, 64, 128 if tokens == 1 else 32), "bf16")
    for seed in ORDERS:
        monkeypatch.setenv("LLMEXPORT_EMULATOR_SEED", str(seed))
        memory = machine.memory()
        prepared = lay_out(rule.created(machine, inputs), memory, inputs)
        prepared.outputs[1] = Output.holding(memory, inputs[STATE])
        prepared.inputs[STATE] = prepared.outputs[1].address
        prepared.enqueue(memory.stream)
        assert right(prepared.results(), inputs)


@pytest.mark.parametrize("many", [False, True])
def test_result_does_not_depend_on_the_order_of_threads(
    rule: DeltaRule, machine: Machine, monkeypatch: pytest.MonkeyPatch, many: bool
) -> None:
    inputs, results = rule.tensors((1, rule.many if many else 7, 1, 64, 32), "fp16"), set()
    for seed in ORDERS:
        monkeypatch.setenv("LLMEXPORT_EMULATOR_SEED", str(seed))
        results.add(b"".join(y.tobytes() for y in rule.run(machine, inputs)))
    assert len(results) == 1


def test_no_token_keeps_the_state(rule: DeltaRule, machine: Machine) -> None:
    inputs = rule.tensors((2, 0, 2, 64, 32), "bf16")
    y, state = rule.run(machine, inputs)
    assert y.shape == (2, 0, 2, 32)
    assert state.tobytes() == inputs[STATE].tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_row_is_no_error(rule: DeltaRule, machine: Machine, dtype: str) -> None:
    y, state = rule.run(machine, rule.tensors((0, rule.many, 2, 64, 32), dtype))
    assert (y.shape, state.shape) == ((0, rule.many, 2, 32), (0, 2, 64, 32))

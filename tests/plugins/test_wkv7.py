"""Wkv7 against the paper's recurrence in float64, in torch and as a function body."""

import importlib.util

import numpy as np
import pytest
import torch
from one_node import body_model, rtx_build, session

from llmexport.plugins.wkv7 import wkv7
from llmexport.validate.compare import compare

TOKENS = [1, 7, 63, 64, 65, 130]
H, D, V = 3, 16, 8
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Of y and a state of order one, in fp32: a removal never makes what is there longer, so that roundings do not grow.
CLOSE = 1e-5

Inputs = tuple[torch.Tensor, ...]


def example(tokens: int, dtype: torch.dtype = torch.float32, batch: int = 2) -> Inputs:
    """Of a model's sizes: kappa of length one, rates in (0, 1), decays from nearly none to the fastest."""
    seed = torch.Generator().manual_seed(tokens)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=seed)

    of_keys = (batch, tokens, H, D)
    r, w, k, v = randn(*of_keys), 3 * randn(*of_keys), randn(*of_keys) / D**0.5, randn(batch, tokens, H, V)
    kappa, a = torch.nn.functional.normalize(randn(*of_keys), dim=-1), torch.sigmoid(randn(*of_keys))
    tensors = (x.to(dtype) for x in (r, w, k, v, kappa, a, torch.ones(batch, tokens)))
    return *tensors, randn(batch, H, V, D)


def exact(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """y and the state, in float64, by the matrices of the paper."""
    r, w, k, v, kappa, a, present, state = (x.double().numpy() for x in inputs)
    y, s = np.zeros_like(v), state.copy()
    decay = np.exp(-np.exp(-0.5) / (1 + np.exp(-w)))
    for b, t, h in np.ndindex(*v.shape[:3]):
        if present[b, t]:
            step = np.diag(decay[b, t, h]) - np.outer(kappa[b, t, h], a[b, t, h] * kappa[b, t, h])
            s[b, h] = s[b, h] @ step + np.outer(v[b, t, h], k[b, t, h])
        y[b, t, h] = s[b, h] @ r[b, t, h]
    return y, s


def padded(inputs: Inputs, padding: int) -> Inputs:
    """The last row padded on the left."""
    inputs[6][-1, :padding] = 0
    return inputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_is_the_papers_recurrence_in_float64(tokens: int, dtype: torch.dtype) -> None:
    inputs = padded(example(tokens, dtype), tokens // 3)
    (y, state), (found, next_state) = exact(inputs), wkv7(*inputs)
    eps = 0 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert found.dtype == dtype
    assert (np.abs(found.double().numpy() - y) <= CLOSE + eps * np.abs(y)).all()
    assert compare(state, next_state.numpy()).max_abs <= CLOSE


@pytest.mark.parametrize("padding", [1, 6, 64])
def test_padding_moves_no_state(padding: int) -> None:
    """A row padded on the left, and one padded on the right, are the row alone."""
    *sequences, present, state = example(65 + padding)
    present[0, :padding], present[1, -padding:] = 0, 0
    y, after = wkv7(*sequences, present, state)
    for row, tokens in enumerate((slice(padding, None), slice(0, 65))):
        alone = (x[row : row + 1, tokens] for x in (*sequences, present))
        y_alone, after_alone = wkv7(*alone, state[row : row + 1])
        assert compare(y_alone.numpy(), y[row : row + 1, tokens].numpy()).max_abs <= CLOSE
        assert compare(after_alone.numpy(), after[row : row + 1].numpy()).max_abs <= CLOSE


@pytest.mark.parametrize("cuts", [[1] * 65, [1, 64], [63, 2]], ids=str)
def test_a_state_carried_over_cuts_gives_the_whole(cuts: list[int]) -> None:
    *sequences, state = example(65)
    whole, last = wkv7(*sequences, state)
    ys = []
    for parts in zip(*(s.split(cuts, 1) for s in sequences), strict=True):
        y, state = wkv7(*parts, state)
        ys.append(y)
    assert compare(whole.numpy(), torch.cat(ys, 1).numpy()).max_abs <= CLOSE
    assert compare(last.numpy(), state.numpy()).max_abs <= CLOSE


def test_a_full_rate_removes_all_that_its_key_recalls() -> None:
    """With a = 1, without decay and without a key to write, nothing is left along kappa."""
    _, w, k, v, kappa, a, present, state = example(1)
    y, _ = wkv7(kappa, torch.full_like(w, -100), torch.zeros_like(k), v, kappa, torch.ones_like(a), present, state)
    assert y.abs().max() <= 1e-6


def test_no_state_is_changed_in_place() -> None:
    inputs = example(7)
    before = [s.clone() for s in inputs]
    wkv7(*inputs)
    assert all(map(torch.equal, inputs, before))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_body_in_onnx_runtime_is_the_recurrence_at_any_length(dtype: str) -> None:
    model = body_model("Wkv7", {}, dtype, {"H": H, "D": D, "V": V})
    runtime, names = session(model), [i.name for i in model.graph.input]
    eps = 0.0 if dtype == "float32" else float(np.finfo(dtype).eps)
    for tokens in TOKENS:
        inputs = padded(example(tokens, getattr(torch, dtype)), tokens // 2)
        y, state = exact(inputs)
        found, after = runtime.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))
        assert found.dtype == np.dtype(dtype)
        assert (np.abs(found - y) <= CLOSE + eps * np.abs(y)).all()
        assert compare(state, after).max_abs <= CLOSE


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="pip install tensorrt-rtx")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.engine
def test_rtx_builds_the_body(dtype, tmp_path):
    model = body_model("Wkv7", {}, dtype, {"H": H, "D": D, "V": V})
    assert rtx_build(model, {"B": (1, 2, 4), "T": (1, 63, 512)}, tmp_path) == ["built"]

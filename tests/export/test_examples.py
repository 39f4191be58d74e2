"""Blocks that export without a checkpoint, against formulas written here in numpy, float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from commands import Run, runner
from safetensors.numpy import load_file

from llmexport.export import manifest
from llmexport.export.examples import ALPHA, EXAMPLES, HEADS, HIDDEN
from llmexport.validate.compare import compare
from llmexport.validate.tolerance import tolerance

pytestmark = pytest.mark.model

TOKENS = 29
Weights = dict[str, np.ndarray]
erf = np.vectorize(math.erf)


def linear(x: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def softmax(x: np.ndarray) -> np.ndarray:
    shares = np.exp(x - x.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def attention(x: np.ndarray, mask: np.ndarray, weights: Weights, path: str = "") -> np.ndarray:
    """Each query head has its own keys (MHA), or a group of them has (GQA), or all have the same (MQA)."""
    q, k, v = (linear(x, weights, f"{path}{n}_proj") for n in "qkv")
    q, k, v = (a.reshape(*a.shape[:2], -1, HIDDEN // HEADS).transpose(0, 2, 1, 3) for a in (q, k, v))
    k, v = (np.repeat(a, HEADS // a.shape[1], axis=1) for a in (k, v))
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(HIDDEN // HEADS)
    mixed = softmax(np.where(mask, scores, -1e9)) @ v
    return linear(mixed.transpose(0, 2, 1, 3).reshape(x.shape), weights, f"{path}o_proj")


def layer_norm(x: np.ndarray, weights: Weights, path: str = "") -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * weights[f"{path}weight"] + weights[f"{path}bias"]


def deep_norm(x: np.ndarray, weights: Weights, of_sublayer: float, of_input: float) -> np.ndarray:
    """norm1(x + attn(x)) and norm2(x + ffn(x)), with a factor on one of the summands."""
    everything = np.array(True)
    x = layer_norm(
        of_input * x + of_sublayer * attention(x, everything, weights, "self_attn."), weights, "self_attn_sum_norm."
    )
    wide = np.maximum(linear(x, weights, "mlp.up_proj"), 0)
    return layer_norm(of_input * x + of_sublayer * linear(wide, weights, "mlp.down_proj"), weights, "mlp_sum_norm.")


def mlp(x: np.ndarray, weights: Weights, act: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return linear(act(linear(x, weights, "up_proj")), weights, "down_proj")


def swiglu(x: np.ndarray, weights: Weights) -> np.ndarray:
    gate = linear(x, weights, "gate_proj")
    return linear(gate / (1 + np.exp(-gate)) * linear(x, weights, "up_proj"), weights, "down_proj")


def alibi(mask: np.ndarray) -> np.ndarray:
    """Slopes 2^-1, 2^-2, ... 2^-8 of 8 heads, times minus the distance, where a query sees a key."""
    slopes = 2.0 ** -np.arange(1, HEADS + 1)
    distance = np.abs(np.arange(TOKENS)[:, None] - np.arange(TOKENS))
    return np.where(mask, -slopes[:, None, None] * distance, -32768.0)


def relative_bias(weights: Weights) -> np.ndarray:
    """16 buckets for keys up to the query and 16 for those behind it: 8 of one distance each, then ever longer ones."""
    behind = np.arange(TOKENS) - np.arange(TOKENS)[:, None]
    far = 8 + (np.log(np.maximum(np.abs(behind), 1) / 8) / math.log(128 / 8) * 8).astype(int)
    bucket = np.where(np.abs(behind) < 8, np.abs(behind), np.minimum(far, 15)) + 16 * (behind > 0)
    return weights["weight"][bucket].transpose(2, 0, 1)


def turns(positions: np.ndarray) -> np.ndarray:
    """exp(i m theta), by which the complex numbers of neighbouring dimensions are multiplied."""
    theta = 10000.0 ** -(np.arange(0, HIDDEN // HEADS, 2) / (HIDDEN // HEADS))
    return np.exp(1j * positions[..., None] * theta)


def expected(name: str, given: Weights, weights: Weights) -> list[np.ndarray]:
    mask = given.get("mask", np.array(True))
    x = given.get("normed", given.get("hidden", np.zeros(1)))
    match name:
        case "alibi":
            return [alibi(mask)]
        case "deep_norm":
            return [deep_norm(x, weights, of_sublayer=1.0, of_input=ALPHA)]
        case "deep_norm_of_sublayers":
            return [deep_norm(x, weights, of_sublayer=ALPHA, of_input=1.0)]
        case "gelu":
            return [mlp(x, weights, lambda a: a * 0.5 * (1 + erf(a / math.sqrt(2))))]
        case "gelu_sigmoid":
            return [mlp(x, weights, lambda a: a / (1 + np.exp(-1.702 * a)))]
        case "gelu_tanh":
            return [mlp(x, weights, lambda a: 0.5 * a * (1 + np.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))))]
        case "gqa" | "mha" | "mqa":
            return [attention(x, mask, weights)]
        case "layer_norm":
            return [layer_norm(x, weights)]
        case "relative_bias":
            return [relative_bias(weights)]
        case "rms_norm":
            return [x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weights["weight"]]
        case "rotary":
            turned = turns(given["position_ids"])
            return [turned.real, turned.imag]
        case "swiglu":
            return [swiglu(x, weights)]
    raise KeyError(name)


def feed(session: onnxruntime.InferenceSession, *, causal: bool) -> Weights:
    """Random hidden states of two texts, the positions of the second far from 0, and masks."""
    random, made = np.random.default_rng(3), dict[str, np.ndarray]()
    for port in session.get_inputs():
        match port.name:
            case "position_ids":
                made[port.name] = np.arange(TOKENS) + np.array([[0], [300]])
            case "mask":
                seen = np.tri(TOKENS, k=0 if causal else TOKENS, dtype=bool)
                made[port.name] = np.broadcast_to(seen, (2, 1, TOKENS, TOKENS)).copy()
            case "attention_mask" | "input_ids":
                made[port.name] = np.ones((2, TOKENS), np.int64)
            case _:
                made[port.name] = random.standard_normal((2, TOKENS, HIDDEN), np.float32)
    return made


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(monkeypatch, capsys)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_block_exports_without_a_checkpoint_and_is_its_formula(name: str, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    code, _, error = run("onnx", "--block", name, "--weights", "copy", "-o", folder)
    assert code == 0, error
    export = manifest.read(folder)
    assert export.block == name
    weights = {n: t.astype(float) for p in sorted(folder.glob("*.safetensors")) for n, t in load_file(p).items()}
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    given = feed(session, causal=name != "relative_bias")
    found = session.run(None, given)
    wide = {n: a.astype(float) if a.dtype == np.float32 else a for n, a in given.items()}
    for ours, wanted in zip(found, expected(name, wide, weights), strict=True):
        assert compare(np.broadcast_to(wanted, ours.shape), ours).excess(tolerance("float32", export)) <= 1


def test_a_name_of_no_block_lists_the_names(run: Run, tmp_path: Path) -> None:
    code, _, error = run("onnx", "--block", "deepnorm", "-o", tmp_path / "out")
    assert code == 2
    assert "no block 'deepnorm' stands alone, there are alibi, deep_norm, " in error
    assert not (tmp_path / "out").exists()

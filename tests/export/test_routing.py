"""Which experts a model chooses, against transformers' own routers on the hidden states of its own run."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from arch_cases import CASES, Case
from decoders import reference
from first_feed import first_feed
from tiny_configs import placed_layers, read
from torch import Tensor, nn
from transformers.models.phimoe.modeling_phimoe import sparsemixer

from llmexport.export import blocks, graph_file, manifest
from llmexport.export.assembly import parts
from llmexport.export.blocks.moe import sparse_mixer
from llmexport.export.spec import Moe
from llmexport.graphs.bodies import op_of
from llmexport.validate import stages
from llmexport.validate.compare import compare
from llmexport.validate.runners import onnx_runner, to_torch
from llmexport.validate.tolerance import TOLERANCE

ROUTED = [c for c in CASES if any(isinstance(x.mlp, Moe) for x in placed_layers(read(c.arch, **c.changes)))]
TIE = 1e-6  # of two logits of order one: some units of fp32, which two right sums may differ by


def heard(model: nn.Module, ids: np.ndarray) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of every router that a run of the model calls: hidden states, logits, and weights [tokens, experts], zero of
    those that were not chosen."""
    found = []

    def listen(module: nn.Module, given: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> None:
        if len(made) == 2:  # Llama 4's
            weights, logits = made
        else:
            logits, chosen, experts = made
            weights = torch.zeros_like(logits).scatter(1, experts, chosen)
        found.append((given[0].reshape(len(logits), -1), logits, weights))

    for module in model.modules():
        if type(module).__name__.endswith("Router"):
            module.register_forward_hook(listen)
    with torch.no_grad():
        model(torch.from_numpy(ids))
    return found


def check(logits: Tensor, expected: Tensor, weights: Tensor, experts: Tensor) -> None:
    """The same experts, unless the last chosen and the first left out tie; of the same weights."""
    weights, experts = (x.reshape(len(logits), -1) for x in (weights, experts.long()))
    found = torch.zeros_like(logits).scatter(1, experts, weights)
    best = logits.topk(min(experts.shape[1] + 1, logits.shape[1]), sorted=True).values
    clear = best[:, -2] - best[:, -1] > TIE
    assert clear.float().mean() > 0.99
    assert torch.equal((found > 0)[clear], (expected > 0)[clear])
    assert compare(expected.numpy(), found.numpy(), clear.numpy()).excess(TOLERANCE["float32"]) <= 1


@pytest.mark.parametrize("jitter", [0.01, 0.3])
def test_a_sparse_mixer_chooses_and_weighs_as_that_of_transformers(jitter: float) -> None:
    """Of ties it takes the lower index, and of logits that are all zero or all below it what it takes of others."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(99, 7, generator=random).round(decimals=1)
    logits[0], logits[1], logits[2] = 0.0, -2.5, torch.tensor([0.0, -1, -1, 0, -2, 0, -3])
    logits[3:9] -= 9.0
    expected, chosen = sparsemixer(logits, jitter, training=False)
    weights, experts = sparse_mixer(logits, jitter)
    assert torch.equal(experts.long(), chosen)
    assert (logits.topk(2).values.diff() == 0).any(), "no logits tie"
    assert 0 < (expected < 1.0).float().mean() < 1
    assert compare(expected.numpy(), weights.numpy()).excess(TOLERANCE["float32"]) <= 1


@pytest.mark.parametrize("case", ROUTED, ids=str)
def test_every_layer_chooses_the_experts_that_transformers_chooses(case: Case, tiny_checkpoint, exported) -> None:
    """Our router on the hidden states of theirs, and the exported file on its own."""
    read_back = manifest.read(exported(case))
    prompt = stages.opening(np.random.default_rng(3).integers(0, 256, (2, 37)), np.ones((2, 37), np.int64))
    routings = heard(reference(tiny_checkpoint(case)), prompt.ids)
    graph = graph_file.load(read_back, read_back.graphs[0])
    named = [n.input[1:3] for n in graph.graph.node if op_of(n) == "MoeExperts"]
    graph.graph.output.extend(onnx.ValueInfoProto(name=n) for names in named for n in names)
    feed = first_feed(read_back.graphs[0], prompt)
    # transformers counts the positions of every row from 0.
    if "position_ids" in feed:
        feed["position_ids"] = np.ascontiguousarray(np.broadcast_to(np.arange(37), feed["position_ids"].shape))
    with onnx_runner(graph, read_back.folder) as runner:
        outputs = runner.infer(feed, check_inputs=False)
    every = [part for step in read_back.steps for part in parts(step)]
    steps = [part for part in every if isinstance(part.block, Moe)]
    checkpoint = read_back.checkpoint()
    for step, names, (hidden, logits, expected) in zip(steps, named, routings, strict=True):
        router = blocks.module(step.block.router, torch.float32)
        stored = {
            n: read_back.graphs[0].step_weights[step.name.removesuffix(".mlp")][f"mlp.router.{n}"]
            for n, _ in router.named_parameters()
        }
        router.load_state_dict({n: to_torch(checkpoint.read(t)) for n, t in stored.items()}, assign=True)
        check(logits, expected, *router(hidden.unsqueeze(0)))
        check(logits, expected, *(torch.from_numpy(np.copy(outputs[n])) for n in names))

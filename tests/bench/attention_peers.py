"""Who else computes attention with windows, soft caps and sinks: each takes a case of attention_cases.py."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from gpu_clock import once

if TYPE_CHECKING:
    from attention_cases import AttentionCase

Peer = Callable[..., object]
WORKSPACE_BYTES = 256 << 20


def with_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Attention with sinks from attention without and the log of its weights' sum, as transformers makes it.

    out [..., H, T, D], lse [..., H, T], sinks [H].
    """
    return (out.float() * torch.sigmoid(lse - sinks.float()[:, None]).unsqueeze(-1)).to(out.dtype)


def flex(case: AttentionCase) -> Peer:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    layer, past = case.layer, case.S - case.T

    def visible(b: object, h: object, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        seen = key <= query + past
        return seen & (key > query + past - layer.window) if layer.window else seen

    def capped(score: torch.Tensor, *place: object) -> torch.Tensor:
        return layer.softcap * torch.tanh(score / layer.softcap)

    @functools.cache
    def mask(device: torch.device) -> object:
        return create_block_mask(visible, None, None, case.T, case.S, device)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: object, *sinks: torch.Tensor) -> torch.Tensor:
        score = capped if layer.softcap else None
        call = functools.partial(flex_attention, q, k, v, score, mask, enable_gqa=layer.G < layer.H)
        return with_sinks(*call(return_lse=True), sinks[0]) if sinks else call()

    compiled = torch.compile(attend, dynamic=False)
    return lambda q, k, v, start, length, *sinks: compiled(q, k, v, mask(q.device), *sinks)


def flash(case: AttentionCase) -> Peer:
    """FlashAttention-2 as torch has it, which takes [B, T, H, D]: views of ours, whose strides it accepts."""
    window = case.layer.window

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: object, length: object, *sinks: torch.Tensor
    ) -> torch.Tensor:
        views = (x.transpose(1, 2) for x in (q, k, v))
        sides = {"window_size_left": window - 1, "window_size_right": 0} if window else {}
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *views, None, None, case.T, case.S, 0.0, case.T > 1, False, scale=case.layer.D**-0.5, **sides
        )
        out = out.transpose(1, 2)
        return with_sinks(out, lse, sinks[0]) if sinks else out

    return attend


def sdpa(case: AttentionCase) -> Peer:
    """Whatever torch thinks best."""
    return lambda q, k, v, *rest: F.scaled_dot_product_attention(q, k, v, is_causal=case.T > 1, enable_gqa=True)


def by_token(q: torch.Tensor) -> torch.Tensor:
    """[B, H, T, D] as flashinfer takes it, [B * T, H, D]."""
    return q.transpose(1, 2).flatten(0, 1).contiguous()


def flashinfer_prefill(case: AttentionCase) -> Peer:
    import flashinfer

    layer = case.layer
    call = functools.partial(
        flashinfer.single_prefill_with_kv_cache,
        causal=True,
        kv_layout="HND",
        window_left=layer.window - 1,
        logits_soft_cap=layer.softcap or None,
        return_lse=layer.sinks,
    )
    turned = once(by_token)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: torch.Tensor) -> object:
        found = call(turned(q), k[0], v[0])
        if not layer.sinks:
            return found.transpose(0, 1)[None]
        out, log2 = found
        return with_sinks(out.transpose(0, 1), log2.transpose(0, 1) * math.log(2), rest[-1])[None]

    return attend


def flashinfer_decode(case: AttentionCase) -> Peer:
    """The cache of a row is one page."""
    import flashinfer

    layer = case.layer

    @functools.cache
    def wrapper() -> Any:
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
        made = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        rows = torch.arange(case.B + 1, dtype=torch.int32, device="cuda")
        made.plan(
            rows,
            rows[:-1],
            torch.full((case.B,), case.S, dtype=torch.int32, device="cuda"),
            layer.H,
            layer.G,
            layer.D,
            case.S,
            window_left=layer.window - 1,
            logits_soft_cap=layer.softcap or None,
            q_data_type=torch.bfloat16,
            kv_data_type=torch.bfloat16,
        )
        return made

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: torch.Tensor) -> object:
        found = wrapper().run(q[:, :, 0], (k, v), return_lse=layer.sinks)
        if not layer.sinks:
            return found[:, :, None]
        out, log2 = found
        return with_sinks(out[:, :, None], log2[:, :, None] * math.log(2), rest[-1])

    return attend


def flashinfer_sinks(case: AttentionCase) -> Peer:
    """Prefill and decode by the wrapper that takes sinks, in fp32. The cache of a row is one page."""
    layer = case.layer
    window_left = layer.window - 1
    turned, wide = once(by_token), once(torch.Tensor.float)

    @functools.cache
    def wrapper(device: torch.device) -> Any:
        import flashinfer

        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        made = flashinfer.BatchAttentionWithAttentionSinkWrapper(
            workspace,
            kv_layout="HND",
            q_data_type=torch.bfloat16,
            kv_data_type=torch.bfloat16,
            head_dim_qk=layer.D,
            head_dim_vo=layer.D,
            window_left=window_left,
        )
        rows = torch.arange(case.B + 1, dtype=torch.int32, device=device)
        made.plan(
            rows * case.T,
            rows,
            rows[:-1],
            torch.full((case.B,), case.S, dtype=torch.int32, device=device),
            layer.H,
            layer.G,
            layer.D,
            case.S,
            causal=True,
            window_left=window_left,
            q_data_type=torch.bfloat16,
            kv_data_type=torch.bfloat16,
        )
        return made

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: object, length: object, sinks: torch.Tensor
    ) -> torch.Tensor:
        found = wrapper(q.device).run(turned(q), (k, v), wide(sinks), layer.D**-0.5)
        return found.unflatten(0, (case.B, case.T))

    return attend


def cudnn_graph(case: AttentionCase, handle: object = None) -> tuple[Any, list[Any]]:
    """cuDNN's fused attention; its tensors are q, k, v, sinks [1, H, 1, 1] in fp32, and the result."""
    import cudnn

    layer, half, single = case.layer, cudnn.data_type.BFLOAT16, cudnn.data_type.FLOAT
    graph = cudnn.pygraph(handle=handle, io_data_type=half, intermediate_data_type=single, compute_data_type=single)

    def tensor(name: str, kind: object, *shape: int) -> Any:
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        return graph.tensor(name=name, dim=list(shape), stride=strides, data_type=kind)

    rows, keys = (case.B, layer.H, case.T, layer.D), (case.B, layer.G, case.S, layer.D)
    q, k, v = tensor("q", half, *rows), tensor("k", half, *keys), tensor("v", half, *keys)
    sinks = tensor("sinks", single, 1, layer.H, 1, 1)
    y, _ = graph.sdpa(
        name="attention",
        q=q,
        k=k,
        v=v,
        generate_stats=False,
        attn_scale=layer.D**-0.5,
        # A query sees as many keys as the left bound says, itself among them.
        diagonal_alignment=cudnn.diagonal_alignment.TOP_LEFT,
        diagonal_band_left_bound=layer.window or None,
        diagonal_band_right_bound=0,
        sink_token=sinks,
    )
    y.set_output(True).set_dim(q.get_dim()).set_stride(q.get_stride()).set_data_type(half)
    graph.validate()
    return graph, [q, k, v, sinks, y]


def cudnn_sinks(case: AttentionCase) -> Peer:
    """By cuDNN's Python frontend, of a prompt without a past."""
    wide = once(lambda sinks: sinks.float().reshape(1, -1, 1, 1))

    @functools.cache
    def built() -> tuple[Any, ...]:
        import cudnn

        handle = cudnn.create_handle()
        graph, tensors = cudnn_graph(case, handle)
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        workspace = torch.empty(max(graph.get_workspace_size(), 1), dtype=torch.uint8, device="cuda")
        return cudnn.set_stream, handle, graph, tensors, workspace

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: object, length: object, sinks: torch.Tensor
    ) -> torch.Tensor:
        set_stream, handle, graph, tensors, workspace = built()
        set_stream(handle, torch.cuda.current_stream().cuda_stream)
        y = torch.empty_like(q)
        graph.execute(dict(zip(tensors, (q, k, v, wide(sinks), y), strict=True)), workspace, handle=handle)
        return y

    return attend

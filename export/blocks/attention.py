"""Attention in all its forms."""

import torch
from torch import Tensor, nn

from llmexport.export import spec
from llmexport.export.blocks.linear import linear
from llmexport.export.blocks.norm import Norm
from llmexport.export.blocks.standard import attention, tensor_scatter
from llmexport.plugins.rope import rope
from llmexport.plugins.sink_attention import sink_attention


class Attention(nn.Module):
    def __init__(self, block: spec.Attention) -> None:
        super().__init__()
        self.block = block
        hidden, q_width, kv_width = block.hidden, block.heads * block.head_size, block.kv_heads * block.head_size
        turn = block.transposed
        if block.fused:
            self.qkv_proj = linear(hidden, q_width + 2 * kv_width, block.qkv_bias, turn)
        else:
            self.q_proj = linear(hidden, q_width * (1 + block.output_gate), block.qkv_bias, turn)
            self.k_proj = None if block.borrows else linear(hidden, kv_width, block.qkv_bias, turn)
            own = not block.borrows and not block.key_is_value
            self.v_proj = linear(hidden, kv_width, block.qkv_bias, turn) if own else None
        self.o_proj = linear(q_width, hidden, block.out_bias, turn)
        for name, norm in block.norms.items():
            self.add_module(name, Norm(norm))
        if block.sinks:
            self.sinks = nn.Parameter(torch.empty(block.heads))
        self.names = [p.name for p in (*block.context, *(s.past for s in block.states))]

    def forward(self, normed: Tensor, *read: Tensor) -> Tensor | tuple[Tensor, ...]:
        """`read` is the context and the cache, in the order of the block's ports."""
        return self.attend(*self._project(normed), dict(zip(self.names, read, strict=True)))

    def attend(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, gate: Tensor | None, given: dict[str, Tensor]
    ) -> Tensor | tuple[Tensor, ...]:
        """What q, k, v [B, T, heads, D] make of the context and the cache, by the names of their ports."""
        block, (batch, sequence) = self.block, q.shape[:2]
        q, k, v = self.heads_first(q, k, v, given)
        if block.temperature:
            q = (q.float() * given["temperature"].unsqueeze(1).unsqueeze(-1)).to(q.dtype)
        seen = key, value = self.seen(k, v, given)
        scale = block.head_size**-0.5 if block.scale is None else block.scale
        if block.spans:
            sinks = self.sinks if block.sinks else None
            span = (given["start"], given["length"])
            mixed = sink_attention(q, key, value, *span, sinks, scale, block.softcap, block.window)
        else:
            mixed = attention(q, key, value, given.get("bias" if block.biased else "mask"), scale).transpose(1, 2)
        mixed = mixed.reshape(batch, sequence, block.heads * block.head_size)
        attended: Tensor = self.o_proj(mixed if gate is None else mixed * torch.sigmoid(gate))
        if block.keys and block.keys.slides:
            key, value = (x[:, :, -block.keys.slots :] for x in (key, value))
        return (attended, *(seen if block.lent else ()), key, value) if block.states else attended

    def heads_first(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, given: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """q, k and v [B, T, heads, D], normed and turned, as [B, heads, T, D]."""
        q = self._turn(q, given, "q_norm")
        if k is None or v is None:
            return q, None, None
        return q, self._turn(k, given, "k_norm"), v.transpose(1, 2)

    def seen(self, k: Tensor | None, v: Tensor | None, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """All keys and values [B, heads, S, D] that the step sees, given those of its own tokens."""
        if k is None or v is None:
            return given["seen_key"], given["seen_value"]
        key, value = k, v
        if self.block.scatters:
            past_key, past_value, first = self.slots(given)
            key, value = tensor_scatter(past_key, key, first), tensor_scatter(past_value, value, first)
        elif self.block.cached:
            key, value = torch.cat((given["past_key"], key), 2), torch.cat((given["past_value"], value), 2)
        return key, value

    def slots(self, given: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The static cache before the step, [B, heads, S, D] each, and the first slot of each row's step [B]."""
        return given["past_key"], given["past_value"], given["past_length"]

    def _project(self, normed: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """q, k, v as [B, T, heads, D], and the output gate [B, T, H * D] if there is one; None for what is borrowed."""
        block, gate = self.block, None
        size = block.head_size
        if block.grouped:
            together = block.heads // block.kv_heads
            rows = self.qkv_proj(normed).unflatten(-1, (block.kv_heads, together + 2, size))
            q, k, v = (x.flatten(2) for x in rows.split([together, 1, 1], -2))
        elif block.fused:
            widths = [n * size for n in (block.heads, block.kv_heads, block.kv_heads)]
            q, k, v = self.qkv_proj(normed).split(widths, -1)
        else:
            q, k = self.q_proj(normed), self.k_proj(normed) if self.k_proj else None
            v = self.v_proj(normed) if self.v_proj else k
        if block.clip is not None:
            q, k, v = (x if x is None else x.clamp(-block.clip, block.clip) for x in (q, k, v))
        batch, sequence, _ = normed.shape
        if block.output_gate:
            q, gate = q.view(batch, sequence, block.heads, 2 * size).chunk(2, -1)
            gate = gate.reshape(batch, sequence, block.heads * size)
        q = q.view(batch, sequence, block.heads, size)
        k, v = (x if x is None else x.view(batch, sequence, block.kv_heads, size) for x in (k, v))
        if "v_norm" in block.norms:
            v = self.get_submodule("v_norm")(v)
        return q, k, v, gate

    def _turn(self, x: Tensor, given: dict[str, Tensor], norm: str) -> Tensor:
        """Norm and RoPE of [B, T, heads, D], in the block's order, as [B, heads, T, D]."""
        block = self.block
        if block.qk_norm and block.qk_norm_place == "before_rotary":
            x = self.normed(x, norm)
        x = x.transpose(1, 2)
        if block.halves:
            # What turns together comes to lie as in a head without halves; scores do not tell.
            x = x.unflatten(-1, (2, 2, block.head_size // 4)).transpose(-3, -2).flatten(-3)
        if block.turned:
            x = rope(x, *self.angles(given), block.interleaved)
        if block.qk_norm and block.qk_norm_place == "after_rotary":
            x = self.get_submodule(norm)(x)
        return x

    def angles(self, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """cos and sin [B, T, R]."""
        return given["cos"], given["sin"]

    def normed(self, x: Tensor, norm: str) -> Tensor:
        """q or k [B, T, heads, D] after its norm, which is one of each head or over all of them."""
        whole = self.block.qk_norm_over == "all_heads"
        normed: Tensor = self.get_submodule(norm)(x.flatten(2) if whole else x)
        return normed.view(x.shape) if whole else normed

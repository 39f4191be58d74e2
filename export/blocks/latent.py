"""Multi-head latent attention."""

import torch
from torch import Tensor, nn

from llmexport.export import spec
from llmexport.export.blocks.norm import Norm
from llmexport.export.blocks.standard import attention, tensor_scatter
from llmexport.plugins.rope import rope


class LatentAttention(nn.Module):
    """Parameter names are those of transformers' modeling_deepseek_v3.py."""

    def __init__(self, block: spec.LatentAttention) -> None:
        super().__init__()
        self.block = block
        width = block.heads * (block.key_size + block.rope_size)
        if block.query is None:
            self.q_proj = nn.Linear(block.hidden, width, bias=False)
        else:
            self.q_a_proj = nn.Linear(block.hidden, block.query, bias=block.bias)
            self.q_a_layernorm = Norm(spec.Norm(block.query, block.epsilon))
            self.q_b_proj = nn.Linear(block.query, width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(block.hidden, block.latent + block.rope_size, bias=block.bias)
        self.kv_a_layernorm = Norm(spec.Norm(block.latent, block.epsilon))
        self.kv_b_proj = nn.Linear(block.latent, block.heads * (block.key_size + block.value_size), bias=False)
        self.o_proj = nn.Linear(block.heads * block.value_size, block.hidden, bias=block.bias)
        self.names = [p.name for p in (*block.context, *(s.past for s in block.states))]

    def forward(self, normed: Tensor, *read: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`read` is the context and the cache, in the order of the block's ports."""
        block, given = self.block, dict(zip(self.names, read, strict=True))
        batch, sequence, _ = normed.shape
        sizes = [block.key_size, block.rope_size]
        own, turned = self._queries(normed).view(batch, sequence, block.heads, sum(sizes)).split(sizes, -1)
        latent, shared = self.kv_a_proj_with_mqa(normed).split([block.latent, block.rope_size], -1)
        latent = self.kv_a_layernorm(latent).unsqueeze(1)
        turned, shared = self._turn(turned, given), self._turn(shared.unsqueeze(2), given)
        if block.keys:
            latent = tensor_scatter(given["past_latent"], latent, given["past_length"])
            shared = tensor_scatter(given["past_rope_key"], shared, given["past_length"])
        else:
            latent = torch.cat((given["past_latent"], latent), 2)
            shared = torch.cat((given["past_rope_key"], shared), 2)
        # Of each head, the rows that make its key lie before those that make its value.
        matrices = self.kv_b_proj.weight.view(block.heads, -1, block.latent)
        query = torch.cat((own.transpose(1, 2) @ matrices[:, : block.key_size], turned), -1)
        # The value has the shared key too, which is dropped: TensorRT takes no value of another size than the key.
        both = torch.cat((latent, shared), -1)
        mixed = attention(query, both, both, given["mask"], block.scale)[..., : block.latent]
        values = matrices[:, block.key_size :] @ mixed.transpose(2, 3)
        attended: Tensor = self.o_proj(values.permute(0, 3, 1, 2).reshape(batch, sequence, -1))
        return attended, latent, shared

    def _queries(self, normed: Tensor) -> Tensor:
        """Own and turned parts of all heads [B, T, H * D]."""
        if self.block.query is None:
            made: Tensor = self.q_proj(normed)
        else:
            made = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(normed)))
        return made

    def _turn(self, x: Tensor, given: dict[str, Tensor]) -> Tensor:
        """RoPE of [B, T, heads, D], as [B, heads, T, D]."""
        block = self.block
        if block.parted:
            x = x.unflatten(-1, (block.rope_size // 2, 2)).permute(0, 2, 1, 4, 3).flatten(-2)
        else:
            x = x.transpose(1, 2)
        return rope(x, given["cos"], given["sin"], block.interleaved) if block.turned else x

"""The two ends of a decoder and the layer between them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmexport.export import spec
from llmexport.export.blocks.attention import Attention
from llmexport.export.blocks.delta import GatedDeltaNet
from llmexport.export.blocks.mlp import Mlp
from llmexport.export.blocks.moe import Moe
from llmexport.export.blocks.norm import Norm


class Embedding(nn.Module):
    def __init__(self, block: spec.Embedding, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(block.vocabulary, block.hidden))
        # Gemma rounds the scale to the weight's dtype before it multiplies.
        self.scale = float(torch.tensor(block.scale, dtype=dtype, device="cpu"))

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = F.embedding(input_ids, self.weight)
        return hidden if self.scale == 1.0 else hidden * self.scale


class DecoderLayer(nn.Module):
    def __init__(self, block: spec.DecoderLayer) -> None:
        super().__init__()
        self.input_layernorm = Norm(block.input_norm)
        if isinstance(block.mixer, spec.Attention):
            self.self_attn = Attention(block.mixer)
        else:
            self.linear_attn = GatedDeltaNet(block.mixer)
        self.post_attention_layernorm = Norm(block.post_attention_norm)
        self.mlp = Moe(block.mlp) if isinstance(block.mlp, spec.Moe) else Mlp(block.mlp)
        self.mixer_output_norm = Norm(block.mixer_output_norm) if block.mixer_output_norm else nn.Identity()
        self.mlp_output_norm = Norm(block.mlp_output_norm) if block.mlp_output_norm else nn.Identity()

    def forward(self, hidden: Tensor, *read: Tensor) -> tuple[Tensor, ...]:
        """`read` is the mixer's context and cache."""
        mixer = self.self_attn if hasattr(self, "self_attn") else self.linear_attn
        attended, *present = mixer(self.input_layernorm(hidden), *read)
        hidden = hidden + self.mixer_output_norm(attended)
        mixed = self.mlp(self.post_attention_layernorm(hidden))
        return hidden + self.mlp_output_norm(mixed), *present


class Head(nn.Module):
    def __init__(self, block: spec.Head) -> None:
        super().__init__()
        self.softcap = block.softcap
        self.norm = Norm(block.norm)
        self.projection = nn.Linear(block.norm.size, block.vocabulary, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.projection(self.norm(hidden))
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits

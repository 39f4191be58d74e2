"""Multi-head latent attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from llmexport.export.errors import ExportError
from llmexport.export.spec.axis import BATCH, PAST, SEQUENCE, TOTAL, WRITTEN
from llmexport.export.spec.block import OPSET, PAST_LENGTH, Block, Port, State, Use, state
from llmexport.export.spec.context import Keys
from llmexport.export.spec.mixer import SCATTER_OPSET, Mixer, Norm


@dataclass(frozen=True)
class LatentAttention(Mixer):
    """Attention whose keys and values are made of one `latent` a token (MLA, arXiv 2405.04434), which is all that is
    kept of it, normed, beside one key of `rope_size` that all heads share. With `keys` the cache is static.

    A key of a head is a matrix times the latent, of `key_size`, then the shared key. The query takes that matrix in
    its stead: all heads read one key, latent and shared key side by side, and one value, the latent, whose matrix
    comes after attention. So no step makes keys and values of earlier tokens again.

    `query` is the size of the latent that queries are made of (None: of the hidden states). Neighbours turn as pairs
    if `interleaved`, else halves; `parted` sets neighbours apart before they turn, and leaves them so in the cache
    (modeling_deepseek_v3.py, apply_rotary_pos_emb_interleave). Unless `turned`, nothing turns
    (modeling_kimi_linear.py). `bias` is that of the projections to latents and of the output. `scale` is that of the
    logits, `epsilon` that of the latents' norms.
    """

    sublayer: ClassVar[str] = "self_attn"
    heads: int
    key_size: int
    rope_size: int
    value_size: int
    latent: int
    query: int | None
    scale: float
    epsilon: float = 1e-6
    bias: bool = False
    turned: bool = True
    interleaved: bool = False
    parted: bool = False
    keys: Keys | None = None

    def __post_init__(self) -> None:
        if self.rope_size % 2:
            raise ExportError(f"config.json: qk_rope_head_dim is {self.rope_size}, RoPE needs an even number")
        if self.keys and self.keys.slides:
            raise ValueError("latent attention has no window")

    @property
    def context(self) -> tuple[Port, ...]:
        angles = (BATCH, SEQUENCE, self.rope_size // 2)
        ports = [Port("cos", angles, use="cos"), Port("sin", angles, use="sin")] if self.turned else []
        ports.append(Port("mask", (BATCH, 1, SEQUENCE, self.keys.axis if self.keys else TOTAL), "bool", "mask"))
        return (*ports, PAST_LENGTH) if self.keys else tuple(ports)

    @property
    def states(self) -> tuple[State, ...]:
        past, present = (self.keys.slots,) * 2 if self.keys else (PAST, TOTAL)
        use: Use = "slots" if self.keys else "state"
        sizes = {"latent": self.latent, "rope_key": self.rope_size}
        return tuple(state(n, (BATCH, 1, past, s), (BATCH, 1, present, s), use=use) for n, s in sizes.items())

    @property
    def opset(self) -> int:
        return SCATTER_OPSET if self.keys else OPSET

    @property
    def most(self) -> Mapping[str, int]:
        return dict.fromkeys((SEQUENCE, WRITTEN), self.keys.slots) if self.keys else {}

    @property
    def parts(self) -> Mapping[str, tuple[Block, str]]:
        query = {} if self.query is None else {"q_norm": (Norm(self.query, self.epsilon), "q_a_layernorm.")}
        return {**query, "kv_norm": (Norm(self.latent, self.epsilon), "kv_a_layernorm.")}

"""The Llama checkpoints that the benchmarks export: seeded random weights, or sparse files of holes.

python tests/bench/checkpoints.py llama-0.5b FOLDER
"""

import json
import math
import struct
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

BYTES_PER_WEIGHT = 2  # bf16


@dataclass(frozen=True)
class Llama:
    """Dimensions of one checkpoint; the data of a `sparse` one are holes, which read as zero."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    shard_bytes: int
    tied: bool = False
    llama3_rope: bool = False
    sparse: bool = False


CHECKPOINTS = {
    "tiny-tied": Llama(64, 3, 4, 2, 176, 512, 200_000, tied=True),
    "tiny-llama3": Llama(64, 3, 4, 2, 176, 512, 200_000, llama3_rope=True),
    "llama-0.5b": Llama(896, 24, 14, 2, 4864, 151_936, 400_000_000, tied=True),
    "llama-6-layers": Llama(512, 6, 8, 2, 1408, 32_000, 100_000_000),
    "llama-48-layers": Llama(512, 48, 8, 2, 1408, 32_000, 100_000_000),
    "llama-70b": Llama(8192, 80, 64, 8, 28_672, 128_256, 5_000_000_000, llama3_rope=True, sparse=True),
}


def config(llama: Llama) -> dict[str, object]:
    """`config.json` as transformers 5 writes it."""
    rope: dict[str, object] = {"rope_theta": 10000.0, "rope_type": "default"}
    if llama.llama3_rope:
        rope = {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_theta": 500000.0,
            "rope_type": "llama3",
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "dtype": "bfloat16",
        "eos_token_id": 2,
        "head_dim": llama.hidden // llama.heads,
        "hidden_act": "silu",
        "hidden_size": llama.hidden,
        "initializer_range": 0.02,
        "intermediate_size": llama.intermediate,
        "max_position_embeddings": 131072 if llama.llama3_rope else 4096,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": llama.heads,
        "num_hidden_layers": llama.layers,
        "num_key_value_heads": llama.kv_heads,
        "pad_token_id": None,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_parameters": rope,
        "tie_word_embeddings": llama.tied,
        "transformers_version": "5.23.0",
        "use_cache": True,
        "vocab_size": llama.vocab,
    }


# onnxruntime-genai's builder refuses a folder without a tokenizer; three words are enough for it.
WORDS = ("<unk>", "<s>", "</s>")
TOKENIZER = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {
            "id": i,
            "content": word,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, word in enumerate(WORDS)
    ],
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(WORDS)}, "unk_token": "<unk>"},
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
}


def tensors(llama: Llama) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every weight, in model order."""
    hidden, kv = llama.hidden, llama.hidden // llama.heads * llama.kv_heads
    yield "model.embed_tokens.weight", (llama.vocab, hidden)
    for layer in range(llama.layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.self_attn.q_proj.weight", (hidden, hidden)
        yield f"{prefix}.self_attn.k_proj.weight", (kv, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (kv, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}.mlp.gate_proj.weight", (llama.intermediate, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (llama.intermediate, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, llama.intermediate)
    yield "model.norm.weight", (hidden,)
    if not llama.tied:
        yield "lm_head.weight", (llama.vocab, hidden)


def size(shape: tuple[int, ...]) -> int:
    return math.prod(shape) * BYTES_PER_WEIGHT


def shards(llama: Llama) -> list[dict[str, tuple[int, ...]]]:
    """The weights cut, in order, into files of at most `shard_bytes` (a larger tensor stands alone)."""
    cut: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in tensors(llama):
        if cut[-1] and filled + size(shape) > llama.shard_bytes:
            cut.append({})
            filled = 0
        cut[-1][name] = shape
        filled += size(shape)
    return cut


def write_shard(file: BinaryIO, shard: dict[str, tuple[int, ...]], sparse: bool) -> None:
    """A safetensors file: length of the header, header padded to 8 bytes, the data back to back."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shard.items():
        start, end = end, end + size(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    if sparse:
        file.truncate(file.tell() + end)
        return
    for name, shape in shard.items():
        file.write(weight(name, shape).tobytes())


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Normal values seeded by the name: scaled by the fan-in for a matrix, around one for a norm. bf16."""
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)
    values = 1 + 0.1 * values if len(shape) == 1 else values * shape[1] ** -0.5
    return values.astype(ml_dtypes.bfloat16)


def write(llama: Llama, folder: Path) -> None:
    """Write the checkpoint into `folder`, which must not exist."""
    folder.mkdir(parents=True)
    cut = shards(llama)
    names = [f"model-{i:05}-of-{len(cut):05}.safetensors" for i in range(1, len(cut) + 1)]
    for name, shard in zip(names, cut, strict=True):
        with (folder / name).open("wb") as file:
            write_shard(file, shard, llama.sparse)
    total = sum(math.prod(shape) for _, shape in tensors(llama))
    index = {
        "metadata": {"total_parameters": total, "total_size": total * BYTES_PER_WEIGHT},
        "weight_map": {weight: name for name, shard in zip(names, cut, strict=True) for weight in shard},
    }
    files = {
        "config.json": config(llama),
        "tokenizer.json": TOKENIZER,
        "tokenizer_config.json": TOKENIZER_CONFIG,
        "model.safetensors.index.json": index,
    }
    for file_name, content in files.items():
        (folder / file_name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(CHECKPOINTS[sys.argv[1]], Path(sys.argv[2]))

"""Tiny checkpoints that the field's own tools write: `python quantisers.py FOLDER`, with a Python that has the tools.

FOLDER/FORM/ck is what a tool saves, FOLDER/FORM/meant the same in float32, as the tool itself dequantises it. None of
our code is here.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import modelopt.torch.export as exporting
import modelopt.torch.quantization as mtq
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4 import base as fp4
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from modelopt.torch.export.unified_export_hf import requantize_resmooth_fused_llm_layers
from modelopt.torch.quantization.qtensor import FP8QTensor, INT8QTensor, MXFP4QTensor, MXFP8QTensor, NVFP4QTensor
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3_5MoeTextConfig,
)
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

Tensors = dict[str, torch.Tensor]
WEIGHTS = "model.safetensors"
# Groups and blocks of 128 fill its columns; the rows of keys and values are half a block.
SIZES = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, "head_dim": 64}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 1, "max_position_embeddings": 128}
# Experts of several in one tensor: [experts, inputs, outputs], but [experts, outputs, inputs] of the last.
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SPARSE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"],
    "rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.25, "mrope_section": [4, 2, 2]},
}


def sparse(intermediate_size: int, **sizes: Any) -> Qwen3_5MoeTextConfig:
    """No layer of it has an MLP."""
    return Qwen3_5MoeTextConfig(**sizes, **SPARSE)


SOURCES: dict[str, Callable[..., Any]] = {
    "plain": LlamaConfig,
    "tied": functools.partial(LlamaConfig, tie_word_embeddings=True),
    "llama4": functools.partial(Llama4TextConfig, **EXPERTS, intermediate_size_mlp=512, interleave_moe_layer_step=2),
    "gpt_oss": functools.partial(GptOssConfig, **EXPERTS),
    "qwen3_5_moe": sparse,
}
MIXED = {"FP8_DYNAMIC": r"re:.*self_attn\.\w_proj$", "W4A16": r"re:.*mlp\.\w+_proj$"}
ROWS = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="channel")
CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def ids() -> torch.Tensor:
    """What is calibrated on."""
    return torch.randint(SIZES["vocab_size"], (4, 16), generator=torch.Generator().manual_seed(1))


def plain(folder: Path, kind: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    # What a standard deviation of 0.02 makes of these sizes are logits near zero.
    model = AutoModelForCausalLM.from_config(kind(**SIZES, initializer_range=0.08)).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    # Else experts that its class has in one tensor are taken apart.
    model.save_pretrained(folder, save_original_format=False)


def loaded(folder: Path, **how: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **how).eval()


def modules(held: Tensors, mark: str) -> dict[str, Tensors]:
    """The tensors of each module that has one of this name; they are taken from those that are held."""
    found = [n.removesuffix(f".{mark}") for n in held if n.endswith(f".{mark}")]
    return {m: {n.removeprefix(f"{m}."): held.pop(n) for n in [*held] if n.startswith(f"{m}.")} for m in found}


def compressed(
    source: Path,
    folder: Path,
    scheme: str | None = "W4A16",
    *,
    kind: Any = QuantizationModifier,
    calibrated: bool = False,
    ignore: tuple[str, ...] = ("lm_head",),
    **how: Any,
) -> Tensors:
    """By llm-compressor."""
    model = loaded(source)
    said = {"targets": "Linear", "scheme": scheme} if scheme else {}
    given: dict[str, Any] = {}
    if calibrated:
        data = Dataset.from_dict({"input_ids": ids().tolist(), "attention_mask": torch.ones_like(ids()).tolist()})
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, "a")), pad_token="a")
        given = {"dataset": data, "processor": tokenizer, "num_calibration_samples": len(data), "max_seq_length": 16}
    recipe = kind(**said, ignore=list(ignore), **how)
    oneshot(model=model, recipe=recipe, tie_word_embeddings=model.config.tie_word_embeddings, **given)
    schemes = {n: s for n, m in model.named_modules() if (s := getattr(m, "quantization_scheme", None)) and s.weights}
    model.save_pretrained(folder, save_compressed=True)
    held = load_file(folder / WEIGHTS)
    for name, own in modules(held, "weight_scale").items():
        # A scale's type is that of the result.
        wide = {n: t.float() if t.dtype == torch.bfloat16 else t for n, t in own.items()}
        tool = BaseCompressor.get_value_from_registry(schemes[name].format)
        held[f"{name}.weight"] = tool.decompress(wide, schemes[name])["weight"]
    return {n: t for n, t in held.items() if not n.endswith(("k_scale", "v_scale"))}


def by_modelopt(
    source: Path, folder: Path, preset: str, attention: str | None = None, cache: str | None = None
) -> Tensors:
    """By ModelOpt: a preset, and others in attention and for a cache."""
    model = loaded(source)
    config = copy.deepcopy(getattr(mtq, preset))
    config["quant_cfg"] += copy.deepcopy(getattr(mtq, cache)["quant_cfg"]) if cache else []
    for rule in getattr(mtq, attention)["quant_cfg"] if attention else ():
        if "cfg" in rule:
            config["quant_cfg"].append({**rule, "quantizer_name": f"*self_attn{rule['quantizer_name']}"})
    mtq.quantize(model, config, lambda m: m(ids()))
    faked = {}
    if "INT4" in preset:
        # The first step of the export, in which modules of one input come to share its factor.
        requantize_resmooth_fused_llm_layers(model)
        quantised = {n: m for n, m in model.named_modules() if hasattr(m, "weight_quantizer")}
        for module in quantised.values():
            # What is quantised already is near no tie, which quantiser and export round each to another side.
            module.weight.data = module.weight_quantizer(module.weight.data)
        faked = {n: faked_weight(m) for n, m in quantised.items()}
    exporting.export_hf_checkpoint(model, export_dir=folder)
    held = load_file(folder / WEIGHTS)
    for name, own in modules(held, "weight_scale").items():
        held[f"{name}.weight"] = dequantised(own, faked.get(name))
    for name in [n.removesuffix("_weight_scale") for n in held if n.endswith("_weight_scale")]:
        ends = ("", "_input_scale", "_weight_scale", "_weight_scale_2")
        own = {end: held.pop(name + end) for end in ends if name + end in held}
        held[name] = of_stack(own[""].mT, own["_weight_scale"], own.get("_weight_scale_2")).mT
    return {n: t for n, t in held.items() if not n.endswith(("k_scale", "v_scale"))}


def faked_weight(module: Any) -> torch.Tensor:
    """What the module multiplies with, in the numbers that its quantisers leave."""
    factor = getattr(module.input_quantizer, "pre_quant_scale", None)
    weight = module.weight_quantizer(module.weight.detach().float())
    return weight if factor is None else weight * factor.float()


def dequantised(own: Tensors, faked: torch.Tensor | None) -> torch.Tensor:
    weight, scale = own["weight"], own["weight_scale"]
    double = own.get("weight_scale_2")
    if weight.dtype == torch.uint8 and weight.shape[0] != scale.shape[0]:
        assert faked is not None, "ModelOpt has no function that unpacks these"
        return faked
    rows, columns = weight.shape
    options: dict[str, Any] = {"scale": scale}
    if weight.dtype == torch.uint8:
        kind, shape = MXFP4QTensor if double is None else NVFP4QTensor, (rows, 2 * columns)
        options |= {"double_scale": double, "block_sizes": {-1: 2 * columns // scale.shape[-1]}}
    elif scale.dtype == torch.uint8:
        kind, shape = MXFP8QTensor, (rows, columns)
    else:
        kind, shape = INT8QTensor if weight.dtype == torch.int8 else FP8QTensor, (rows, columns)
        if scale.ndim == 4:
            options = {"scale": scale[:, 0, :, 0], "block_sizes": {-1: 128, -2: 128}}
            weight = weight.float()  # No padding is there for float8.
        elif scale.ndim == 1:
            options = {"scale": scale[:, None]}
    value = kind(torch.Size(shape), torch.float32, weight).dequantize(torch.float32, **options)
    factor = own.get("pre_quant_scale")
    return value if factor is None else value * factor.float()


def of_stack(weight: torch.Tensor, scale: torch.Tensor, double: torch.Tensor | None) -> torch.Tensor:
    """That of all experts, whose inputs lie along the last axis."""
    if double is None:
        return FP8QTensor(weight.shape, torch.float32, weight).dequantize(torch.float32, scale=scale)
    shape = torch.Size((*weight.shape[:-1], 2 * weight.shape[-1]))
    made = NVFP4QTensor(shape, torch.float32, weight.contiguous())
    return made.dequantize(torch.float32, scale=scale.mT, double_scale=double, block_sizes={-1: 16})


def by_transformers(source: Path, folder: Path, **how: Any) -> Tensors:
    """By transformers, which wants a GPU to run what it quantises, and needs none to quantise."""
    FineGrainedFP8HfQuantizer.validate_environment = lambda *_, **__: None
    # It leaves scales unset of a matrix that blocks do not fill.
    kept = ["lm_head", "shared_expert_gate", "in_proj_a", "in_proj_b"]
    config = FineGrainedFP8Config(weight_block_size=(64, 128), modules_to_not_convert=kept, **how)
    model = loaded(source, quantization_config=config, device_map="cpu")
    model.save_pretrained(folder)
    held, tool = load_file(folder / WEIGHTS), Fp8Dequantize(model.hf_quantizer)
    for name, own in modules(held, "weight_scale_inv").items():
        held[f"{name}.weight"] = tool._dequantize_one(own["weight"], own["weight_scale_inv"], torch.float32)
    for scales in [n for n in held if n.endswith("_scale_inv")]:
        name = scales.removesuffix("_scale_inv")
        held[name] = tool._dequantize_one(held[name], held.pop(scales), torch.float32)
    return held


make = functools.partial
FORMS: dict[str, Callable[[Path, Path], Tensors]] = {
    "w4a16": make(compressed),
    "w4a16-asymmetric": make(compressed, scheme="W4A16_ASYM"),
    "w4a16-rows": make(
        compressed,
        scheme=None,
        config_groups={"rows": QuantizationScheme(targets=["Linear"], weights=ROWS)},
    ),
    "w4a16-head": make(compressed, ignore=()),
    "w4a16-some": make(compressed, ignore=("lm_head", "re:.*layers.0.mlp.*", "model.layers.1.self_attn.o_proj")),
    "w4a16-tied": make(compressed),
    "gptq": make(compressed, kind=GPTQModifier, calibrated=True, actorder="static"),
    "w8a16": make(compressed, scheme="W8A16"),
    "w8a8": make(compressed, scheme="W8A8"),
    "w4a8": make(compressed, scheme="W4A8"),
    "fp8": make(compressed, scheme="FP8", calibrated=True, kv_cache_scheme=CACHE),
    "fp8-dynamic": make(compressed, scheme="FP8_DYNAMIC"),
    "fp8-block": make(compressed, scheme="FP8_BLOCK"),
    "nvfp4": make(compressed, scheme="NVFP4", calibrated=True),
    "nvfp4a16": make(compressed, scheme="NVFP4A16"),
    "mxfp4a16": make(compressed, scheme="MXFP4A16"),
    "mxfp8a16": make(compressed, scheme="MXFP8A16"),
    "mixed": make(
        compressed,
        scheme=None,
        config_groups={name: preset_name_to_scheme(name, [target]) for name, target in MIXED.items()},
    ),
    "modelopt-fp8": make(by_modelopt, preset="FP8_DEFAULT_CFG", cache="FP8_KV_CFG"),
    "modelopt-fp8-rows": make(by_modelopt, preset="FP8_PER_CHANNEL_PER_TOKEN_CFG"),
    "modelopt-fp8-block": make(by_modelopt, preset="FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"),
    "modelopt-awq": make(by_modelopt, preset="INT4_AWQ_CFG"),
    "modelopt-nvfp4": make(by_modelopt, preset="NVFP4_DEFAULT_CFG"),
    "modelopt-nvfp4-fp8": make(by_modelopt, preset="W4A8_NVFP4_FP8_CFG"),
    "modelopt-mxfp4": make(by_modelopt, preset="MXFP4_DEFAULT_CFG"),
    "modelopt-mxfp8": make(by_modelopt, preset="MXFP8_DEFAULT_CFG"),
    "modelopt-int8": make(by_modelopt, preset="INT8_SMOOTHQUANT_CFG"),
    "modelopt-int8-weights": make(by_modelopt, preset="INT8_WEIGHT_ONLY_CFG"),
    "modelopt-mixed": make(by_modelopt, preset="NVFP4_MLP_ONLY_CFG", attention="FP8_DEFAULT_CFG"),
    "transformers": make(by_transformers),
    "transformers-powers": make(by_transformers, scale_fmt="ue8m0"),
    "modelopt-fp8-llama4": make(by_modelopt, preset="FP8_DEFAULT_CFG"),
    "modelopt-fp8-gpt_oss": make(by_modelopt, preset="FP8_DEFAULT_CFG"),
    "modelopt-nvfp4-llama4": make(by_modelopt, preset="NVFP4_DEFAULT_CFG"),
    "modelopt-nvfp4-gpt_oss": make(by_modelopt, preset="NVFP4_DEFAULT_CFG"),
    "transformers-qwen3_5_moe": make(by_transformers),
    "transformers-powers-qwen3_5_moe": make(by_transformers, scale_fmt="ue8m0"),
}


def main(folder: Path) -> None:
    # It would round what it unpacks to bfloat16.
    fp4.unpack_fp4_from_uint8 = functools.partial(fp4.unpack_fp4_from_uint8, dtype=torch.float32)
    for name, kind in SOURCES.items():
        plain(folder / name, kind)
    for name, form in FORMS.items():
        made = folder / name
        values = form(folder / next((s for s in SOURCES if name.endswith(f"-{s}")), "plain"), made / "ck")
        config = json.loads((made / "ck" / "config.json").read_text())
        config.pop("quantization_config")
        (made / "meant").mkdir()
        (made / "meant" / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
        wide = {n: t.float().contiguous() for n, t in values.items()}
        save_file(wide, made / "meant" / WEIGHTS, {"format": "pt"})


if __name__ == "__main__":
    main(Path(sys.argv[1]))

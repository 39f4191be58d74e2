"""What a checkpoint says of how its weights are quantised: in config.json, or in what a tool wrote beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from llmexport.export.errors import ExportError
from llmexport.export.packed.exceptions import exceptions
from llmexport.export.packed.modules import Modules
from llmexport.export.packed.said import Said
from llmexport.export.quantised import FILES, describe, read_file
from llmexport.export.values import show

KEYS = ("quantization_config", "compression_config")
TEXTS = ("text_config", "llm_config", "language_config")  # where a multimodal config has that of its text model
# quant_method -> what reads it here; those that wrap another's layout say so in a key of their own.
METHODS = {
    "fp8": "fp8",
    "fbgemm_fp8": "fp8",
    "compressed-tensors": "compressed-tensors",
    "modelopt": "modelopt",
    "modelopt_fp4": "modelopt",
    "gptq": "gptq",
    "gptqmodel": "gptq",
    "awq": "awq",
}
ROUNDED = {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq"}
# ModelOpt's algorithms that leave weights as a type and scales alone, and that type, where it is one for all; it writes
# some of them in capitals.
ALGORITHMS = {
    **dict.fromkeys(("fp8", "fp8_pb_wo", "fp8_per_channel_per_token", "mxfp8"), "float8_e4m3fn"),
    **dict.fromkeys(
        ("nvfp4", "nvfp4_awq", "w4a16_nvfp4", "w4a8_nvfp4_fp8", "mxfp4", "w4a8_mxfp4_fp8"), "float4_e2m1fn"
    ),
    **dict.fromkeys(("w4a16_awq", "w4a8_awq", "int4_awq"), "int4"),
    **dict.fromkeys(("w8a8_sq_per_channel", "w8a16"), "int8"),
    "mixed_precision": None,
}


@dataclass(frozen=True)
class Group:
    """What one group of compressed-tensors says of the weights of its targets; `every`: all that no other names."""

    targets: Modules
    every: bool
    format: str
    bits: int
    size: int | None
    symmetric: bool
    block: tuple[int, int] | None


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint is quantised: `method` is that of METHODS, `where` it was said.

    bits, size and symmetric: of GPTQ and AWQ; the size of a group is None where a row is one. It may be ModelOpt's too,
    None where that says none. older: zeros are stored less one. block: of FP8. groups: of compressed-tensors. kept: the
    modules that it leaves in 16 bits. others: modules of GPTQ and AWQ of which it says something else. number: the type
    of all numbers, if ModelOpt says it.
    """

    method: str
    where: str
    kept: Modules
    bits: int = 8
    size: int | None = None
    symmetric: bool = True
    older: bool = False
    block: tuple[int, int] | None = None
    groups: tuple[Group, ...] = ()
    others: tuple[tuple[Modules, Scheme], ...] = ()
    number: str | None = None

    def of(self, module: str) -> Scheme:
        """What it says of one module."""
        return next((scheme for names, scheme in self.others if module in names), self)

    def group(self, module: str) -> Group | None:
        """The group that a module is in: the one that names it, or else the one of its class."""
        named = (g for g in self.groups if module in g.targets)
        return next(chain(named, (g for g in self.groups if g.every)), None)


# GPT-OSS' experts, which are no matrices of this package: their architecture reads them.
MXFP4 = "mxfp4"


def said_in(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The part of config.json that speaks of quantisation, of the whole or of its text model; None if there is none."""
    inner = [v for k in TEXTS if isinstance(v := config.get(k), Mapping)]
    found = (c[k] for c in (config, *inner) for k in KEYS if isinstance(c.get(k), Mapping) and c[k])
    return next(found, None)


def without(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that says nothing of that."""
    left = {k: v for k, v in config.items() if k not in KEYS}
    return left | {k: without(v) for k in TEXTS if isinstance(v := left.get(k), Mapping)}


def method_of(said: Mapping[str, Any]) -> str | None:
    """The method of METHODS that this is, if one."""
    name, producer = said.get("quant_method"), said.get("producer")
    if name is None and isinstance(producer, Mapping):
        name = producer.get("name")
    if name == "auto-round":
        return ROUNDED.get(str(said.get("packing_format")))
    return METHODS.get(name) if isinstance(name, str) else None


def read_scheme(config: Mapping[str, Any], folder: Path) -> Scheme | None:
    """How a checkpoint says that it is quantised; None if it says nothing, or what an architecture reads itself.

    Raises ExportError on what is said and cannot be read.
    """
    said, where = said_in(config), "config.json"
    if said is None:
        for file, key in FILES.items():
            data = read_file(folder / file)
            inner = data.get(key) if key else data
            if isinstance(inner, dict) and inner:
                said, where = _older(file, {**inner, "producer": data.get("producer")}), file
                break
    if said is None or (method := method_of(said)) is None:
        return None
    keys = Said(said, where, describe(said))
    kept = map(keys.names, ("ignore", "modules_to_not_convert", "ignored_layers", "exclude_modules"))
    scheme = Scheme(method, where, Modules(chain.from_iterable(kept)))
    made = READERS[method](keys, scheme)
    if method not in ("gptq", "awq"):
        return made
    apart = ((names, replace(keys, data={**said, **own})) for names, own in exceptions(said, keys.wrong))
    return replace(made, others=tuple((names, READERS[method](own, scheme)) for names, own in apart))


def _older(file: str, said: dict[str, Any]) -> dict[str, Any]:
    """What files say that were written before config.json did, in its words."""
    if file == "quantize_config.json":
        return {"quant_method": "gptq", **said}
    if file == "quant_config.json":
        return {"quant_method": "awq", "bits": said.get("w_bit"), "group_size": said.get("q_group_size"), **said}
    return said


def _fp8(said: Said, scheme: Scheme) -> Scheme:
    said.choice("fmt", (None, "e4m3", "float8_e4m3fn"))
    return replace(scheme, block=said.block("weight_block_size"))


def _gptq(said: Said, scheme: Scheme) -> Scheme:
    bits = said.choice("bits", (4, 8))
    older = said.choice("checkpoint_format", ("gptq", "gptq_v2", None)) != "gptq_v2"
    return replace(scheme, bits=bits, size=said.size("group_size"), symmetric=said.flag("sym", True), older=older)


def _awq(said: Said, scheme: Scheme) -> Scheme:
    version = said.data.get("version", "gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise said.wrong("version", "gemm")
    zeros = said.flag("zero_point", True)
    return replace(scheme, bits=said.choice("bits", (4,)), size=said.size("group_size"), symmetric=not zeros)


def _modelopt(said: Said, scheme: Scheme) -> Scheme:
    algorithm = said.data.get("quant_algo")
    if not isinstance(algorithm, str) or algorithm.lower() not in ALGORITHMS:
        raise said.wrong("quant_algo", ", ".join(ALGORITHMS).upper())
    return replace(scheme, size=said.size("group_size"), number=ALGORITHMS[algorithm.lower()])


def _compressed(said: Said, scheme: Scheme) -> Scheme:
    groups = said.data.get("config_groups")
    if not isinstance(groups, Mapping) or not groups or not all(isinstance(g, Mapping) for g in groups.values()):
        raise said.wrong("config_groups", "groups of targets")
    overall = said.data.get("format")
    return replace(scheme, groups=tuple(_group(replace(said, data=g), overall) for g in groups.values()))


FORMATS = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"),
)


def _group(said: Said, overall: Any) -> Group:
    kind = said.data.get("format") or overall
    if kind not in FORMATS:
        raise ExportError(f"{said.where}: format of a group is {show(kind)}, expected {' or '.join(FORMATS)}")
    inner = said.data.get("weights")
    if not isinstance(inner, Mapping):
        raise said.wrong("weights", "what is said of weights")
    weights = replace(said, data=inner)
    weights.choice("dynamic", (False,))
    strategy = weights.choice("strategy", ("tensor", "channel", "group", "block", "tensor_group", None))
    size = weights.size("group_size") if strategy in ("group", "tensor_group") else None
    targets = said.names("targets") or ("Linear",)
    return Group(
        Modules(targets),
        "Linear" in targets,
        str(kind),
        weights.choice("num_bits", (8, 4)),
        size,
        weights.flag("symmetric", True),
        weights.block("block_structure") if strategy == "block" else None,
    )


READERS = {"fp8": _fp8, "gptq": _gptq, "awq": _awq, "modelopt": _modelopt, "compressed-tensors": _compressed}

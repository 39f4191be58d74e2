"""Reads RoPE from a config, in any of the forms that published configs have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from llmexport.export.errors import ExportError
from llmexport.export.spec import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    ProportionalScaling,
    Rotary,
    Scaling,
    YarnScaling,
)
from llmexport.export.values import as_integer, as_positive, key_name, same, show, whole

if TYPE_CHECKING:
    from llmexport.export.config import Config

TYPES = MappingProxyType({t: t for t in ("default", "linear", "dynamic", "llama3", "yarn", "longrope")})
ORIGINAL = "original_max_position_embeddings"
MSCALES = ("short_mscale", "long_mscale")
# Keys that nothing reads, and keys of other types or architectures with the values that change nothing.
HARMLESS = ("finetuned",)
NEUTRAL = MappingProxyType({"factor": 1, "partial_rotary_factor": 1})
KINDS = ("sliding_attention", "full_attention")  # the kinds of layer, where each has its own RoPE


def read(
    config: Config,
    head_size: int,
    theta: float | None = 10000.0,
    *,
    partial: float | None = None,
    sections: Sequence[int] = (),
    types: Mapping[str, str] = TYPES,
    original: int | None = None,
    layer_kind: str | None = None,
    theta_key: str = "rope_theta",
    partial_key: str = "partial_rotary_factor",
    others: Sequence[str] = (),
) -> Rotary:
    """RoPE, from `rope_parameters` (transformers 5) or `rope_theta`, `rope_scaling` and the like.

    `theta` (None: it must say), `partial` (the share of a head that is rotated) and `sections` (of mRoPE) hold where
    the config does not say; an architecture that knows no shares or sections gives none, and a config with any is
    refused. `types` maps the types that the architecture knows to their names here. `original` is the length before
    LongRoPE's stretch, if the config says it elsewhere. `layer_kind`: which entry of `rope_parameters` to read, where
    each kind of layer has its own. `theta_key` and `partial_key`: top-level keys that old configs use for theta and for
    the share. `others`: keys that the architecture reads itself, by `beside`. Raises ExportError on a type or key of
    RoPE that is not known.
    """
    keys = _shared(config) if layer_kind is None else _of_kind(config, layer_kind)
    theta = as_positive(theta_key, _one(config, keys, "rope_theta", theta_key, theta))
    if theta <= 1:
        raise ExportError(f"config.json: {theta_key} is {theta}, expected a number above 1")
    size = head_size if partial is None else _rotated(config, keys, head_size, partial, partial_key)
    sections = _sections(keys, sections) if sections else ()
    if original is not None and keys.setdefault(ORIGINAL, original) != original:
        raise ExportError(f"config.json says {ORIGINAL} twice, {show(keys[ORIGINAL])} and {original}: remove one")
    found = [keys.pop(k) for k in ("rope_type", "type") if k in keys] or ["default"]
    if any(k != found[0] for k in found):
        raise ExportError(f"config.json: RoPE is said to be of types {show(found)}: choose one")
    if not isinstance(found[0], str) or found[0] not in types:
        known = ", ".join(dict.fromkeys(types.values()))
        raise ExportError(f"config.json: RoPE of type {show(found[0])} is not supported here, {known} are")
    if types[found[0]] == "alpha":
        theta *= _alpha(keys) ** (size / (size - 2))
    scaling = _scaling(config, types[found[0]], keys, size)
    unread = [
        k for k, v in keys.items() if v is not None and k not in (*HARMLESS, *others) and not same(v, NEUTRAL.get(k))
    ]
    if unread:
        names = ", ".join(map(key_name, unread))
        raise ExportError(
            f"config.json: RoPE has keys that are not understood: {names}. "
            "Exporting without them could give a wrong model: report the checkpoint, so that they are read here"
        )
    return Rotary(size, theta, scaling, sections)


def within(config: Config, key: str, length_key: str) -> int:
    """The length up to which what `key` asks for changes nothing, which is as far as the export goes."""
    length = config.integer(length_key)
    config.notes.append(f"config.json: {key} changes longer texts alone: the export is of texts up to {length} tokens")
    return length


def _rotated(config: Config, keys: dict[str, Any], head_size: int, partial: float, key: str) -> int:
    """How many dimensions of a head are rotated."""
    return int(head_size * _share(_one(config, keys, "partial_rotary_factor", key, partial), key))


def _share(found: Any, key: str = "partial_rotary_factor") -> float:
    share = as_positive(key, found)
    if share > 1:
        raise ExportError(f"config.json: {key} is {share}, a share of the head is at most 1")
    return share


def _objects(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """`rope_parameters`, which transformers 5 writes, and `rope_scaling`, which versions before it wrote."""
    new, old = (config.get(k, None) for k in ("rope_parameters", "rope_scaling"))
    new, old = ({} if v is None else v for v in (new, old))
    if not isinstance(new, dict) or not isinstance(old, dict):
        raise ExportError("config.json: rope_parameters and rope_scaling must be objects")
    if new and old and new != old:
        raise ExportError("config.json has both rope_parameters and rope_scaling, and they differ: remove one")
    return new, old


def _shared(config: Config) -> dict[str, Any]:
    """The one dictionary that speaks of RoPE, to be used up."""
    new, old = _objects(config)
    return dict(new or old)


def _of_kind(config: Config, layer_kind: str) -> dict[str, Any]:
    """The dictionary for one kind of layer, to be used up; the old keys scaled full attention alone."""
    new, old = _objects(config)
    if not new:
        # transformers updates this dictionary with the old keys: `type` alone does not change its type.
        return {"rope_type": "default"} | (old if layer_kind == "full_attention" else {})
    if new.keys() != set(KINDS) or not all(isinstance(v, dict) for v in new.values()):
        raise ExportError(f"config.json: rope_parameters must hold one object each for {' and '.join(KINDS)} alone")
    return dict(new[layer_kind])


def _one(config: Config, keys: dict[str, Any], name: str, outer_name: str, default: float | None) -> Any:
    """A value that may stand among RoPE's keys, beside them as `outer_name`, or at both places if they agree."""
    outer = config.get(outer_name, default)
    inner = keys.pop(name, outer)
    if inner != outer and config.has(outer_name):
        raise ExportError(f"config.json says {name} twice, {show(inner)} and {show(outer)}: remove one")
    return inner


def _scaling(config: Config, kind: str, keys: dict[str, Any], size: int) -> Scaling | None:
    match kind:
        case "default":
            # Some configs have it, though nothing reads it for this type.
            keys.pop(ORIGINAL, None)
            return None
        case "alpha":
            return None
        case "dynamic":
            keys.pop(ORIGINAL, None)
            return DynamicScaling(_factor(keys), config.integer("max_position_embeddings"))
        case "linear":
            keys.pop(ORIGINAL, None)
            return LinearScaling(_factor(keys))
        case "llama3":
            return Llama3Scaling(
                factor=_factor(keys),
                low_frequency=as_positive("RoPE's low_freq_factor", keys.pop("low_freq_factor", None)),
                high_frequency=as_positive("RoPE's high_freq_factor", keys.pop("high_freq_factor", None)),
                original_positions=_positions(config, keys),
            )
        case "yarn":
            if "attn_factor" in keys:
                ignored = show(keys.pop("attn_factor"))
                config.notes.append(
                    f"config.json: RoPE's attn_factor {ignored} is left out, as transformers does; "
                    "vLLM multiplies cos and sin by it"
                )
            factor, magnitude = _factor(keys), keys.pop("attention_factor", None)
            truncate = keys.pop("truncate", True)
            if type(truncate) is not bool:
                raise ExportError(f"config.json: RoPE's truncate is {show(truncate)}, expected true or false")
            found = mscale(factor, 1.0)
            of_angles, of_logits = (keys.pop(k, None) for k in ("mscale", "mscale_all_dim"))
            if of_angles and of_logits:
                of_angles, of_logits = (as_positive("RoPE's mscale", m) for m in (of_angles, of_logits))
                found = mscale(factor, of_angles) / mscale(factor, of_logits)
            return YarnScaling(
                factor=factor,
                original_positions=_positions(config, keys),
                fast=as_positive("RoPE's beta_fast", keys.pop("beta_fast", None) or 32.0),
                slow=as_positive("RoPE's beta_slow", keys.pop("beta_slow", None) or 1.0),
                truncate=truncate,
                magnitude=found if magnitude is None else as_positive("RoPE's attention_factor", magnitude),
            )
        case "longrope":
            return _long(config, keys, size)
        case "longrope with mscales":
            return _long(config, keys, size, says_mscale=True)
        case "proportional":
            share = _share(keys.pop("partial_rotary_factor", 1.0))
            return ProportionalScaling(int(share * size // 2))
    raise ValueError(f"no RoPE of type {kind}")


def mscale(factor: float, weight: float) -> float:
    """YaRN's magnitude of a stretch by `factor` (arXiv 2309.00071, section 3.4), with the weight that DeepSeek gives
    its logarithm."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def beside(config: Config, key: str) -> Any:
    """What stands among RoPE's keys and is not RoPE's; None where nothing does."""
    return _shared(config).get(key)


def of_logits(config: Config) -> float:
    """What YaRN multiplies the logits of attention by, beside what it does to cos and sin; 1 without it.

    The architectures that do so are DeepSeek's heirs (modeling_deepseek_v3.py, yarn_apply_mscale).
    """
    keys = _shared(config)
    weight = keys.get("mscale_all_dim") or 0
    if not weight or keys.get("rope_type", keys.get("type", "default")) == "default":
        return 1.0
    return mscale(_factor(keys), as_positive("RoPE's mscale_all_dim", weight)) ** 2


def _long(config: Config, keys: dict[str, Any], size: int, *, says_mscale: bool = False) -> LongScaling:
    """`says_mscale`: the magnitudes of short and of long texts are written there (modeling_phimoe.py)."""
    # The magnitude is divided by the logarithm of the length, which is 0 for a length of 1.
    positions = _positions(config, keys, least=2)
    if says_mscale:
        magnitude, long_magnitude = (as_positive(f"RoPE's {k}", keys.pop(k, None)) for k in MSCALES)
    else:
        magnitude = long_magnitude = _long_magnitude(config, keys, positions)
    factors = []
    for name in ("short_factor", "long_factor"):
        found = keys.pop(name, None)
        if not isinstance(found, list) or len(found) != size // 2:
            raise ExportError(f"config.json: RoPE's {name} must list {size // 2} numbers, found {show(found)}")
        factors.append(tuple(as_positive(f"RoPE's {name}", v) for v in found))
    short, long = factors
    return LongScaling(short, long, positions, magnitude, None if long_magnitude == magnitude else long_magnitude)


def _long_magnitude(config: Config, keys: dict[str, Any], positions: int) -> float:
    """What the stretch of a text of `positions` multiplies cos and sin by, unless it is said."""
    factor, magnitude = keys.pop("factor", None), keys.pop("attention_factor", None)
    if factor is None:
        factor = config.integer("max_position_embeddings") / positions
    if magnitude is None:
        factor = as_positive("RoPE's factor", factor)
        magnitude = math.sqrt(1 + math.log(factor) / math.log(positions)) if factor > 1 else 1.0
    return as_positive("RoPE's attention_factor", magnitude)


def _sections(keys: dict[str, Any], default: Sequence[int]) -> tuple[int, ...]:
    found = keys.pop("mrope_section", list(default))
    sizes: list[Any] = [whole(n) for n in found] if isinstance(found, list) else [None]
    if any(type(n) is not int or n < 0 for n in sizes):
        raise ExportError(f"config.json: mrope_section is {show(found)}, expected a list of sizes")
    if keys.pop("mrope_interleaved", True) is not True:
        raise ExportError("config.json: mrope_interleaved is not true, other mRoPE layouts are not supported")
    return tuple(sizes)


def _alpha(keys: dict[str, Any]) -> float:
    """What stretches the base once and for all (modeling_hunyuan_v1_dense.py); nothing reads what stands beside it."""
    _factor(keys)
    for key in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        keys.pop(key, None)
    return as_positive("RoPE's alpha", keys.pop("alpha", None))


def _factor(keys: dict[str, Any]) -> float:
    return as_positive("RoPE's factor", keys.pop("factor", None))


def _positions(config: Config, keys: dict[str, Any], least: int = 1) -> int:
    """The length before the stretch; transformers takes the stretched length where the config does not say."""
    if ORIGINAL not in keys:
        keys[ORIGINAL] = config.integer("max_position_embeddings")
        config.notes.append(
            f"config.json: RoPE has no {ORIGINAL}: max_position_embeddings, {keys[ORIGINAL]}, is taken, "
            "as by transformers"
        )
    return as_integer(f"RoPE's {ORIGINAL}", keys.pop(ORIGINAL), least)

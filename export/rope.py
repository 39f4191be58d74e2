"""Reads what a config says of RoPE, in any of the forms that published ones have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmexport.export.errors import ExportError
from llmexport.export.spec import LinearScaling, Llama3Scaling, LongScaling, Rotary, Scaling, YarnScaling
from llmexport.export.values import as_integer, as_positive, key_name, show

if TYPE_CHECKING:
    from llmexport.export.config import Config

TYPES = ("default", "linear", "llama3", "yarn", "longrope")
ORIGINAL = "original_max_position_embeddings"


def read(
    config: Config,
    head_size: int,
    theta: float,
    partial: float | None,
    sections: tuple[int, ...],
    aliases: Mapping[str, str],
    of: str | None,
) -> Rotary:
    """As Config.rotary. Raises ExportError on a type or key of RoPE that is not known."""
    keys = _parameters(config, of)
    theta = as_positive("rope_theta", _one(config, keys, "rope_theta", theta))
    size = head_size if partial is None else _turned(config, keys, head_size, partial)
    if sections:
        sections = _sections(keys, sections)
    kinds = [k for k in (keys.pop("rope_type", None), keys.pop("type", None)) if k is not None] or ["default"]
    if any(k != kinds[0] for k in kinds):
        raise ExportError(f"config.json: RoPE is said to be of types {show(kinds)}: choose one")
    scaling = _scaling(config, kinds[0], keys, size, aliases)
    if keys:
        names = ", ".join(map(key_name, keys))
        raise ExportError(f"config.json: RoPE has keys that are not understood: {names}")
    return Rotary(size, theta, scaling, sections)


def _turned(config: Config, keys: dict[str, Any], head_size: int, partial: float) -> int:
    """How many dimensions of a head turn."""
    share = as_positive("partial_rotary_factor", _one(config, keys, "partial_rotary_factor", partial))
    if share > 1:
        raise ExportError(f"config.json: partial_rotary_factor is {share}, a share of the head is at most 1")
    return int(head_size * share)


def _parameters(config: Config, of: str | None) -> dict[str, Any]:
    """The one dictionary that speaks of RoPE, or of RoPE in one kind of layer, to be used up."""
    new, old = config.get("rope_parameters", {}), config.get("rope_scaling", {})
    if not isinstance(new, dict) or not isinstance(old, dict):
        raise ExportError("config.json: rope_parameters and rope_scaling must be objects")
    if of is not None and of in new:
        new = new[of]
        if not isinstance(new, dict):
            raise ExportError(f"config.json: rope_parameters of {of} must be an object")
    if new and old and new != old:
        raise ExportError("config.json has both rope_parameters and rope_scaling, and they differ: remove one")
    return dict(new or old)


def _one(config: Config, keys: dict[str, Any], name: str, default: float) -> Any:
    """A value that may stand among RoPE's keys, beside them, or at both places if they agree."""
    inner, outer = keys.pop(name, None), config.get(name, None)
    if inner is not None and outer is not None and inner != outer:
        raise ExportError(f"config.json says {name} twice, {show(inner)} and {show(outer)}: remove one")
    return next((v for v in (inner, outer) if v is not None), default)


def _scaling(config: Config, kind: Any, keys: dict[str, Any], size: int, aliases: Mapping[str, str]) -> Scaling | None:
    kind = aliases.get(kind, kind) if isinstance(kind, str) else kind
    match kind:
        case "default":
            # Some write it though nothing reads it then.
            keys.pop(ORIGINAL, None)
            return None
        case "linear":
            return LinearScaling(_factor(keys))
        case "llama3":
            return Llama3Scaling(
                factor=_factor(keys),
                low_frequency=as_positive("RoPE's low_freq_factor", keys.pop("low_freq_factor", None)),
                high_frequency=as_positive("RoPE's high_freq_factor", keys.pop("high_freq_factor", None)),
                original_positions=_positions(keys.pop(ORIGINAL, None)),
            )
        case "yarn":
            factor, magnitude = _factor(keys), keys.pop("attention_factor", None)
            truncate = keys.pop("truncate", True)
            if type(truncate) is not bool:
                raise ExportError(f"config.json: RoPE's truncate is {show(truncate)}, expected true or false")
            found = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
            return YarnScaling(
                factor=factor,
                original_positions=_positions(keys.pop(ORIGINAL, None)),
                fast=as_positive("RoPE's beta_fast", keys.pop("beta_fast", None) or 32.0),
                slow=as_positive("RoPE's beta_slow", keys.pop("beta_slow", None) or 1.0),
                truncate=truncate,
                magnitude=found if magnitude is None else as_positive("RoPE's attention_factor", magnitude),
            )
        case "longrope":
            return _long(config, keys, size)
    raise ExportError(f"config.json: RoPE of type {show(kind)} is not supported, {', '.join(TYPES)} are")


def _long(config: Config, keys: dict[str, Any], size: int) -> LongScaling:
    positions = _positions(_one(config, keys, ORIGINAL, 0))
    factor, magnitude = keys.pop("factor", None), keys.pop("attention_factor", None)
    if factor is None:
        factor = config.integer("max_position_embeddings") / positions
    if magnitude is None:
        factor = as_positive("RoPE's factor", factor)
        magnitude = math.sqrt(1 + math.log(factor) / math.log(positions)) if factor > 1 else 1.0
    factors = []
    for name in ("short_factor", "long_factor"):
        found = keys.pop(name, None)
        if not isinstance(found, list) or len(found) != size // 2:
            raise ExportError(f"config.json: RoPE's {name} must list {size // 2} numbers, found {show(found)}")
        factors.append(tuple(as_positive(f"RoPE's {name}", v) for v in found))
    return LongScaling(factors[0], factors[1], positions, as_positive("RoPE's attention_factor", magnitude))


def _sections(keys: dict[str, Any], default: tuple[int, ...]) -> tuple[int, ...]:
    found = keys.pop("mrope_section", list(default))
    if not isinstance(found, list) or any(type(n) is not int or n < 0 for n in found):
        raise ExportError(f"config.json: mrope_section is {show(found)}, expected a list of sizes")
    if keys.pop("mrope_interleaved", True) is not True:
        raise ExportError("config.json: mrope_interleaved is not true, other mRoPE layouts are not supported")
    return tuple(found)


def _factor(keys: dict[str, Any]) -> float:
    return as_positive("RoPE's factor", keys.pop("factor", None))


def _positions(value: Any) -> int:
    return as_integer(f"RoPE's {ORIGINAL}", value)

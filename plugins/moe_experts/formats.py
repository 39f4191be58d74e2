"""Weights of MoeExperts in few bits: which go together, and the numbers that they mean."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llmexport.plugins.packed_formats import FORMATS, PACKED


def check(format: str, group: int, transposed: bool, types: Mapping[str, str]) -> None:
    """`types`: that of each input there is. Raises ValueError if weights of this format have others."""
    if format not in FORMATS:
        raise ValueError(f"MoeExperts knows no format {format!r}")
    form = PACKED.get(format)
    stored, scales = types["gate_up"], types.get("gate_up_scales")
    if form is None:
        if stored == "uint8" or scales or group:
            raise ValueError(f"MoeExperts: plain weights are floats without scales and group, not {stored}, {group}")
        return
    if transposed:
        raise ValueError(f"MoeExperts: {format} weights are never transposed")
    said = "uint8" if form.scales else "float32"
    if (stored, types["down"], scales, types.get("down_scales")) != ("uint8", "uint8", said, said):
        raise ValueError(f"MoeExperts: {format} weights are uint8 with scales of {said}, not {stored} with {scales}")
    if group != form.group if form.group else group < 1:
        raise ValueError(f"MoeExperts: a group has {form.group or 'at least 1'} columns in {format}, not {group}")
    if "gate_up_zeros" in types and form.zero is None:
        raise ValueError(f"MoeExperts: {format} weights have no zero points")
    for what, said in (("factors", "float32"), ("zeros", "uint8")):
        found = [types.get(f"{n}_{what}") for n in ("gate_up", "down")]
        if found not in ([None, None], [said, said]):
            raise ValueError(f"MoeExperts: {what} are {said} of gate_up and of down, not {found[0]} and {found[1]}")


def check_shapes(format: str, group: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """`shapes`: that of each input there is. Raises ValueError if packed weights have others."""
    per_byte = PACKED[format].per_byte
    hidden, (experts, width, _) = shapes["x"][-1], shapes["gate_up"]
    for name, rows, columns, parts in (("gate_up", width, hidden, 2), ("down", hidden, width // 2, 1)):
        if width % 2 or columns % per_byte:
            raise ValueError(f"MoeExperts: {width} rows of gate_up and {columns} columns of {name} are odd")
        groups = -(-columns // group)
        wanted = {"": (rows, columns // per_byte), "_scales": (rows, groups), "_zeros": (rows, groups)}
        for suffix, shape in {**wanted, "_factors": (parts,)}.items():
            found = shapes.get(name + suffix)
            if found is not None and found != (experts, *shape):
                raise ValueError(f"MoeExperts: {name}{suffix} is {[*found]}, not {[experts, *shape]} of {format}")


def dequantise(format: str, group: int, codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
    """(code - zero) * scale in fp32, [rows, columns]; any dimensions before."""
    form = PACKED[format]
    if form.per_byte == 2:
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)

    def spread(groups: Tensor) -> Tensor:
        columns = codes.shape[-1]
        return groups.repeat_interleave(min(group, columns), -1)[..., :columns]

    values = torch.tensor(form.values_with(zeros is not None), device=codes.device)[codes.int()]
    if zeros is not None:
        values = values - spread(zeros)
    if form.scales:
        # 2^128 is no fp32, but a product with it may be.
        scales = torch.tensor(form.scales, dtype=torch.float64, device=codes.device)[scales.int()]
    return (values * spread(scales)).float()

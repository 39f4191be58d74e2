"""What all layers read: RoPE's angles, masks, spans, temperatures."""

import math

import torch
from torch import Tensor, nn

from llmexport.export import spec
from llmexport.export.blocks.padding import between, last_token, leading_padding, tokens_of, tokens_up_to
from llmexport.export.blocks.standard import padding_must_be_on_the_left


def inverse_frequencies(block: spec.Rotary) -> Tensor:
    """RoPE's angular step per position [size / 2], fp32, as transformers' modeling_rope_utils.py computes it.

    For LongRoPE there are two rows: the short steps and the long ones; those of dynamic RoPE are of texts that are not
    longer than what the model was trained on.
    """
    size = block.size // 2 if block.halves else block.size
    exponents = _exponents(size)
    steps = 1.0 / (block.theta**exponents)
    match block.scaling:
        case None | spec.DynamicScaling():
            return steps
        case spec.LinearScaling(factor):
            return steps / factor
        case spec.ProportionalScaling(turning):
            return torch.where(torch.arange(len(steps)) < turning, steps, 0.0)
        case spec.Llama3Scaling(factor, low, high, positions):
            wavelengths = 2 * math.pi / steps
            # 0 where the wavelength is longer than the low limit, 1 where it is shorter than the high one; where
            # the limits are one, no frequency lies between.
            smooth = (positions / wavelengths - low) / (high - low) if high > low else torch.zeros_like(steps)
            blended = (1 - smooth) * (steps / factor) + smooth * steps
            long, short = wavelengths > positions / low, wavelengths < positions / high
            return torch.where(long, steps / factor, torch.where(short, steps, blended))
        case spec.YarnScaling():
            return _yarn(block, block.scaling)
        case spec.LongScaling(short, long):
            # One division, as there: a step's last bit is a hundredth of a radian at 131,072.
            return 1.0 / (torch.tensor((short, long)) * block.theta**exponents)
    raise TypeError(f"no RoPE scaling {block.scaling}")


def _exponents(size: int) -> Tensor:
    """The negative powers of the base that the pairs of `size` dimensions turn by."""
    return torch.arange(0, size, 2, dtype=torch.int64).float() / size


def _yarn(block: spec.Rotary, scaling: spec.YarnScaling) -> Tensor:
    size = block.size

    def dimension(rotations: float) -> float:
        """Which dimension turns that often over the original positions."""
        return size * math.log(scaling.original_positions / (rotations * 2 * math.pi)) / (2 * math.log(block.theta))

    low, high = dimension(scaling.fast), dimension(scaling.slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = (torch.arange(size // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
    kept = 1 - ramp.clamp(0, 1)
    wavelengths = block.theta ** _exponents(size)
    return 1.0 / (scaling.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


class Rotary(nn.Module):
    steps: Tensor
    axes: Tensor
    exponents: Tensor

    def __init__(self, block: spec.Rotary, dtype: torch.dtype) -> None:
        super().__init__()
        self.block, self.dtype = block, dtype
        with torch.device("cpu"):
            self.register_buffer("steps", inverse_frequencies(block))
            if isinstance(block.scaling, spec.DynamicScaling):
                self.register_buffer("exponents", _exponents(block.size))
            if block.sections:
                self.register_buffer("axes", _axes(block).float().reshape(len(block.sections), 1, 1, -1))

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        positions, steps = position_ids.unsqueeze(-1).float(), self.steps
        if self.block.sections:
            positions = (positions * self.axes).sum(0)
        scaling = self.block.scaling
        magnitude: float | Tensor = 1.0
        if isinstance(scaling, spec.LongScaling | spec.YarnScaling):
            magnitude = scaling.magnitude
        if isinstance(scaling, spec.LongScaling):
            beyond = position_ids.max() >= scaling.original_positions
            steps = torch.where(beyond, self.steps[1], self.steps[0])
            if scaling.long_magnitude is not None:
                magnitude = torch.where(beyond, scaling.long_magnitude, scaling.magnitude)
        if isinstance(scaling, spec.DynamicScaling):
            steps = self._grown(position_ids.max() + 1, scaling)
        angles = positions * steps
        if self.block.halves:
            angles = torch.cat(angles.unbind(), -1)
        cos, sin = angles.cos(), angles.sin()
        if not isinstance(magnitude, float) or magnitude != 1.0:
            cos, sin = cos * magnitude, sin * magnitude
        return cos.to(self.dtype), sin.to(self.dtype)

    def _grown(self, length: Tensor, scaling: spec.DynamicScaling) -> Tensor:
        """The steps of texts of that length; each operation in fp32 and in the order of transformers."""
        size, longest = self.block.size, scaling.original_positions
        share = scaling.factor * length.clamp(min=longest) / longest - (scaling.factor - 1)
        base = self.block.theta * share ** (size / (size - 2))
        return torch.where(length > longest, 1.0 / base**self.exponents, self.steps)


def _axes(block: spec.Rotary) -> Tensor:
    """Which position turns a frequency, one-hot [sections, size / 2]."""
    chosen = [i % 3 if i < 3 * block.sections[i % 3] else 0 for i in range(block.size // 2)]
    return torch.nn.functional.one_hot(torch.tensor(chosen), len(block.sections)).T


def slots_of_step(attention_mask: Tensor, input_ids: Tensor) -> Tensor:
    """The cache slots of this step's tokens [T]."""
    total, sequence = attention_mask.shape[1], input_ids.shape[1]
    return torch.arange(sequence, device=input_ids.device) + (total - sequence)


class Mask(nn.Module):
    def __init__(self, block: spec.Mask) -> None:
        super().__init__()
        self.window, self.chunk, self.pictures, self.prefixed = (
            block.window,
            block.chunk,
            block.pictures,
            block.prefixed,
        )

    def forward(self, attention_mask: Tensor, input_ids: Tensor, told: Tensor | None = None) -> Tensor:
        pictures, shown = (told if asked else None for asked in (self.pictures, self.prefixed))
        keys = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        slots = slots_of_step(attention_mask, input_ids)
        queries = slots.unsqueeze(1)
        seen = keys <= queries
        if pictures is not None:
            seen = torch.logical_or(seen, of_one_picture(pictures, (keys - slots[:1]).expand_as(attention_mask)))
        visible = torch.logical_and((attention_mask != 0).unsqueeze(1), seen)
        if self.window is not None or self.chunk is not None:
            running = tokens_up_to(attention_mask)
            # Two tokens are as far apart as these two are: whatever padding stands before or between them.
            query, key = running.index_select(1, slots).unsqueeze(2), running.unsqueeze(1)
            if self.window is not None:
                visible = torch.logical_and(visible, query - self.window < key)
            if self.chunk is not None:
                chunks = [torch.div(x - 1, self.chunk, rounding_mode="floor") for x in (query, key)]
                visible = torch.logical_and(visible, chunks[0] == chunks[1])
        if shown is not None:
            own = keys - slots.min()
            seen = torch.logical_and(shown.index_select(1, own.clamp(min=0)), own >= 0)
            visible = torch.logical_or(visible, seen.unsqueeze(1))
        return torch.logical_or(visible, keys == queries).unsqueeze(1)


def of_one_picture(pictures: Tensor, at: Tensor) -> Tensor:
    """Whether a token of the step and a key are of one picture [B, T, S], by the numbers of the tokens' pictures
    [B, T]. A key is the `at`-th token [B, S] of the step, or none of them."""
    place = at.clamp(0, pictures.shape[1] - 1)
    key = pictures.gather(1, place)
    # No token has the number -1.
    key = torch.where(torch.logical_and(place == at, key > 0), key, -1)
    return pictures.unsqueeze(2) == key.unsqueeze(1)


class BidirectionalMask(nn.Module):
    def forward(self, attention_mask: Tensor) -> Tensor:
        return seen_by_all(attention_mask, attention_mask)


def seen_by_all(attention_mask: Tensor, queries: Tensor) -> Tensor:
    """The mask [B, 1, T, S] of `queries` [B, T] that all see the tokens of their row and no padding; or all of a row
    that is padding alone."""
    tokens = attention_mask != 0
    visible = torch.logical_or(tokens, tokens.sum(1, keepdim=True) == 0)
    # The mask has its full shape, as TensorRT's fused attention wants it.
    return torch.logical_and(torch.ones_like(queries, dtype=torch.bool).unsqueeze(2), visible.unsqueeze(1)).unsqueeze(1)


class Span(nn.Module):
    def forward(self, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        running = tokens_up_to(attention_mask)
        start = leading_padding(running)
        refused = padding_must_be_on_the_left(
            between(running, start, last_token(tokens_of(attention_mask))).clamp(0, 1)
        )
        # A runtime that reads on beyond the end instead of failing finds no slot out of range.
        start = (start + refused).clamp(0, attention_mask.shape[1]).to(torch.int32)
        return start, torch.ones_like(start) * attention_mask.shape[1]


class Temperature(nn.Module):
    def __init__(self, block: spec.Temperature) -> None:
        super().__init__()
        self.block = block

    def forward(self, attention_mask: Tensor, input_ids: Tensor) -> Tensor:
        running = tokens_up_to(attention_mask)
        counted = leading_padding(running).unsqueeze(1) + running.index_select(
            1, slots_of_step(attention_mask, input_ids)
        )
        return temperature(counted, self.block)


class PlacedTemperature(nn.Module):
    def __init__(self, block: spec.Temperature) -> None:
        super().__init__()
        self.block = block

    def forward(self, position_ids: Tensor) -> Tensor:
        return temperature(position_ids, self.block)


def temperature(counted: Tensor, block: spec.Temperature) -> Tensor:
    """The factor of a query that is the `counted`-th token of its row."""
    return torch.log1p(torch.floor(counted.float() / block.interval)) * block.scale + 1.0


class Presence(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, attention_mask: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        # Not a slice, whose length a trace cannot tell from the mask's.
        present = tokens_of(attention_mask.index_select(1, slots_of_step(attention_mask, input_ids)))
        running = present.cumsum(1)
        tokens, leading = present.sum(1), leading_padding(running)
        end = last_token(present)
        earlier = (attention_mask != 0).sum(1) - tokens
        apart = torch.logical_or(
            end > leading + tokens, torch.logical_and(torch.minimum(leading, earlier) > 0, tokens > 0)
        )
        refused = padding_must_be_on_the_left(apart.to(torch.int64))
        return (present + refused.unsqueeze(1) != 0).to(self.dtype), end.to(torch.int32)

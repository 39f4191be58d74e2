"""What all layers read of a static cache: where a step stands in it, masks, spans, temperatures."""

import torch
from torch import Tensor, nn

from llmexport.export import spec
from llmexport.export.blocks.context import of_one_picture, temperature
from llmexport.export.blocks.padding import between, last_token, leading_padding, tokens_of, tokens_up_to
from llmexport.export.blocks.standard import padding_must_be_on_the_left


class Slots(nn.Module):
    def forward(self, attention_mask: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        tokens, counted = tokens_of(attention_mask), tokens_up_to(attention_mask)
        padding, end = leading_padding(counted), last_token(tokens)
        written = end - input_ids.shape[1]
        # A step whose last token is not its row's: where it was to be written, nobody says.
        early = torch.minimum(end, -written)
        refused = padding_must_be_on_the_left(torch.maximum(between(counted, padding, end), early).clamp(0, 1))
        return padding, written.clamp(min=0) + refused


def step_slots(past_length: Tensor, input_ids: Tensor) -> Tensor:
    """The slots of a static cache that this step's tokens are written to [B, T]."""
    return past_length.unsqueeze(1) + torch.arange(input_ids.shape[1], device=input_ids.device)


class StaticMask(nn.Module):
    def __init__(self, block: spec.Mask) -> None:
        super().__init__()
        assert block.keys
        self.block, self.keys = block, block.keys

    def forward(
        self, padding_length: Tensor, past_length: Tensor, input_ids: Tensor, told: Tensor | None = None
    ) -> Tensor:
        block, first = self.block, padding_length.reshape(-1, 1, 1)
        pictures, shown = (told if asked else None for asked in (block.pictures, block.prefixed))
        query = step_slots(past_length, input_ids).unsqueeze(2)
        if self.keys.slides:
            places = torch.arange(self.keys.slots + input_ids.shape[1], device=input_ids.device)
            key = past_length.reshape(-1, 1, 1) - self.keys.slots + places
        else:
            key = torch.arange(self.keys.slots, device=input_ids.device).reshape(1, 1, -1)
        seen = key <= query
        if pictures is not None:
            seen = torch.logical_or(seen, of_one_picture(pictures, (key - past_length.reshape(-1, 1, 1)).squeeze(1)))
        visible = torch.logical_and(key >= first, seen)
        if block.window is not None:
            visible = torch.logical_and(visible, key > query - block.window)
        if block.chunk is not None:
            chunks = [torch.div(x - first, block.chunk, rounding_mode="floor") for x in (query, key)]
            visible = torch.logical_and(visible, chunks[0] == chunks[1])
        if shown is not None:
            own = (key - past_length.reshape(-1, 1, 1)).squeeze(1)
            within = torch.logical_and(own >= 0, own < input_ids.shape[1])
            seen = torch.logical_and(shown.gather(1, own.clamp(0, input_ids.shape[1] - 1)), within)
            visible = torch.logical_or(visible, seen.unsqueeze(1))
        return torch.logical_or(visible, key == query).unsqueeze(1)


class StaticSpan(nn.Module):
    def __init__(self, keys: spec.Keys) -> None:
        super().__init__()
        self.keys = keys

    def forward(self, padding_length: Tensor, past_length: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        length = past_length + input_ids.shape[1]
        start = padding_length
        if self.keys.slides:
            # The cache holds slots past_length - slots to past_length.
            start = (start - past_length + self.keys.slots).clamp(min=0)
            length = length - past_length + self.keys.slots
        return torch.minimum(start, length).to(torch.int32), length.to(torch.int32)


class StaticTemperature(nn.Module):
    def __init__(self, block: spec.Temperature) -> None:
        super().__init__()
        self.block = block

    def forward(self, padding_length: Tensor, past_length: Tensor, input_ids: Tensor) -> Tensor:
        counted = torch.maximum(step_slots(past_length, input_ids) + 1, padding_length.unsqueeze(1))
        return temperature(counted, self.block)


class StaticPresence(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, padding_length: Tensor, past_length: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        present = step_slots(past_length, input_ids) >= padding_length.unsqueeze(1)
        return present.to(self.dtype), present.any(1).to(torch.int32) * input_ids.shape[1]

"""Inputs for any tiny model, from the names of what its forward takes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

_FIRST_ORDINARY = 3  # below are the tokens for padding, begin and end
_LAST_ORDINARY = 100  # above are those that stand for images


def inputs_for(
    model: nn.Module, sequence: int = 7, batch: int = 2, seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments for a call: tokens ``[batch, sequence]``, or images for models that see."""
    generator = torch.Generator().manual_seed(seed)
    taken = inspect.signature(model.forward).parameters

    def draw(length: int) -> torch.Tensor:
        shape = (batch, length)
        return torch.randint(_FIRST_ORDINARY, _LAST_ORDINARY, shape, generator=generator)

    if "input_ids" not in taken:
        return _images(model, taken, batch, generator)
    ids = draw(sequence)
    found: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "decoder_input_ids" in taken:
        found["decoder_input_ids"] = draw(getattr(model.config, "canvas_length", sequence + 3))
    return found


def _images(model: Any, taken: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    config = getattr(model.config, "backbone_config", None) or model.config
    height, width = config.image_size
    pixels = torch.randn(batch, config.num_channels, height, width, generator=generator)
    found = {"pixel_values": pixels}
    if "dataset_index" in taken:
        found["dataset_index"] = torch.arange(batch) % config.num_experts
    return found


def first_tensor(output: Any) -> torch.Tensor:
    """The result to compare: logits, or the first tensor of floats."""
    values = list(output.values()) if isinstance(output, dict) else list(_flat(output))
    flat = [t for v in values for t in _flat(v)]
    return next(t for t in flat if t.is_floating_point() and t.dim() > 0)


def _flat(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value for t in _flat(v)] if isinstance(value, tuple | list) else []


@torch.no_grad()
def fill(model: nn.Module, seed: int = 0) -> None:
    """Random weights that matter: matrices of a visible scale, vectors near what they were.

    Fresh models hold zeros and ones in biases and gains, behind which mistakes hide.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or name.endswith(_KEPT):
            continue
        drawn = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if parameter.dim() > 1:
            parameter.copy_(drawn * (0.5 if "embed" in name else 0.12))
        else:
            parameter.copy_(parameter.nan_to_num().clamp(-10, 10) + 0.1 * drawn)
    for name, buffer in model.named_buffers():
        if name.endswith("bias") and buffer.is_floating_point():
            buffer.add_(0.2 * torch.randn(buffer.shape, generator=generator))


# State-space parameters whose sign or order of size matters.
_KEPT = ("A_log", "dt_bias", ".D")

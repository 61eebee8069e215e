"""Made-up calls of a block, in the form of a call that was made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from moec.call_form import TOKENS_ALONE, CallForm, TensorForm


@dataclass(frozen=True)
class Trial:
    """The form of a call and, by parameter, values that its integer tensors may have.

    Integers mean something (a place in a table, say), so they are drawn from ``values``, or are
    zero where none are known; floats are random.
    """

    form: CallForm = TOKENS_ALONE
    values: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def data(self, x: torch.Tensor, generator: torch.Generator) -> list[torch.Tensor]:
        """The tensors of a call with tokens ``x``."""
        lead = tuple(x.shape[:-1])
        return [x, *(self._tensor(t, lead, generator, x.device) for t in self.form.tensors)]

    def _tensor(
        self,
        wanted: TensorForm,
        lead: tuple[int, ...],
        generator: torch.Generator,
        device: torch.device,
    ) -> torch.Tensor:
        shape = wanted.shape(lead)
        if wanted.dtype.is_floating_point:
            return torch.randn(shape, generator=generator).to(device, wanted.dtype)
        known = self.values.get(wanted.name)
        if known is None or not known.numel():
            return torch.zeros(shape, dtype=wanted.dtype, device=device)
        drawn = torch.randint(known.numel(), shape, generator=generator)
        return known.reshape(-1)[drawn.to(known.device)].to(device, wanted.dtype)


__all__ = ["Trial"]

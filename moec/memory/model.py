"""The memory of a whole model, as far as moec knows it: parameters, gradients, MoE blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from moec.codegen.host import partition
from moec.errors import DimError
from moec.ir.dims import evaluate, symbols
from moec.ir.graph import Value
from moec.memory.prediction import Prediction, largest

NOT_COUNTED = (
    "attention, norms and embeddings, logits and loss, caches, the optimizer, the CUDA context, and"
    " memory that the allocator keeps in pieces"
)


@dataclass(frozen=True)
class Part:
    """Equal blocks of a model: what one holds, and how many there are."""

    prediction: Prediction
    count: int

    @property
    def kept_inputs(self) -> Sequence[Value]:
        """The tensors of a call that a block keeps for its backward pass, its tokens first."""
        graph = self.prediction.graph
        program = partition(graph)
        kept = program.backward_inputs if graph.cotangents else range(len(graph.inputs))
        return [graph.inputs[i] for i in kept if symbols(graph.inputs[i].type.bytes)]

    def inputs_at(self, tokens: int) -> int:
        """The size of those tensors in bytes."""
        sizes = self.sizes(tokens)
        return sum(evaluate(v.type.bytes, sizes) for v in self.kept_inputs)

    def sizes(self, tokens: int) -> dict[str, int]:
        """The binding of the block's dim; :class:`DimError` if it has several."""
        names = self.prediction.step.names
        if len(names) > 1:
            raise DimError(
                f"@{self.prediction.graph.name} has the dims {', '.join(names)}: a model is"
                " counted where all blocks have one; give sizes of the others"
            )
        return {**self.prediction.step.fixed, **dict.fromkeys(names, tokens)}

    def held_at(self, tokens: int) -> int:
        """What one block keeps between forward and backward, the tensors of its call included."""
        held = self.prediction.held
        if held is None:
            return 0
        return held.at(**self.sizes(tokens)) + self.inputs_at(tokens)

    def transient_at(self, tokens: int) -> int:
        """What there is only while a pass of one block runs."""
        sizes, held = self.sizes(tokens), self.prediction.held
        own = self.prediction.step_alone.at(**sizes)
        return own - held.at(**sizes) if held is not None else own + self.inputs_at(tokens)


@dataclass(frozen=True)
class ModelMemory:
    """A model's parameters in bytes, and its blocks.

    A step of training holds parameters, a gradient of each, what every block keeps, and what the
    pass of one block needs; inference holds parameters and what one block needs. Attention and all
    else between the blocks (:data:`NOT_COUNTED`) come on top.
    """

    parameters: int
    parts: tuple[Part, ...]

    @property
    def is_training(self) -> bool:
        """Whether gradients are counted."""
        return any(p.prediction.held is not None for p in self.parts)

    @property
    def gradients(self) -> int:
        """Bytes of the gradients of all parameters."""
        return self.parameters if self.is_training else 0

    def held_at(self, tokens: int) -> int:
        """What all blocks keep between forward and backward."""
        return sum(p.count * p.held_at(tokens) for p in self.parts)

    def transient_at(self, tokens: int) -> int:
        """What the pass of one block needs, of that which needs most."""
        return max((p.transient_at(tokens) for p in self.parts), default=0)

    def at(self, tokens: int) -> int:
        """Bytes for so many tokens in all, batch times sequence."""
        return self.parameters + self.gradients + self.held_at(tokens) + self.transient_at(tokens)

    def largest(self, budget: int) -> int | None:
        """The most tokens that fit into ``budget`` bytes; ``None`` if parameters alone do not."""
        return largest(self.at, budget, 0, self.most_tokens)

    @property
    def most_tokens(self) -> int:
        """The most tokens that every block takes."""
        return min(p.prediction.step.span[1] for p in self.parts)


def bytes_of_parameters(model: nn.Module) -> int:
    """The size of all parameters, shared ones once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


__all__ = ["NOT_COUNTED", "ModelMemory", "Part", "bytes_of_parameters"]

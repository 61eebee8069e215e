"""Finding blocks that hold several experts without an experts module or a loop of a known form.

By structure: weights with one part an expert (stacked, or rows of tables, or a list of equal
modules), and something of the same number that scores them, or an argument that names them. What
looks so must also run on tokens; whether it is compiled is decided by capture and comparison.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from moec.capture.arguments import Extra, forms, required_arguments
from moec.capture.check import unchanged
from moec.capture.dense import capture_dense, example
from moec.capture.evidence import refuse_without_scores
from moec.errors import MoecError
from moec.structure import structure_key

_RANKS = (3, 2)
# Layers with weights of rank 3 and more that are no experts.
_OTHER = (nn.modules.conv._ConvNd, nn.MultiheadAttention, nn.Bilinear)


@dataclass(frozen=True)
class DenseForm:
    """How a dense block is called: ``extra`` arguments after the tokens, naming ``experts``.

    ``scores`` are the sizes that an axis of scores may have.
    """

    experts: int
    extra: int = 0
    scores: frozenset[int] = frozenset()

    def arguments(self, rank: int) -> Iterator[tuple[Extra, ...]]:
        """Every form that the further arguments may have for tokens of a rank."""
        return forms(self.extra, rank, self.experts)


def dense_form(module: nn.Module, tried: dict[Hashable, DenseForm | None]) -> DenseForm | None:
    """How a module that looks like a dense block is called; ``None`` if it is none.

    ``tried`` remembers what became of structures that were tried before.
    """
    if _plain(module) or not _has_forward(module) or _inner_blocks(module):
        return None
    if not any(p.is_floating_point() for p in module.parameters()):
        return None
    scored = scored_experts(module)
    if scored:
        extra = max(required_arguments(module) - 1, 0)
        form = DenseForm(min(scored), extra, frozenset(scored))
    else:
        experts = _named_experts(module)
        if experts is None:
            return None
        form = DenseForm(experts, required_arguments(module) - 1, frozenset({experts}))
    # what can be taken by itself inside is better than a whole that cannot
    capture = not scored or any(_named_experts(m) for m in module.modules() if m is not module)
    key = structure_key(module)
    if key not in tried:
        tried[key] = form if _works(module, form, capture=capture) else None
    return tried[key]


def _plain(module: nn.Module) -> bool:
    """Whether a module is a layer or a container of torch's own."""
    return type(module).__module__.startswith("torch.")


def _inner_blocks(module: nn.Module) -> bool:
    """Whether a submodule scores experts itself: the innermost is taken."""
    inside = (m for m in module.modules() if m is not module and not _plain(m))
    return any(scored_experts(m) for m in inside)


def scored_experts(module: nn.Module) -> set[int]:
    """The sizes that scores may have in a module with weights by expert and something that scores
    them; none in another module.
    """
    for name, count in [*_stacks(module), *_lists(module)]:
        sizes = [_score_size(module, n, p, name, count) for n, p in module.named_parameters()]
        found = {s for s in sizes if s is not None}
        if found:
            return found | {count}
    return _table_scores(module)


def _stacks(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Weights with a part an expert: a module's own and its children's."""
    for name, owner in [("", module), *module.named_children()]:
        if isinstance(owner, _OTHER):
            continue
        for own, parameter in owner.named_parameters(recurse=False):
            if parameter.dim() >= 3 and parameter.shape[0] >= 2:
                yield f"{name}.{own}".lstrip("."), int(parameter.shape[0])


def _lists(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Lists of equal modules."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList) and len(child) >= 2 and _alike(list(child)):
            yield name, len(child)


def _score_size(
    module: nn.Module, name: str, parameter: torch.Tensor, experts: str, count: int
) -> int | None:
    """The number of scores that a weight gives: one an expert, or several (slots) if it is the
    module's own.
    """
    if name == experts or name.startswith(f"{experts}.") or parameter.dim() < 2:
        return None
    shape = [int(s) for s in parameter.shape]
    if count in (shape if parameter.dim() == 2 else shape[1:]):
        return count
    slots = [s for s in shape[1:] if s % count == 0 and parameter.dim() == 2 and "." not in name]
    return slots[0] if slots else None


def _table_scores(module: nn.Module) -> set[int]:
    """The sizes of scores by which rows of tables are picked: one a row, or one for each half of a
    pair.
    """
    tables = [c for c in module.children() if isinstance(c, nn.Embedding | nn.EmbeddingBag)]
    own = {id(t.weight) for t in tables}
    keys = {int(s) for p in module.parameters() if id(p) not in own for s in p.shape}
    for count in sorted({int(t.num_embeddings) for t in tables}):
        root = math.isqrt(count)
        sizes = {count} | ({root, 2 * root} if root * root == count else set())
        if count >= 4 and sizes & keys:
            return sizes
    return set()


def _named_experts(module: nn.Module) -> int | None:
    """The number of experts of a list or a stacked weight with a forward that takes which one to
    use, or how many rows are whose.
    """
    if not _has_forward(module) or required_arguments(module) < 2:
        return None
    own = [p for p in module.parameters(recurse=False) if p.dim() >= 3]
    if own and required_arguments(module) == 2 and not isinstance(module, _OTHER):
        return int(own[0].shape[0])
    lists = [module, *module.children()]
    for members in lists:
        if isinstance(members, nn.ModuleList) and len(members) >= 2 and _alike(list(members)):
            return len(members)
    return None


def _has_forward(module: nn.Module) -> bool:
    return getattr(type(module), "forward", None) is not nn.Module.forward


def _alike(members: list[nn.Module]) -> bool:
    simple = not any(isinstance(m, nn.ModuleList) for e in members for m in e.modules())
    weights = any(True for _ in members[0].parameters())
    return simple and weights and len({structure_key(m) for m in members}) == 1


def _works(module: nn.Module, form: DenseForm, *, capture: bool) -> bool:
    """Whether a module runs on tokens and arguments of one of the forms; with ``capture``, whether
    they decide what it computes.
    """
    dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
    for rank in _RANKS:
        for extras in form.arguments(rank):
            try:
                with unchanged(module):
                    example(module, dtype, rank, extras)
                    if capture:
                        found = capture_dense(module, "", dtype, rank, extras)
                        data = len(found.graph.inputs) - len(found.weights)
                        refuse_without_scores(found.graph, data, form.scores)
                return True
            except MoecError:
                continue
    return False


__all__ = ["DenseForm", "dense_form", "scored_experts"]

"""What routes a block's tokens: recorded values that give each expert's weight for each token.

A loop over experts adds up ``G[t, e] * expert[e](x[t])``. The recording shows which tokens each
expert was called on; least squares, with a few unknowns a token, say whether a recorded value is
such a sum at all. What is looked for are recorded values that make up ``G``: indices and weights,
indices of which some are dropped, masks and weights, or ``G`` itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moec.capture.explained import Match
from moec.capture.forms import ALL, INDICES, PICKS, Form
from moec.capture.picks import distinct_picks

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Values:
    """The recorded values with one row a token, each as a matrix ``[T, columns]``, latest first."""

    nodes: Sequence[fx.Node]
    tokens: int

    def matrices(self, wanted: Callable[[torch.Tensor], bool]) -> Iterator[tuple[fx.Node, Any]]:
        """Nodes and their values as matrices, of those that are wanted."""
        for node in self.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor) and value.dim() >= 1 and wanted(value):
                columns = 1 if value.numel() == self.tokens else value.shape[-1]
                if value.numel() == self.tokens * columns and value.numel():
                    yield node, value.reshape(self.tokens, columns)


def called_on(calls: Sequence[fx.Node], x: torch.Tensor, experts: int) -> torch.Tensor | None:
    """Which tokens ``x [T, H]`` each expert was called on, ``bool[T, E]``; ``None`` if a call was
    on rows that are no tokens.
    """
    chosen = torch.zeros(x.shape[0], experts, dtype=torch.bool)
    for call in calls:
        rows = call.args[0].meta["val"]  # type: ignore[union-attr]
        if rows.shape[-1] != x.shape[-1]:
            return None
        same = (rows.reshape(-1, 1, rows.shape[-1]) == x.unsqueeze(0)).all(-1)
        if not bool(same.any(1).all()):
            return None
        chosen[:, int(call.args[1])] |= same.any(0).cpu()  # type: ignore[arg-type]
    return chosen


def explains(result: torch.Tensor, outputs: torch.Tensor, chosen: torch.Tensor) -> bool:
    """Whether ``result [T, H]`` is a weighted sum of the outputs ``[E, T, H]`` of the chosen
    experts, with fewer of them than there are numbers in a row.
    """
    if int(chosen.sum(1).max()) >= result.shape[-1]:
        return True  # any row is: what follows has to show
    parts = outputs.permute(1, 2, 0).double().cpu() * chosen.unsqueeze(1)
    wanted = result.double().cpu().unsqueeze(-1)
    gates = torch.linalg.lstsq(parts, wanted, driver="gelsd").solution
    error = (parts @ gates - wanted).norm()
    tolerance = _TOLERANCE.get(result.dtype, 1e-4)
    return bool(error <= tolerance * wanted.norm().clamp(min=1e-30))


@dataclass(frozen=True)
class Search:
    """A search for what makes up the gates of one result.

    ``outputs`` are those of every expert on every token, ``[E, T, H]``; ``chosen`` says which were
    computed.
    """

    values: Values
    x: fx.Node
    result: fx.Node
    outputs: torch.Tensor
    chosen: torch.Tensor

    def matches(self) -> Iterator[Match]:
        """Every choice of recorded values that makes up the gates, those of few numbers first."""
        yield from self._indices()
        yield from self._picks()
        yield from self._masks()
        yield from self._gates()

    @property
    def experts(self) -> int:
        """The number of experts."""
        return int(self.chosen.shape[1])

    def _match(
        self,
        routing: fx.Node,
        w: fx.Node | None,
        form: Form,
        keep: fx.Node | None = None,
        by_expert: bool = False,
    ) -> Match:
        return Match(self.x, routing, w, self.result, form, keep, by_expert)

    def _dense(self, idx: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """The gates that indices and weights make."""
        inside = idx.long().cpu().clamp(0, self.experts - 1)
        none = (idx < 0).cpu() | (idx >= self.experts).cpu()
        gates = torch.zeros(self.chosen.shape, dtype=torch.float64)
        return gates.scatter_add(1, inside, w.double().cpu().masked_fill(none, 0))

    def _indices(self) -> Iterator[Match]:
        for idx, places in self.values.matrices(_is_integer):
            if places.shape[1] > self.experts or not _are_distinct(places, self.experts):
                continue
            named = self._named(places)
            covered, exact = bool(named[self.chosen].all()), torch.equal(named, self.chosen)
            for w, weights, by_expert in self._weights_at(places) if covered else ():
                # a mask that the loop reads may decide at other tokens, if at none of these
                for keep in self._dropping(idx, places, w, weights):
                    yield self._match(idx, w, INDICES, keep, by_expert)
                if (exact or not by_expert) and self._close(self._dense(places, weights)):
                    yield self._match(idx, w, INDICES, None, by_expert)

    def _weights_at(
        self, places: torch.Tensor
    ) -> Iterator[tuple[fx.Node | None, torch.Tensor, bool]]:
        """Weights of the choices; then columns for all experts, taken at the chosen ones."""
        for w, value in self._weights(places.shape[1]):
            yield w, value, False
        inside = places.long().clamp(0, self.experts - 1)
        for node, value in self.values.matrices(torch.is_floating_point):
            if value.shape[1] == self.experts > 1:
                yield node, value.gather(1, inside.to(value.device)), True

    def _named(self, places: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """Which experts the indices name that count, ``bool[T, E]``."""
        ones = torch.ones_like(places, dtype=torch.float64)
        return self._dense(places, ones if keep is None else ones * keep) > 0

    def _dropping(
        self, idx: fx.Node, places: torch.Tensor, w: fx.Node | None, weights: torch.Tensor
    ) -> Iterator[fx.Node]:
        """Masks that say which of the indices count: exactly those computed."""
        choices = places.shape[1]
        read = _read_between(self.result, {self.x, idx, w})
        for keep, mask in self.values.matrices(_is_mask):
            if mask.shape[1] not in (1, choices) or keep not in read or keep is idx:
                continue
            if _lists_rows(keep):  # of an expert that all tokens chose: as long as a mask
                continue
            kept = (mask != 0).to(weights.device)
            if mask.shape[1] < choices:  # the first choice counts in any case
                kept = torch.cat([torch.ones_like(kept), kept.expand(-1, choices - 1)], 1)
            if torch.equal(self._named(places, kept.to(places.device)), self.chosen):
                if self._close(self._dense(places, weights * kept)):
                    yield keep

    def _weights(self, columns: int) -> Iterator[tuple[fx.Node | None, torch.Tensor]]:
        """Recorded weights of so many columns; then none at all, which counts as one."""
        for node, value in self.values.matrices(torch.is_floating_point):
            if value.shape[1] == columns:
                yield node, value
        yield None, torch.ones(self.values.tokens, columns)

    def _close(self, gates: torch.Tensor) -> bool:
        """Whether gates ``[T, E]`` give the result."""
        value = self.result.meta["val"].reshape(self.outputs.shape[1:])
        weights = gates.double().to(self.outputs.device)
        found = torch.einsum("te,eth->th", weights, self.outputs.double())
        tolerance = _TOLERANCE.get(value.dtype, 1e-4)
        scale = found.norm().clamp(min=1e-30)
        return bool((found - value.double()).norm() <= tolerance * scale)

    def _picks(self) -> Iterator[Match]:
        """Matches in which experts name their tokens."""
        for node, form in distinct_picks(self.values.nodes, self.experts):
            picks = node.meta["val"] if form == PICKS else node.meta["val"].t()
            if not torch.equal(self._of_picks(picks, torch.ones(picks.shape)) > 0, self.chosen):
                continue
            for w in (*self.values.nodes, None):
                weights = self._weights_of_picks(node, w)
                if weights is None:
                    continue
                weights = weights if form == PICKS else weights.t()
                if self._close(self._of_picks(picks, weights)):
                    yield self._match(node, w, form)

    def _weights_of_picks(self, picks: fx.Node, w: fx.Node | None) -> torch.Tensor | None:
        if w is None:
            return torch.ones(picks.meta["val"].shape)
        value: Any = w.meta.get("val")
        floats = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value if floats and value.shape == picks.meta["val"].shape else None

    def _of_picks(self, picks: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """The gates that experts' picks ``[E, C]`` and their weights make."""
        gates = torch.zeros(self.chosen.shape[::-1], dtype=torch.float64)
        return gates.scatter_add(1, picks.long().cpu(), w.double().cpu()).t()

    def _masks(self) -> Iterator[Match]:
        for node, mask in self._marks():
            marked = (mask != 0).cpu()
            if not torch.equal(marked.any(1), self.chosen):
                continue
            choices = marked.shape[1]
            for w, weights in self._weights(choices):
                if self._close((marked * weights.cpu().unsqueeze(-1)).sum(1)):
                    yield self._match(node, w, Form("TKE", "TK"))
            for w, weights in self._weights(self.experts) if choices == 1 else ():
                if w is not None and self._close(marked[:, 0] * weights.cpu()):
                    yield self._match(node, w, Form("TE", "TE"))

    def _marks(self) -> Iterator[tuple[fx.Node, torch.Tensor]]:
        """Recorded masks as ``[T, K, E]``."""
        tokens, experts = self.values.tokens, self.experts
        for node in self.values.nodes:
            value = node.meta.get("val")
            if not isinstance(value, torch.Tensor) or not _is_mask(value) or value.dim() < 2:
                continue
            per_token = value.numel() // tokens
            whole = value.shape[-1] == experts and value.numel() == tokens * per_token
            if whole and (value.dim() == 2 or per_token == experts or value.shape[0] == tokens):
                yield node, value.reshape(tokens, -1, experts)

    def _gates(self) -> Iterator[Match]:
        for node, value in self.values.matrices(torch.is_floating_point):
            if value.shape[1] != self.experts or not self._close(value):
                continue
            if bool(self.chosen.all()):
                yield self._match(node, node, ALL)
            elif torch.equal((value != 0).cpu(), self.chosen):
                yield self._match(node, node, Form("TE", "TE"))


def _read_between(result: fx.Node, sources: set[fx.Node | None]) -> set[fx.Node]:
    """What a result is computed from, going no further back than to the sources."""
    found: set[fx.Node] = set()
    pending = [result]
    while pending:
        node = pending.pop()
        if node not in found and node not in sources:
            found.add(node)
            pending += node.all_input_nodes
    return found


def _is_integer(value: torch.Tensor) -> bool:
    return not value.is_floating_point() and value.dtype != torch.bool


def _is_mask(value: torch.Tensor) -> bool:
    return not value.is_floating_point()


def _lists_rows(node: fx.Node) -> bool:
    """Whether a value is taken from a list of places that hold something."""
    pending, seen = [node], set[fx.Node]()
    while pending:
        at = pending.pop()
        if at.target in (torch.ops.aten.nonzero.default, torch.ops.aten.where.default):
            return True
        pending += [n for n in at.all_input_nodes if n not in seen]
        seen.update(at.all_input_nodes)
    return False


def _are_distinct(places: torch.Tensor, experts: int) -> bool:
    """Whether the experts of each token are different ones, "no expert" aside."""
    if int(places.max()) >= 2 * experts or int(places.min()) < -1:
        return False
    rows = [[e for e in row if 0 <= e < experts] for row in places.tolist()]
    return any(rows) and all(len(set(row)) == len(row) for row in rows)


__all__ = ["Search", "Values", "called_on", "explains"]

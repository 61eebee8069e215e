"""Blocks that users write: a loop over a list of experts, with the routing in the block itself.

The block runs for real on random tokens under a recorder. Among the recorded values one looks for
the tokens, indices and weights with which ``sum_k w[t, k] * expert[idx[t, k]](x[t])`` gives a
recorded value; the loop is then replaced by that sum, and the rest of the block (router before,
shared parts after) is imported as straight-line code. Two recordings at other sizes must agree, and
the result is compared with the block itself at several sizes before it is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_flatten

from moec.capture.block import _LEAF, MAX_TOKENS, CapturedBlock, block_name, weight_hint
from moec.capture.branches import refuse_size_branches
from moec.capture.constants import constant_value
from moec.capture.counts import LISTS, hidden_sizes
from moec.capture.experts import ExpertsBody, integer_buffers, named_weights
from moec.capture.explained import Match, refuse_unexplained
from moec.capture.importer import Importer
from moec.capture.lists import expert_list
from moec.capture.loop_runs import Run, expert_call, run_block
from moec.capture.open_sizes import open_sizes
from moec.capture.reading import ExpertGroups, read_experts
from moec.capture.recorder import ConstantPair, IntegerPair, Sizes, merge
from moec.capture.replace import MATCHED, replace_loop, restore_loop
from moec.capture.routes import Search, Values, called_on, explains
from moec.capture.size_guards import doubtful_sizes
from moec.capture.stacks import Part, collapse, cuts, stacked_experts, template
from moec.capture.traced_sizes import SizeTrace, computed_dims
from moec.errors import CaptureError, NotRunError
from moec.ir.builder import Builder
from moec.ir.dims import dim
from moec.ir.graph import Value
from moec.ir.types import Type, dtype_name

aten = torch.ops.aten
_MOST_TRIES = 200
_RUNS = ((3, 7, 5, 11), (5, 9, 3, 13), (7, 11, 3, 19), (11, 5, 7, 13), (13, 9, 11, 15))
_SIZES = {3: {"B": (3, 5), "S": (7, 11)}, 2: {"T": (23, 29)}}
# With symbols for sizes, numbers of tokens must not be mistaken for others: the first that cannot.
_TRACED_SIZES = {
    3: [{"B": (b, c), "S": (s, r)} for b, s, c, r in _RUNS],
    2: [{"T": (b * s, c * r)} for b, s, c, r in _RUNS],
}


class _Loop(nn.Module):
    """A list of experts as an experts module: the plainest loop."""

    def __init__(self, members: Sequence[nn.Module], registry: nn.Module) -> None:
        super().__init__()
        self.experts = registry
        self.__dict__["members"] = list(members)

    def forward(self, x: torch.Tensor, idx: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor | None = None
        members: Any = self.members
        for e, expert in enumerate(members):
            token, place = torch.where(idx == e)
            if token.numel():
                y = expert(x[token]) * w[token, place, None]
                out = y.new_zeros(x.shape[0], y.shape[-1]) if out is None else out
                out.index_add_(0, token, y)
        return x.new_zeros(x.shape) if out is None else out


def capture_loop(
    module: nn.Module, path: str, dtype: torch.dtype | None, rank: int
) -> CapturedBlock:
    """The IR of a block with its own loop over a list of experts; :class:`CaptureError` says why if
    there is none.

    What cannot be read with plain sizes is tried again with symbols for them: a capacity keeps the
    expression that it was computed by.
    """
    try:
        refuse_size_branches(module)
        return _Capture(module, path, dtype, Sizes(_SIZES[rank]), traced=False).run()
    except NotRunError:
        raise
    except CaptureError as error:
        sizes = Sizes(_tellable_sizes(module, rank))
        try:
            with open_sizes(module):
                return _Capture(module, path, dtype, sizes, traced=True).run()
        except NotRunError:
            raise error from None


def _tellable_sizes(module: nn.Module, rank: int) -> dict[str, tuple[int, int]]:
    """Sizes for the two runs whose products are no other number of the block."""
    numbers = {int(s) for t in (*module.parameters(), *module.buffers()) for s in t.shape}
    numbers |= {v for m in module.modules() for v in vars(m).values() if isinstance(v, int)}
    numbers |= {len(m) for m in module.modules() if isinstance(m, LISTS)}
    for pairs in _TRACED_SIZES[rank]:
        if not numbers & {n for run in zip(*pairs.values(), strict=True) for n in _products(run)}:
            return pairs
    raise CaptureError("its sizes are like numbers of tokens: no run tells them apart")


def _products(sizes: Sequence[int]) -> set[int]:
    return {*sizes, math.prod(sizes)}


@dataclass(frozen=True)
class _Capture:
    """One attempt to read a block; ``traced``: its sizes are symbols in the runs."""

    module: nn.Module
    path: str
    dtype: torch.dtype | None
    sizes: Sizes
    traced: bool

    def run(self) -> CapturedBlock:
        """The captured block."""
        found = expert_list(self.module)
        if found is None:
            return self._stacked()
        name, members = found
        registry = self.module.get_submodule(name)
        inner = f"{self.path}.{name}" if self.path else name
        body = read_experts(_Loop(members, registry), inner)
        runs = [self._run(name, members, body.hidden, i) for i in (0, 1)]
        return self._captured(name, runs, members, body)

    def _stacked(self) -> CapturedBlock:
        """A block that loops over stacked weights of its own."""
        experts = stacked_experts(self.module)
        if experts is None:
            raise CaptureError(f"{type(self.module).__name__} holds no list of equal experts")
        hidden = self._width()
        runs = [self._run(None, (), hidden, i) for i in (0, 1)]
        parts = [cuts(run.recorder, experts) for run in runs]
        known = {size for p in self.module.parameters() for size in p.shape}
        one = template([*parts[0], *parts[1]], known)
        members = [Part(self.module, one, expert) for expert in range(experts)]
        body = read_experts(_Loop(members, self.module), self.path)
        for run, found in zip(runs, parts, strict=True):
            for cut in found:
                collapse(run.recorder, cut, expert_call)
        return self._captured("", runs, members, body)

    def _width(self) -> int:
        """The width of tokens with which a block runs."""
        reasons = []
        for hidden in hidden_sizes(self.module):
            try:
                self._run(None, (), hidden, 0)
            except NotRunError as error:
                reasons.append(str(error))
            else:
                return hidden
        raise NotRunError("; ".join(reasons[:1]) or f"{type(self.module).__name__} has no weights")

    def _run(self, name: str | None, members: Sequence[nn.Module], hidden: int, which: int) -> Run:
        sizes = {axis: pair[which] for axis, pair in self.sizes.pairs.items()}
        trace = SizeTrace(sizes) if self.traced else None
        return run_block(
            self.module, name, members, hidden, self.dtype, tuple(sizes.values()), trace
        )

    def _captured(
        self,
        name: str,
        runs: Sequence[Run],
        members: Sequence[nn.Module],
        body: ExpertsBody | ExpertGroups,
    ) -> CapturedBlock:
        sizes, doubtful = self._sizes_of(runs)
        graph = _merged(self.module, runs, members, sizes)
        tree = tree_flatten(runs[0].out)[1]
        importer = _LoopImporter(self.module, name, body, sizes, self.path)
        return replace(importer.run(graph, runs[0], tree), doubtful=doubtful)

    def _sizes_of(self, runs: Sequence[Run]) -> tuple[Sizes, tuple[tuple[int, ...], ...]]:
        """The sizes with what the block computed of them; and sizes to be compared with it."""
        first, second = (run.trace for run in runs)
        if first is None or second is None:
            return self.sizes, ()
        refuse_size_branches(self.module, first.places & second.places)
        computed, doubts = computed_dims(first, second)
        names = list(self.sizes.pairs)
        guards = [*first.guards, *second.guards]
        doubtful = doubtful_sizes(guards, {dim(n): dim(n) for n in names}, names)
        return replace(self.sizes, computed=computed, doubts=tuple(doubts)), doubtful


def _merged(
    module: nn.Module, runs: Sequence[Run], members: Sequence[nn.Module], sizes: Sizes
) -> fx.Graph:
    """The block's graph with the loop as one opaque op, from the first matches that agree."""
    reasons = ["no tokens, indices and weights of the block explain what its loop computes"]
    matches = [_explained(module, run, members, reasons) for run in runs]
    reason = _dropout_reason(module) or reasons[-1]
    for pair in islice(_pairs(*matches), _MOST_TRIES):
        try:
            for run, match in zip(runs, pair, strict=True):
                replace_loop(run.recorder, match, run.tokens, len(members))
            return merge(
                runs[0].recorder,
                runs[1].recorder,
                (runs[0].out, runs[1].out),
                sizes,
                lambda name, which: name,
            )
        except CaptureError as error:
            reason = str(error)
            for run, match in zip(runs, pair, strict=True):
                restore_loop(run.recorder, match)
    raise CaptureError(reason)


def _dropout_reason(module: nn.Module) -> str:
    """That dropout acts in a block, if it does: no two runs are the same then."""
    for name, child in module.named_modules():
        if isinstance(child, nn.modules.dropout._DropoutNd) and child.training and child.p > 0:
            return (
                f"dropout in {name} draws other numbers at each call; it is compiled in eval mode"
            )
    return ""


def _explained(
    module: nn.Module, run: Run, members: Sequence[nn.Module], reasons: list[str]
) -> list[Match]:
    """The matches of one recording that hold for all tokens; adds the reasons why others do not."""
    found: list[Match] = []
    for match in islice(_matches(run, members), _MOST_TRIES):
        try:
            refuse_unexplained(module, run.recorder.reads, match)
            found.append(match)
        except CaptureError as error:
            reasons.append(str(error))
    return found


def _pairs(first: Sequence[Match], second: Sequence[Match]) -> Iterator[tuple[Match, Match]]:
    """Matches of the two recordings that may be the same one."""
    for one, other in product(first, second):
        if _kinds(one) == _kinds(other):
            yield one, other


def _kinds(match: Match) -> tuple[Any, ...]:
    return match.form, *(str(node.target) for node in match.sources)


def _matches(run: Run, members: Sequence[nn.Module]) -> Iterator[Match]:
    """Every choice of tokens and routing whose weighted sum of expert outputs is a recorded
    value.
    """
    nodes = list(run.recorder.graph.nodes)
    calls = [n for n in nodes if n.target is expert_call]
    behind = _calls_behind(nodes, calls)
    values = Values([n for n in nodes if not behind[n]], run.tokens)
    for x in run.nodes(True):
        rows = x.meta["val"].reshape(run.tokens, -1)
        chosen = None if behind[x] else called_on(calls, rows, len(members))
        outputs = None if chosen is None else _dense_outputs(members, x.meta["val"], run.tokens)
        if outputs is None or chosen is None or not calls:
            continue
        for node in _results(run, behind, outputs.shape[-1]):
            result = node.meta["val"].reshape(outputs.shape[1:])
            if explains(result, outputs, chosen):
                yield from Search(values, x, node, outputs, chosen).matches()


def _results(run: Run, behind: Mapping[fx.Node, int], width: int) -> Iterator[fx.Node]:
    """Values that every expert's call had a part in, the last first: of a tensor that grows in
    place only the last one counts.
    """
    seen: set[int] = set()
    every = max(behind.values())
    for node in reversed(list(run.nodes(True, width))):
        if behind[node] == every and id(node.meta["val"]) not in seen:
            seen.add(id(node.meta["val"]))
            yield node


def _calls_behind(nodes: Sequence[fx.Node], calls: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """For each node the calls that it is computed from, one bit each."""
    bits = {call: 1 << place for place, call in enumerate(calls)}
    found: dict[fx.Node, int] = {}
    for node in nodes:
        mine = bits.get(node, 0)
        for operand in node.all_input_nodes:
            mine |= found.get(operand, 0)
        found[node] = mine
    return found


def _dense_outputs(
    members: Sequence[nn.Module], x: torch.Tensor, tokens: int
) -> torch.Tensor | None:
    """Every expert on every token, ``[E, T, H]``; ``None`` if ``x`` is no input of theirs."""
    if x.shape[-1] not in hidden_sizes(members[0]):
        return None
    try:
        with torch.no_grad():
            return torch.stack([expert(x.reshape(tokens, -1)) for expert in members])
    except RuntimeError:
        return None


class _LoopImporter(Importer):
    """Imports the merged recording of a block."""

    def __init__(
        self,
        module: nn.Module,
        name: str,
        body: ExpertsBody | ExpertGroups,
        sizes: Sizes,
        path: str,
    ) -> None:
        builder = Builder({n: (0, MAX_TOKENS) for n in sizes.pairs})
        super().__init__(builder, lambda node: node.meta["shape"], self.size, module_path=path)
        self.list_name, self.body, self.sizes = name, body, sizes
        self.tensors = {**dict(named_weights(module)), **dict(integer_buffers(module))}
        self.weights: dict[str, Value] = {}
        self.block = module

    def size(self, argument: Any) -> Any:
        return (
            self.sizes.dim(argument.first, argument.second)
            if isinstance(argument, IntegerPair)
            else argument
        )

    def argument(self, argument: Any) -> Any:
        if isinstance(argument, ConstantPair):
            return constant_value(self.b, self.sizes, argument)
        return (
            self.size(argument) if isinstance(argument, IntegerPair) else super().argument(argument)
        )

    def run_graph(self, graph: fx.Graph, x: Value) -> list[Value]:
        for node in graph.nodes:
            if node.op == "placeholder":
                source = str(node.meta["source"])
                self.env[node] = x if source == "x" else self.weight(source)
        self.run_calls(graph)
        output = next(n for n in graph.nodes if n.op == "output")
        return [self.value(self.env[n]) for n in output.args[0]]

    def run_calls(self, graph: fx.Graph) -> None:
        super().run(graph)

    def run(self, graph: fx.Graph, first: Run, tree: Any) -> CapturedBlock:  # type: ignore[override]
        """The captured block of a merged recording."""
        leading = tuple(self.sizes.dim(*pair) for pair in self.sizes.pairs.values())
        tokens = next(n.meta["val"] for n in first.recorder.graph.nodes if n.op == "placeholder")
        x = Value(Type(dtype_name(tokens.dtype), (*leading, tokens.shape[-1])), "x")
        results = self.run_graph(graph, x)
        built = self.b.graph(
            block_name(self.module_path, self.block), [x, *self.weights.values()], results
        )
        return CapturedBlock(built, tuple(self.weights), tree)

    def weight(self, path: str) -> Value:
        if path not in self.weights:
            tensor = self.tensors[path]
            self.weights[path] = Value(
                Type(dtype_name(tensor.dtype), tuple(tensor.shape)), weight_hint(path)
            )
        return self.weights[path]

    def call(self, node: fx.Node) -> Any:
        if node.target is expert_call:
            raise CaptureError(
                "the block uses an expert's output in a way that is no weighted sum over choices"
            )
        if node.target is not _LEAF:
            return super().call(node)
        x, routing, w = (self.value(self.env[a]) for a in node.args[:3])  # type: ignore[index]
        form = MATCHED[int(node.args[3])]  # type: ignore[arg-type]

        def weight(path: str) -> Value:
            return self.weight(path.replace("experts", self.list_name, 1).lstrip("."))

        return self.body.inline(self.b, x, routing, w, weight, form)


__all__ = ["capture_loop"]

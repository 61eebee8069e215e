"""Blocks that users write: a loop over a list of experts, with the routing in the block itself.

The block runs for real on random tokens under a recorder. Among the recorded values one looks for
the tokens, indices and weights with which ``sum_k w[t, k] * expert[idx[t, k]](x[t])`` gives a
recorded value; the loop is then replaced by that sum, and the rest of the block (router before,
shared parts after) is imported as straight-line code. Two recordings at other sizes must agree, and
the result is compared with the block itself at several sizes before it is used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten

from moec.capture.block import _LEAF, MAX_TOKENS, CapturedBlock, block_name, weight_hint
from moec.capture.branches import refuse_size_branches
from moec.capture.constants import constant_value
from moec.capture.counts import hidden_sizes
from moec.capture.experts import ExpertsBody, integer_buffers, named_weights
from moec.capture.explained import Match, refuse_unexplained
from moec.capture.forms import as_indices
from moec.capture.importer import Importer
from moec.capture.lists import expert_list
from moec.capture.reading import ExpertGroups, read_experts
from moec.capture.recorder import ConstantPair, IntegerPair, Recorder, Sizes, merge
from moec.capture.replace import MATCHED, replace_loop, restore_loop
from moec.capture.requirements import raised_at
from moec.capture.routes import Search, Values, called_on, explains
from moec.capture.stacks import Part, collapse, cuts, stacked_experts, template
from moec.errors import CaptureError, NotRunError
from moec.ir.builder import Builder
from moec.ir.graph import Value
from moec.ir.types import Type, dtype_name

aten = torch.ops.aten
_MOST_TRIES = 200
_SIZES = {3: {"B": (3, 5), "S": (7, 11)}, 2: {"T": (23, 29)}}


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


@dataclass(frozen=True)
class _Run:
    """One recording of the block: its trace, its result, and the values of its nodes."""

    recorder: Recorder
    out: Any
    tokens: int

    def nodes(self, floating: bool, width: int | None = None) -> Iterator[fx.Node]:
        """Recorded values with one row a token: ``[.., width]``."""
        for node in self.recorder.graph.nodes:
            value = node.meta.get("val")
            if (
                not isinstance(value, torch.Tensor)
                or value.is_floating_point() != floating
                or value.dtype == torch.bool
            ):
                continue
            columns = value.shape[-1] if value.dim() > 1 else 1
            if (
                value.numel() == self.tokens * columns
                and value.dim() >= 1
                and width in (None, columns)
            ):
                yield node


def capture_loop(
    module: nn.Module, path: str, dtype: torch.dtype | None, rank: int
) -> CapturedBlock:
    """The IR of a block with its own loop over a list of experts; :class:`CaptureError` says why if
    there is none.
    """
    refuse_size_branches(module)
    sizes = Sizes(_SIZES[rank])
    leading = [tuple(pair[i] for pair in sizes.pairs.values()) for i in (0, 1)]
    found = expert_list(module)
    if found is None:
        return _capture_stacked(module, path, dtype, leading, sizes)
    name, members = found
    registry = module.get_submodule(name)
    body = read_experts(_Loop(members, registry), f"{path}.{name}" if path else name)
    runs = [_run(module, name, members, body.hidden, dtype, sizes_) for sizes_ in leading]
    return _captured(module, name, path, runs, members, body, sizes)


def _captured(
    module: nn.Module,
    name: str,
    path: str,
    runs: Sequence[_Run],
    members: Sequence[nn.Module],
    body: ExpertsBody | ExpertGroups,
    sizes: Sizes,
) -> CapturedBlock:
    graph = _merged(module, runs, members, sizes)
    tree = tree_flatten(runs[0].out)[1]
    return _LoopImporter(module, name, body, sizes, path).run(graph, runs[0], tree)


def _capture_stacked(
    module: nn.Module,
    path: str,
    dtype: torch.dtype | None,
    leading: Sequence[tuple[int, ...]],
    sizes: Sizes,
) -> CapturedBlock:
    """A block that loops over stacked weights of its own."""
    experts = stacked_experts(module)
    if experts is None:
        raise CaptureError(f"{type(module).__name__} holds no list of equal experts")
    hidden = _width(module, dtype, leading[0])
    runs = [_run(module, None, (), hidden, dtype, sizes_) for sizes_ in leading]
    parts = [cuts(run.recorder, experts) for run in runs]
    known = {size for p in module.parameters() for size in p.shape}
    one = template([*parts[0], *parts[1]], known)
    members = [Part(module, one, expert) for expert in range(experts)]
    body = read_experts(_Loop(members, module), path)
    for run, found in zip(runs, parts, strict=True):
        for cut in found:
            collapse(run.recorder, cut, _expert_call)
    return _captured(module, "", path, runs, members, body, sizes)


def _width(module: nn.Module, dtype: torch.dtype | None, leading: tuple[int, ...]) -> int:
    """The width of tokens with which a block runs."""
    reasons = []
    for hidden in hidden_sizes(module):
        try:
            _run(module, None, (), hidden, dtype, leading)
        except NotRunError as error:
            reasons.append(str(error))
        else:
            return hidden
    raise NotRunError("; ".join(reasons[:1]) or f"{type(module).__name__} has no weights")


def _run(
    module: nn.Module,
    name: str | None,
    members: Sequence[nn.Module],
    hidden: int,
    dtype: torch.dtype | None,
    leading: tuple[int, ...],
) -> _Run:
    parameter = next(module.parameters())
    generator = torch.Generator().manual_seed(sum(leading))
    x = torch.randn(*leading, hidden, generator=generator).to(
        parameter.device, dtype or parameter.dtype
    )
    recorder = Recorder(creations=True)
    recorder.mark("x", x)
    for weight, tensor in (*named_weights(module), *integer_buffers(module)):
        if name is None or not weight.startswith(f"{name}."):
            recorder.mark(weight, tensor)
    state = torch.get_rng_state()
    try:
        seen = _opaque_members(members, recorder)
        with torch.no_grad(), seen, recorder, recorder.watching():
            out = module(x)
    except CaptureError:
        raise
    except (
        Exception
    ) as error:  # the user's code may raise anything on inputs that it was not written for
        raise NotRunError(
            f"{type(module).__name__} did not run on tokens of shape {tuple(x.shape)}: "
            f"{raised_at(error)}"
        ) from error
    finally:
        torch.set_rng_state(state)
    return _Run(recorder, out, x[..., 0].numel())


def _expert_call(x: torch.Tensor, expert: int) -> torch.Tensor:
    """Stands for a call of an expert in a recording; never run."""
    raise NotImplementedError


@contextlib.contextmanager
def _opaque_members(members: Sequence[nn.Module], recorder: Recorder) -> Iterator[None]:
    """Within the context each expert is one recorded call."""

    def replacement(number: int, expert: nn.Module) -> Any:
        def forward(rows: torch.Tensor) -> torch.Tensor:
            with _disable_current_modes(), torch.no_grad():
                out = type(expert).forward(expert, rows)
            out = out.clone() if out is rows else out  # an expert may give the token itself
            return recorder.opaque(_expert_call, (rows, number), out)

        return forward

    for number, expert in enumerate(members):
        expert.__dict__["forward"] = replacement(number, expert)
    try:
        yield
    finally:
        for expert in members:
            del expert.__dict__["forward"]


def _merged(
    module: nn.Module, runs: Sequence[_Run], members: Sequence[nn.Module], sizes: Sizes
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
    module: nn.Module, run: _Run, members: Sequence[nn.Module], reasons: list[str]
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


def _matches(run: _Run, members: Sequence[nn.Module]) -> Iterator[Match]:
    """Every choice of tokens and routing whose weighted sum of expert outputs is a recorded
    value.
    """
    nodes = list(run.recorder.graph.nodes)
    calls = [n for n in nodes if n.target is _expert_call]
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


def _results(run: _Run, behind: Mapping[fx.Node, int], width: int) -> Iterator[fx.Node]:
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

    def run(self, graph: fx.Graph, first: _Run, tree: Any) -> CapturedBlock:  # type: ignore[override]
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
        if node.target is _expert_call:
            raise CaptureError(
                "the block uses an expert's output in a way that is no weighted sum over choices"
            )
        if node.target is not _LEAF:
            return super().call(node)
        x, routing, w = (self.value(self.env[a]) for a in node.args[:3])  # type: ignore[index]
        form = MATCHED[int(node.args[3])]  # type: ignore[arg-type]
        idx, w = as_indices(self.b, form, routing, w, self.body.experts)
        return self.body.inline(
            self.b,
            x,
            idx,
            w,
            lambda p: self.weight(p.replace("experts", self.list_name, 1).lstrip(".")),
        )


__all__ = ["capture_loop"]

"""Blocks that users write: a loop over a list of experts, with the routing in the block itself.

The block runs for real on random tokens under a recorder. Among the recorded values one looks for
the tokens, indices and weights with which ``sum_k w[t, k] * expert[idx[t, k]](x[t])`` gives a
recorded value; the loop is then replaced by that sum, and the rest of the block (router before,
shared parts after) is imported as straight-line code. Two recordings at other sizes must agree, and
the result is compared with the block itself at several sizes before it is used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten

from moec.capture.block import _LEAF, MAX_TOKENS, CapturedBlock, block_name, weight_hint
from moec.capture.branches import refuse_size_branches
from moec.capture.experts import (
    ExpertsBody,
    hidden_sizes,
    integer_buffers,
    named_weights,
    read_experts,
)
from moec.capture.explained import Match, refuse_unexplained
from moec.capture.importer import Importer
from moec.capture.recorder import IntegerPair, Recorder, Sizes, merge
from moec.errors import CaptureError, NotRunError
from moec.ir.builder import Builder
from moec.ir.graph import Value
from moec.ir.types import Type, dtype_name
from moec.structure import structure_key

aten = torch.ops.aten
_SIZES = {3: {"B": (3, 5), "S": (7, 11)}, 2: {"T": (23, 29)}}
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def expert_list(module: nn.Module) -> tuple[str, list[nn.Module]] | None:
    """The name and members of a child that is a list of at least two experts of one structure."""
    for name, child in module.named_children():
        if not isinstance(child, nn.ModuleList | nn.ModuleDict) or len(child) < 2:
            continue
        members = list(child.values() if isinstance(child, nn.ModuleDict) else child)
        if _are_experts(members) and _has_router(module, name, len(members)):
            return name, members
    return None


def has_expert_list(module: nn.Module) -> bool:
    """Whether a module holds a list of experts itself and something that scores them."""
    return expert_list(module) is not None


def _are_experts(members: Sequence[nn.Module]) -> bool:
    simple = not any(
        isinstance(m, nn.ModuleList | nn.ModuleDict) for member in members for m in member.modules()
    )
    return (
        simple
        and any(True for _ in members[0].parameters())
        and len({structure_key(m) for m in members}) == 1
    )


def _has_router(module: nn.Module, experts: str, count: int) -> bool:
    outside = (p for n, p in module.named_parameters() if not n.startswith(f"{experts}."))
    return any(p.dim() == 2 and count in p.shape for p in outside)


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
    found = expert_list(module)
    if found is None:
        raise CaptureError(f"{type(module).__name__} holds no list of equal experts")
    refuse_size_branches(module)
    name, members = found
    registry = module.get_submodule(name)
    body = read_experts(_Loop(members, registry), f"{path}.{name}" if path else name)
    sizes = Sizes(_SIZES[rank])
    runs = [
        _run(module, name, members, body.hidden, dtype, tuple(p[i] for p in sizes.pairs.values()))
        for i in (0, 1)
    ]
    graph = _merged(module, runs, members, sizes)
    tree = tree_flatten(runs[0].out)[1]
    return _LoopImporter(module, name, body, sizes, path).run(graph, runs[0], tree)


def _run(
    module: nn.Module,
    name: str,
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
    recorder = Recorder()
    recorder.mark("x", x)
    for weight, tensor in (*named_weights(module), *integer_buffers(module)):
        if not weight.startswith(f"{name}."):
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
            f"{type(module).__name__} did not run on tokens of shape {tuple(x.shape)}: {error}"
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
    matches = [_explained(module, run, members) for run in runs]
    reason = "no tokens, indices and weights of the block explain what its loop computes"
    for pair in product(*matches):
        try:
            for run, match in zip(runs, pair, strict=True):
                _replace_loop(run, match)
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
                _undo(run, match)
    raise CaptureError(reason)


def _explained(module: nn.Module, run: _Run, members: Sequence[nn.Module]) -> list[Match]:
    """The matches of a run that explain all that the loop does; the last refusal if none does."""
    found, refusal = [], None
    for match in _matches(run, members):
        try:
            refuse_unexplained(module, run.recorder.reads, match)
            found.append(match)
        except CaptureError as error:
            refusal = error
    if refusal is not None and not found:
        raise refusal
    return found


def _matches(run: _Run, members: Sequence[nn.Module]) -> Iterator[Match]:
    """Every choice of tokens, indices and weights whose weighted sum of expert outputs is a
    recorded value.
    """
    experts = len(members)
    indices = [n for n in run.nodes(False) if _are_indices(n.meta["val"], experts, run.tokens)]
    for x in run.nodes(True):
        outputs = _dense_outputs(members, x.meta["val"], run.tokens)
        if outputs is None:
            continue
        for idx in indices:
            choices = idx.meta["val"].numel() // run.tokens
            for w in run.nodes(True, choices):
                yield from _results(
                    run, x, idx, w, _weighted(outputs, idx.meta["val"], w.meta["val"], run.tokens)
                )


def _are_indices(value: torch.Tensor, experts: int, tokens: int) -> bool:
    rows = value.reshape(tokens, -1)
    if (
        rows.shape[1] > experts
        or rows.numel() == 0
        or int(rows.min()) < 0
        or int(rows.max()) >= experts
    ):
        return False
    return all(len(set(row)) == len(row) for row in rows.tolist())


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


def _weighted(
    outputs: torch.Tensor, idx: torch.Tensor, w: torch.Tensor, tokens: int
) -> torch.Tensor:
    token = torch.arange(tokens, device=outputs.device)[:, None]
    chosen = outputs[idx.reshape(tokens, -1), token]
    return (chosen.double() * w.reshape(tokens, -1, 1).double()).sum(1)


def _results(
    run: _Run, x: fx.Node, idx: fx.Node, w: fx.Node, expected: torch.Tensor
) -> Iterator[Match]:
    # The last first: a sum that grows in place has the final values in every recorded step.
    for node in reversed(list(run.nodes(True, expected.shape[-1]))):
        value = node.meta["val"].reshape(expected.shape)
        if _close(value, expected):
            yield Match(x, idx, w, node)


def _close(value: torch.Tensor, expected: torch.Tensor) -> bool:
    error = (value.double() - expected.double()).norm()
    return bool(
        error <= _TOLERANCE.get(value.dtype, 1e-4) * expected.double().norm().clamp(min=1e-30)
    )


def _replace_loop(run: _Run, match: Match) -> None:
    """Put the opaque op in place of the loop's result."""
    graph, tokens = run.recorder.graph, run.tokens
    with graph.inserting_after(list(graph.nodes)[-1]):
        operands = [_as_matrix(graph, node, tokens) for node in (match.x, match.idx, match.w)]
    leaf = graph.call_function(_LEAF, tuple(operands))
    value = match.result.meta["val"]
    leaf.meta.update(val=value.reshape(tokens, -1), location=match.result.meta.get("location"))
    result = leaf if value.dim() == 2 else _view(graph, leaf, value)
    match.result.meta["replaced"] = result
    for user in list(match.result.users):
        if user not in (leaf, result, *operands):
            user.replace_input_with(match.result, result)
    run.recorder.nodes.update(
        {k: result for k, n in run.recorder.nodes.items() if n is match.result}
    )


def _undo(run: _Run, match: Match) -> None:
    result = match.result.meta.pop("replaced", None)
    if result is None:
        return
    result.replace_all_uses_with(match.result)
    run.recorder.nodes.update(
        {k: match.result for k, n in run.recorder.nodes.items() if n is result}
    )


def _as_matrix(graph: fx.Graph, node: fx.Node, tokens: int) -> fx.Node:
    value = node.meta["val"]
    return node if value.dim() == 2 else _view(graph, node, value.reshape(tokens, -1))


def _view(graph: fx.Graph, node: fx.Node, like: torch.Tensor) -> fx.Node:
    view = graph.call_function(aten.view.default, (node, list(like.shape)))
    view.meta.update(val=like, location=node.meta.get("location"))
    return view


class _LoopImporter(Importer):
    """Imports the merged recording of a block."""

    def __init__(
        self, module: nn.Module, name: str, body: ExpertsBody, sizes: Sizes, path: str
    ) -> None:
        builder = Builder({n: (0, MAX_TOKENS) for n in sizes.pairs})
        super().__init__(builder, lambda node: node.meta["shape"], self.size, module_path=path)
        self.list_name, self.body, self.sizes = name, body, sizes
        self.tensors = dict(named_weights(module))
        self.weights: dict[str, Value] = {}
        self.block = module

    def size(self, argument: Any) -> Any:
        return (
            self.sizes.dim(argument.first, argument.second)
            if isinstance(argument, IntegerPair)
            else argument
        )

    def argument(self, argument: Any) -> Any:
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
        if path not in self.tensors:
            raise CaptureError(f"{type(self.block).__name__} reads the integer buffer {path}")
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
        x, idx, w = (self.value(self.env[a]) for a in node.args)  # type: ignore[index]
        return self.body.inline(
            self.b, x, idx, w, lambda p: self.weight(p.replace("experts", self.list_name, 1))
        )


__all__ = ["capture_loop", "expert_list", "has_expert_list"]

"""Capturing a MoE block: ``torch.export`` with the experts as one opaque op, then FX to IR.

The exported program has one graph for every batch and sequence length; the opaque op is replaced by
the experts' body, so nothing in the result depends on data.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim as ExportDim

from moec.call_form import CallForm, TensorForm, parameters
from moec.capture.conversions import idle_conversions
from moec.capture.experts import ExpertsBody
from moec.capture.importer import Importer
from moec.capture.open_sizes import open_sizes
from moec.capture.reading import ExpertGroups
from moec.capture.requirements import SizeGuard, size_guards
from moec.capture.size_guards import doubtful_sizes
from moec.capture.sizes import dim_of_expression
from moec.capture.wrappers import experts_arguments, forward_replaced
from moec.errors import CaptureError
from moec.ir import dims
from moec.ir.builder import Builder
from moec.ir.dims import Dim
from moec.ir.graph import Graph, Value
from moec.ir.types import Type, dtype_name

_LIBRARY = torch.library.Library("moec_capture", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define("experts(Tensor x, Tensor idx, Tensor w) -> Tensor")  # type: ignore[no-untyped-call]
_LEAF = torch.ops.moec_capture.experts.default
MAX_TOKENS = 2**31 - 1


@torch.library.impl(_LIBRARY, "experts", "CompositeExplicitAutograd")
def _experts(x: torch.Tensor, idx: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("moec_capture::experts", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _experts_fake(x: torch.Tensor, idx: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@dataclass(frozen=True)
class CapturedBlock:
    """A block's IR. ``weights`` are the parameter paths of the graph's inputs after the tokens.

    ``tree`` is the structure of the module's result, ``constants`` its leaves that are no tensors,
    by place; ``doubtful`` are sizes of the token axes that the tracer left out, to be compared with
    the module.
    """

    graph: Graph
    weights: tuple[str, ...]
    tree: Any
    constants: tuple[tuple[int, Any], ...] = ()
    doubtful: tuple[tuple[int, ...], ...] = ()


@contextlib.contextmanager
def opaque_experts(experts: nn.Module) -> Iterator[None]:
    """Within the context, ``experts(x, idx, w)`` is one opaque op."""

    def leaf(*args: Any, **kwargs: Any) -> torch.Tensor:
        x, idx, w = experts_arguments(experts, args, kwargs)
        result: torch.Tensor = _LEAF(x, idx, w)
        return result

    with forward_replaced(experts, leaf):
        yield


def capture_block(
    block: nn.Module,
    body: ExpertsBody | ExpertGroups,
    experts_path: str,
    data: Sequence[torch.Tensor],
    form: CallForm,
    path: str,
) -> CapturedBlock:
    """The IR of a block that is called with tokens ``[..., H]`` and what ``form`` says.

    ``data`` are examples on the block's device in the call's dtypes; the tokens' leading axes
    become dims. Raises :class:`CaptureError` where the block does something that has no IR form.
    """
    names = ("B", "S") if data[0].dim() == 3 else ("T",)
    experts = block.get_submodule(experts_path)
    with opaque_experts(experts), idle_conversions(block), open_sizes(block):
        exported, guards = _exported(block, data, form)
    importer = _ExpertsImporter(exported, names, path, body, experts_path, block, form)
    importer.guards = guards
    captured = importer.run(block)
    return replace(captured, doubtful=doubtful_sizes(guards, importer.symbols, names))


def _first_parameter(block: nn.Module) -> str:
    names, _ = parameters(type(block))
    return names[0] if names else "x"


def _open_axes(tensor: TensorForm, leading: int) -> int:
    """How many of an exported tensor's first axes are the tokens' leading ones."""
    return len(tensor.open_shape(range(leading))) - len(tensor.rest)


class _Adapter(nn.Module):
    """A block called with a list of tensors, each with the tokens' leading axes where it has
    any.
    """

    def __init__(self, block: nn.Module, form: CallForm) -> None:
        super().__init__()
        self.block, self.form = block, form

    def forward(self, data: list[torch.Tensor]) -> Any:
        lead = data[0].shape[:-1]
        shaped = [
            t.reshape(-1, *f.rest) if f.leading == "flat" and len(lead) > 1 else t
            for f, t in zip(self.form.tensors, data[1:], strict=True)
        ]
        return self.form.call(self.block, [data[0], *shaped])


_PREFIX = "block."


def _exported(
    block: nn.Module, data: Sequence[torch.Tensor], form: CallForm
) -> tuple[Any, tuple[SizeGuard, ...]]:
    lead = data[0].shape[:-1]
    opened = [t.reshape(f.open_shape(lead)) for f, t in zip(form.tensors, data[1:], strict=True)]
    axes = [len(lead), *(_open_axes(f, len(lead)) for f in form.tensors)]
    dynamic = [{i: ExportDim.DYNAMIC for i in range(n)} for n in axes]
    return export(_Adapter(block, form), ([data[0], *opened],), (dynamic,), block)


def export(
    called: nn.Module,
    arguments: tuple[Any, ...],
    dynamic: tuple[Any, ...],
    block: nn.Module,
    *,
    strict: bool = False,
) -> tuple[Any, tuple[SizeGuard, ...]]:
    """The exported program of a block, and what the tracer took for granted of its sizes.

    ``called`` is the block or a module around it; ``dynamic`` names the free axes of each argument.
    Raises :class:`CaptureError` with the first line of what the tracer says.
    """
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        # A call may come while a model is traced: that trace gets no guards of this one.
        with warnings.catch_warnings(), torch._guards.tracing(None):
            warnings.simplefilter("ignore")  # the tracer warns about its own internals
            exported = torch.export.export(called, arguments, dynamic_shapes=dynamic, strict=strict)
            guards = size_guards(exported)  # what comes later checks these, in a form of its own
            return exported.run_decompositions({}), guards
    except (
        Exception
    ) as error:  # the tracer raises errors of many kinds; all mean "cannot be captured"
        first = next(
            (line for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise CaptureError(f"torch.export refused {type(block).__name__}: {first}") from error
    finally:
        logger.setLevel(level)


class ExportImporter:
    """Imports an exported program; inputs become the data, then the parameters that are used.

    ``prefix`` is the path of the block in the exported module; ``guards`` are what the tracer took
    for granted of its sizes.
    """

    prefix = ""
    guards: Sequence[SizeGuard] = ()

    def __init__(self, exported: Any, names: Sequence[str], path: str) -> None:
        self.exported, self.names, self.path = exported, names, path
        self.builder = Builder({n: (0, MAX_TOKENS) for n in names})
        self.data: list[Value] = []
        self.weights: dict[str, Value] = {}
        self.symbols: dict[Any, Dim] = {}

    def bind_inputs(self, importer: Importer, graph: fx.Graph) -> None:
        """Make each input of the program a value: a parameter, or an argument of the call."""
        signature = self.exported.graph_signature
        paths = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        if signature.buffers_to_mutate or signature.inputs_to_lifted_tensor_constants:
            raise CaptureError("the block changes a buffer or builds a constant tensor in forward")
        if signature.user_inputs_to_mutate:
            raise CaptureError("the block changes its input in place")
        for node in graph.nodes:
            if node.op != "placeholder":
                continue
            if node.name in paths:
                path = paths[node.name].removeprefix(self.prefix)
                importer.env[node] = self.weight(path, node.meta["val"])
            else:
                importer.env[node] = self.argument(node)
        if not self.data:
            raise CaptureError("the block takes no tensor")

    def argument(self, node: fx.Node) -> Value:
        """An argument of the call, in order: the tokens."""
        if self.data:
            raise CaptureError("the block takes more than tokens")
        self.data.append(self.tensor(node, len(self.names), node.name))
        return self.data[-1]

    def tensor(self, node: fx.Node, leading: int, hint: str) -> Value:
        """A tensor of the call; its first axes are the tokens' leading axes."""
        value = node.meta["val"]
        for name, size in zip(self.names[:leading], value.shape, strict=False):
            if isinstance(size, int):
                raise CaptureError(f"the block works for {name} = {size} only")
            self.symbols[size.node.expr] = dims.dim(name)
        return Value(Type(dtype_name(value.dtype), tuple(map(self.size, value.shape))), hint)

    def weight(self, path: str, tensor: torch.Tensor) -> Value:
        if path not in self.weights:
            type_ = Type(dtype_name(tensor.dtype), tuple(int(s) for s in tensor.shape))
            self.weights[path] = Value(type_, weight_hint(path))
        return self.weights[path]

    def check_ranges(self) -> None:
        for symbol, interval in self.exported.range_constraints.items():
            upper = getattr(interval, "upper", None)
            bounded = upper is not None and upper.is_Integer and int(upper) < MAX_TOKENS
            if symbol in self.symbols and (int(interval.lower) > 2 or bounded):
                asked = next((g for g in self.guards if symbol in g.condition.free_symbols), None)
                least = f"{interval.lower} <= " if interval.lower > 2 else ""  # 2 is the tracer's
                most = f" <= {upper}" if bounded else ""
                raise CaptureError(
                    asked.text(self.symbols)
                    if asked is not None
                    else f"the block works only where {least}{self.symbols[symbol]}{most}"
                )

    def shape(self, node: fx.Node) -> tuple[Dim, ...]:
        return tuple(map(self.size, node.meta["val"].shape))

    def size(self, argument: Any) -> Dim:
        """A tracer's size as a dim over the names of the token axes."""
        if isinstance(argument, fx.Node):
            argument = argument.meta["val"]
        if isinstance(argument, int):
            return argument
        if not isinstance(argument, torch.SymInt):
            raise CaptureError(f"{argument!r} is no size")
        return self.dim(argument.node.expr)

    def dim(self, expression: Any) -> Dim:
        """A tracer's expression of sizes as a dim."""
        return dim_of_expression(expression, self.symbols)


class _ExpertsImporter(ExportImporter):
    """Imports a block whose experts are one opaque op."""

    prefix = _PREFIX

    def __init__(
        self,
        exported: Any,
        names: Sequence[str],
        path: str,
        body: ExpertsBody | ExpertGroups,
        experts_path: str,
        block: nn.Module,
        form: CallForm,
    ) -> None:
        super().__init__(exported, names, path)
        self.body, self.experts_path = body, experts_path
        self.leading = [len(names), *(_open_axes(t, len(names)) for t in form.tensors)]
        self.hints = [form.tokens or _first_parameter(block), *(t.name for t in form.tensors)]

    def run(self, block: nn.Module) -> CapturedBlock:
        graph: fx.Graph = self.exported.graph
        tensors = {**dict(block.named_parameters()), **dict(block.named_buffers())}
        importer = _BlockImporter(self, tensors)
        self.bind_inputs(importer, graph)
        self.check_ranges()
        importer.run(graph)
        output = next(n for n in graph.nodes if n.op == "output")
        leaves: Any = output.args[0]
        results = [importer.value(importer.env[n]) for n in leaves if isinstance(n, fx.Node)]
        constants = tuple((i, n) for i, n in enumerate(leaves) if not isinstance(n, fx.Node))
        graph_ = self.builder.graph(
            block_name(self.path, block), [*self.data, *self.weights.values()], results
        )
        tree = self.exported.call_spec.out_spec
        return CapturedBlock(graph_, tuple(self.weights), tree, constants)

    def argument(self, node: fx.Node) -> Value:
        """An argument of the call, in order: its first axes are the tokens' leading axes."""
        place = len(self.data)
        self.data.append(self.tensor(node, self.leading[place], self.hints[place]))
        return self.data[-1]

    def expert_weight(self, path: str, tensors: dict[str, torch.Tensor]) -> Value:
        full = f"{self.experts_path}.{path}" if self.experts_path else path
        return self.weight(full, tensors[full])


class _BlockImporter(Importer):
    """Imports the block's ops; the opaque op becomes the experts' body."""

    def __init__(self, owner: _ExpertsImporter, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__(owner.builder, owner.shape, owner.size, module_path=owner.path)
        self.owner, self.tensors = owner, tensors

    def call(self, node: fx.Node) -> Any:
        if node.target is not _LEAF:
            return super().call(node)
        x, idx, w = (self.value(self.env[a]) for a in node.args)  # type: ignore[index]
        return self.owner.body.inline(
            self.b, x, idx, w, lambda p: self.owner.expert_weight(p, self.tensors)
        )


def weight_hint(path: str) -> str:
    """A short name for a parameter: the last two parts of its path, without ``weight``."""
    parts = [p for p in path.split(".") if p != "weight"]
    return "_".join(parts[-2:]) or path


def block_name(path: str, block: nn.Module) -> str:
    """A name for a block's graph: its class."""
    return "".join(c if c.isalnum() else "_" for c in type(block).__name__)

"""Capturing a MoE block: ``torch.export`` with the experts as one opaque op, then FX to IR.

The exported program has one graph for every batch and sequence length; the opaque op is replaced by
the experts' body, so nothing in the result depends on data.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim as ExportDim

from moec.capture.experts import ExpertsBody
from moec.capture.importer import Importer
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

    ``tree`` is the structure of the module's result; ``doubtful`` are sizes of the token axes that
    the tracer left out, to be compared with the module.
    """

    graph: Graph
    weights: tuple[str, ...]
    tree: Any
    doubtful: tuple[tuple[int, ...], ...] = ()


@contextlib.contextmanager
def opaque_experts(experts: nn.Module) -> Iterator[None]:
    """Within the context, ``experts(x, idx, w)`` is one opaque op."""
    signature = inspect.signature(inspect.unwrap(type(experts).forward))

    def leaf(*args: Any, **kwargs: Any) -> torch.Tensor:
        bound = signature.bind(experts, *args, **kwargs)
        x, idx, w = list(bound.arguments.values())[1:4]
        result: torch.Tensor = _LEAF(x, idx, w)
        return result

    saved = experts.__dict__.get("forward")
    experts.__dict__["forward"] = leaf
    try:
        yield
    finally:
        if saved is None:
            del experts.__dict__["forward"]
        else:
            experts.__dict__["forward"] = saved


def capture_block(
    block: nn.Module, body: ExpertsBody, experts_path: str, tokens: torch.Tensor, path: str
) -> CapturedBlock:
    """The IR of a block that is called with tokens ``[..., H]`` alone.

    ``tokens`` is an example on the block's device in the call's dtype; its leading axes become
    dims. Raises :class:`CaptureError` where the block does something that has no IR form.
    """
    names = ("B", "S") if tokens.dim() == 3 else ("T",)
    experts = block.get_submodule(experts_path)
    with opaque_experts(experts):
        dynamic = {i: ExportDim.DYNAMIC for i in range(len(names))}
        exported, _ = export(block, (tokens,), (dynamic,))
    importer = _ExpertsImporter(exported, names, path, body, experts_path)
    return importer.run(block)


def export(
    block: nn.Module,
    arguments: tuple[torch.Tensor, ...],
    dynamic: tuple[dict[int, Any], ...],
    *,
    strict: bool = False,
) -> tuple[Any, tuple[Any, ...]]:
    """The exported program of a block, and what the tracer took for granted of its sizes;
    ``dynamic`` names the free axes of each argument.

    Raises :class:`CaptureError` with the first line of what the tracer says.
    """
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer warns about its own internals
            exported = torch.export.export(block, arguments, dynamic_shapes=dynamic, strict=strict)
            guards = _guards(exported)  # what comes later checks these, in a form of its own
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


def _guards(exported: Any) -> tuple[Any, ...]:
    """Conditions on the sizes that hold for the example and were relied on."""
    for node in exported.graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None and mode.shape_env is not None:
            return tuple(guard.expr for guard in mode.shape_env.guards)
    return ()


class ExportImporter:
    """Imports an exported program; inputs become the data, then the parameters that are used."""

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
        for node in graph.nodes:
            if node.op != "placeholder":
                continue
            if node.name in paths:
                importer.env[node] = self.weight(paths[node.name], node.meta["val"])
            else:
                importer.env[node] = self.argument(node)
        if not self.data:
            raise CaptureError("the block takes no tensor")

    def argument(self, node: fx.Node) -> Value:
        """An argument of the call: the tokens."""
        if self.data:
            raise CaptureError("the block takes more than tokens")
        self.data.append(self.tokens(node))
        return self.data[0]

    def tokens(self, node: fx.Node) -> Value:
        value = node.meta["val"]
        for name, size in zip(self.names, value.shape, strict=False):
            if isinstance(size, int):
                raise CaptureError(f"the block works for {name} = {size} only")
            self.symbols[size.node.expr] = dims.dim(name)
        return Value(Type(dtype_name(value.dtype), tuple(map(self.size, value.shape))), node.name)

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
                raise CaptureError(f"the block works for sizes in [{interval.lower}, {upper}] only")

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
        expression = argument.node.expr
        unknown = expression.free_symbols - self.symbols.keys()
        if unknown or any(
            f.__module__.startswith("torch")
            for f in (type(a) for a in expression.atoms(*()) | {expression})
        ):
            raise CaptureError(f"the size {expression} is no sum of products of token axes")
        return dims.canon(expression.xreplace(self.symbols))


class _ExpertsImporter(ExportImporter):
    """Imports a block whose experts are one opaque op."""

    def __init__(
        self, exported: Any, names: Sequence[str], path: str, body: ExpertsBody, experts_path: str
    ) -> None:
        super().__init__(exported, names, path)
        self.body, self.experts_path = body, experts_path

    def run(self, block: nn.Module) -> CapturedBlock:
        graph: fx.Graph = self.exported.graph
        tensors = {**dict(block.named_parameters()), **dict(block.named_buffers())}
        importer = _BlockImporter(self, tensors)
        self.bind_inputs(importer, graph)
        self.check_ranges()
        importer.run(graph)
        output = next(n for n in graph.nodes if n.op == "output")
        results = [importer.value(importer.env[n]) for n in output.args[0]]
        graph_ = self.builder.graph(
            block_name(self.path, block), [*self.data, *self.weights.values()], results
        )
        return CapturedBlock(graph_, tuple(self.weights), self.exported.call_spec.out_spec)

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

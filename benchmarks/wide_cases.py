"""The cases of :mod:`benchmarks.wide_index`: blocks whose tensors have more than 2^31 elements.

Each runs in a process of its own. What a kernel does beyond 2^31 is compared with the same work in
parts that stay below: calls of fewer tokens, or blocks of a few of the experts. Routers read their
scores off the tokens' first columns, so that no rounding sends a token elsewhere in a part.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.emitted_check import Shape, block_graph, relative
from moec import interp
from moec.codegen.triton.routing import most_few_tokens
from moec.fuzz.blocks import Options
from moec.fuzz.blocks import build as build_options
from moec.ir import Builder, Graph, Type, Value, dim
from moec.ir.dims import evaluate
from moec.ir.types import DTYPES
from moec.manager import PassManager
from moec.pipeline import pipeline
from moec.runtime.artifact import Artifact, build

WORD = 2**31
SAME, CLOSE = 1e-3, 2e-2  # relative errors: of equal work in parts, of sums in another order
# template -> descriptors, Gluon
TEMPLATES = {"pointer": (False, False), "tma": (True, False), "gluon": (True, True)}
Tensors = list[torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Result:
    """One tensor: how many elements the wide run's has, and how far it is from that of the parts.

    ``differ`` are elements that differ in any bit, where both do the same work; ``kernels`` the
    templates of the products and how many have them.
    """

    case: str
    what: str
    elements: int
    error: float
    limit: float
    differ: int = 0
    kernels: str = ""

    @property
    def right(self) -> bool:
        """Whether it is as near as it has to be; a NaN is not."""
        return self.error <= self.limit


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where a case runs, and whether in sizes for a machine without a GPU."""

    template: str
    device: str
    small: bool

    def size(self, wide: int, small: int) -> int:
        """A size."""
        return small if self.small else wide

    def random(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Random numbers in bf16."""
        made = torch.randn(shape, device=self.device, dtype=torch.bfloat16)
        return made if scale == 1.0 else made.mul_(scale)


def compiled(graph: Graph, setting: Setting, training: bool = True) -> Artifact:
    """A block with the template that the setting asks for."""
    few = setting.template == "few"
    descriptors, gluon = TEMPLATES["pointer" if few else setting.template]
    text = pipeline("triton", training, descriptors, gluon=gluon)
    text += ", lower{few=true}" if few else ""
    if setting.small and not few:
        blocks = "block-m=16,block-n=32,block-k=16,block=32"
        text += f", lower{{descriptors={str(descriptors).lower()},{blocks}}}"
    manager = PassManager(text)
    return build(manager.run(graph), "triton", "wide", manager.history)


def run(made: Artifact, inputs: Sequence[torch.Tensor], dy: torch.Tensor | None) -> Tensors:
    """The output, then the gradients that exist."""
    outputs, saved = made.forward(*inputs)
    if made.backward is None or dy is None:
        return list(outputs)
    kept = [inputs[i] for i in made.backward_inputs]
    return [*outputs, *(g for g in made.backward([*kept, *saved, dy]) if g is not None)]


def named(made: Artifact) -> list[str]:
    """What :func:`run` returns."""
    graph = made.graph
    gradients = [
        f"d_{v.hint}" for v, g in zip(graph.inputs, graph.gradients, strict=False) if g is not None
    ]
    return ["y", *gradients]


def templates(made: Artifact) -> str:
    """Which products have which template."""
    kinds = (op.attrs.get("template", op.kind) for op in made.graph.ops)
    counts = Counter(str(k) for k in kinds if k in (*TEMPLATES, "kern.pointwise"))
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def one_hot_router(setting: Setting, experts: int, hidden: int) -> torch.Tensor:
    """A router whose logits are the first columns of the tokens, exactly."""
    router = torch.zeros(experts, hidden, device=setting.device, dtype=torch.bfloat16)
    router[:, :experts] = torch.eye(experts, device=setting.device, dtype=torch.bfloat16)
    return router


def inputs_of(graph: Graph, setting: Setting, tokens: int) -> Tensors:
    """Tokens, a router by columns, and weights such that values keep unit scale."""
    found = []
    for v in graph.inputs:
        shape = [d if isinstance(d, int) else tokens for d in v.type.shape]
        if v.hint == "router":
            found.append(one_hot_router(setting, shape[0], shape[1]))
        else:
            inner = shape[-1] if len(shape) == 3 else 1
            found.append(setting.random(*shape, scale=inner**-0.5).to(DTYPES[v.type.dtype]))
    return found


def by_tokens(case: str, graph: Graph, setting: Setting, tokens: int, part: int) -> Iterator[Any]:
    """One call of all tokens against calls of some: ``ready`` after the kernels are compiled."""
    made = compiled(graph, setting)
    dy = setting.random(64, int(graph.inputs[0].type.shape[1]))
    run(made, inputs_of(graph, setting, 64), dy)
    yield "ready"
    torch.manual_seed(0)
    inputs = inputs_of(graph, setting, tokens)
    dy = setting.random(*inputs[0].shape)
    wide = run(made, inputs, dy)
    rows = _largest(made, tokens)
    yield from _compared(case, made, wide, _in_parts(made, inputs, dy, part), rows)
    yield from _interpreted(case, made, inputs, dy, wide)


def _largest(made: Artifact, tokens: int) -> int:
    """The most elements of a tensor in the module."""
    values = [v for op in made.graph.ops for v in op.results]
    sizes = [v.type.elements for v in (*made.graph.inputs, *values)]
    return max(evaluate(s, {"T": tokens}) for s in sizes)


def _in_parts(
    made: Artifact, inputs: Tensors, dy: torch.Tensor, part: int
) -> Iterator[tuple[slice, Tensors]]:
    for first in range(0, len(dy), part):
        here = slice(first, min(first + part, len(dy)))
        yield here, run(made, [inputs[0][here].contiguous(), *inputs[1:]], dy[here].contiguous())


def _compared(
    case: str,
    made: Artifact,
    wide: Tensors,
    parts: Iterator[tuple[slice, Tensors]],
    elements: int,
) -> Iterator[Result]:
    """Rows of the output and of the tokens' gradient part by part, weights' gradients summed."""
    names, errors, differ = named(made), [0.0] * len(wide), [0] * len(wide)
    sums = [torch.zeros(()) for _ in wide]
    for here, found in parts:
        for i, (whole, one) in enumerate(zip(wide, found, strict=True)):
            if i < 2:
                errors[i] = _worse(errors[i], relative(whole[here], one.float()))
                differ[i] += int((whole[here] != one).sum())
            else:
                sums[i] = one.float() + sums[i].to(one.device)
    for i, (name, whole) in enumerate(zip(names, wide, strict=True)):
        if name == "d_router":  # PyTorch's own product
            continue
        error = errors[i] if i < 2 else relative(whole, sums[i])
        limit, most = SAME if i < 2 else CLOSE, max(whole.numel(), elements)
        yield Result(case, name, most, error, limit, differ[i], templates(made))


def _worse(a: float, b: float) -> float:
    """The larger error; NaN is the largest."""
    return b if not b <= a else a


def _interpreted(
    case: str, made: Artifact, inputs: Tensors, dy: torch.Tensor, wide: Tensors
) -> Iterator[Result]:
    """Some of the last tokens against the meaning of the graph, in float64 on the CPU."""
    experts = len(next(t for v, t in zip(made.graph.inputs, inputs, strict=False) if _routes(v)))
    last = _without_ties(inputs[0], experts)
    few = [t.cpu() for t in (inputs[0][last], *inputs[1:], dy[last])]
    expected = interp.run(made.graph, few, float64=True)
    for name, whole, exact in list(zip(named(made), wide, expected, strict=True))[:2]:
        error = relative(whole[last].cpu(), exact.float())
        what = f"{name}, last"
        yield Result(case, what, whole.numel(), error, CLOSE, kernels=templates(made))


def _routes(value: Value) -> bool:
    return value.hint == "router"


def _without_ties(x: torch.Tensor, experts: int, count: int = 8) -> torch.Tensor:
    """The last tokens whose best scores differ: torch.topk has no order for equal ones."""
    best = x[-16 * count :, :experts].float().topk(min(5, experts), sorted=True).values
    (differ,) = (best[:, 1:] < best[:, :-1]).all(1).nonzero(as_tuple=True)
    return differ[-count:] + max(0, len(x) - 16 * count)


# the cases
def rows(setting: Setting) -> Iterator[Any]:
    """Tokens times columns, rows times columns."""
    shape = Shape(*((32, 16, 4, 2) if setting.small else (2048, 1024, 16, 2)))
    tokens, part = setting.size(2**20 + 3000, 37), setting.size(2**16, 16)
    return by_tokens(f"rows, {setting.template}", block_graph(shape), setting, tokens, part)


def scores(setting: Setting) -> Iterator[Any]:
    """Tokens times experts."""
    shape = Shape(*((32, 16, 16, 2) if setting.small else (256, 32, 256, 2)))
    tokens, part = setting.size(2**23 + 2000, 37), setting.size(2**20, 16)
    return by_tokens(f"scores, {setting.template}", block_graph(shape), setting, tokens, part)


def biases(setting: Setting) -> Iterator[Any]:
    """Rows with a vector an expert, whose gradients are sums of rows."""
    sizes = (32, 16) if setting.small else (1024, 512)
    options = Options(
        experts=4 if setting.small else 16, hidden=sizes[0], inner=sizes[1], biases=True,
        norm="sum", dtype="bf16",
    )  # fmt: skip
    graph = build_options(options).graph
    graph = dataclasses.replace(graph, ranges={"T": (0, 2**24)})
    tokens, part = setting.size(2**20 + 3000, 37), setting.size(2**16, 16)
    return by_tokens(f"biases, {setting.template}", graph, setting, tokens, part)


def weights(setting: Setting) -> Iterator[Any]:
    """Experts times columns times depth, against blocks of eight of the experts."""
    hidden, inner, experts = (32, 16, 32) if setting.small else (2048, 2048, 528)
    few = setting.template == "few"
    group, most = 8, setting.size(64, 4)
    whole, some = Shape(hidden, inner, experts, 2), Shape(hidden, inner, group, 2)
    made = compiled(block_graph(whole), setting, training=not few)
    parts = compiled(block_graph(some), setting, training=not few)
    most = min(most, most_few_tokens(made.graph)) if few else most
    yield "ready"
    torch.manual_seed(0)
    inputs = inputs_of(block_graph(whole), setting, most * (experts // group))
    inputs[0][:, :experts] -= 6  # experts of other groups than a token's own
    for g in range(experts // group):
        inputs[0][g * most : (g + 1) * most, g * group : (g + 1) * group] += 6
    dy = setting.random(*inputs[0].shape)
    for here in _calls_of(few, len(dy), most):
        groups = _groups(here, most, _edges(whole))
        tokens = inputs[0][here].contiguous(), dy[here].contiguous()
        found = run(made, [tokens[0], *inputs[1:]], tokens[1]) if groups else []
        for g in groups:
            for result in _group(setting, parts, inputs, dy, found, here, g, most, group):
                yield dataclasses.replace(result, kernels=templates(made))


def _calls_of(few: bool, tokens: int, most: int) -> list[slice]:
    """All tokens at once, or as many as kernels for few tokens take."""
    return [slice(i, i + most) for i in range(0, tokens, most)] if few else [slice(0, tokens)]


def _edges(shape: Shape) -> set[int]:
    """Experts at the ends, and where offsets into the weights pass 2^31."""
    sizes = (2 * shape.inner * shape.hidden, shape.inner * shape.hidden)
    crossed = {WORD // size + i for size in sizes for i in (-1, 0)}
    return {0, shape.experts - 1, *(e for e in crossed if 0 <= e < shape.experts)}


def _groups(here: slice, most: int, experts: set[int]) -> list[int]:
    """The groups of eight in a call's tokens that hold one of the experts."""
    wanted = sorted({e // 8 for e in experts})
    return [g for g in wanted if here.start <= g * most < here.stop]


def _group(
    setting: Setting, parts: Artifact, inputs: Tensors, dy: torch.Tensor, found: Tensors,
    here: slice, g: int, most: int, group: int,
) -> Iterator[Result]:  # fmt: skip
    """One group of experts: its tokens' rows, and its weights' gradients."""
    tokens, own = slice(g * most, (g + 1) * most), slice(g * group, (g + 1) * group)
    own_weights = [w[own].contiguous() for w in inputs[1:]]
    one = run(parts, [inputs[0][tokens].contiguous(), *own_weights], dy[tokens].contiguous())
    inside = slice(tokens.start - here.start, tokens.stop - here.start)
    for name, whole, expected in zip(named(parts), found, one, strict=True):
        if name == "d_router":
            continue
        part = whole[inside] if name in ("y", "d_x") else whole[own]
        elements = max(w.numel() for w in inputs)
        case = f"weights, {setting.template}"
        error = relative(part, expected.float())
        yield Result(case, f"{name}, experts {own.start} on", elements, error, CLOSE)


def pointwise(setting: Setting) -> Iterator[Any]:
    """Work on all elements of a tensor, with and without a mask at its end."""
    for columns in (4096, 4100):
        b, tokens = Builder({"T": (0, 2**24)}), setting.size(2**19 + 1000, 37)
        width = setting.size(columns, columns - 4064)
        x = Value(Type("bf16", (dim("T"), width)), "x")
        graph = b.graph("work", [x], [b("t.neg", b("t.exp", x, hint="e"), hint="y")])
        made = compiled(graph, setting, training=False)
        data = setting.random(tokens, width)
        (found,) = run(made, [data], None)
        error, count = 0.0, max(1, tokens // 16)
        for first in range(0, tokens, count):
            some = slice(first, first + count)
            error = _worse(error, relative(found[some], -data[some].float().exp()))
        case, kernels = f"pointwise, {width} columns", templates(made)
        yield Result(case, "y", found.numel(), error, CLOSE, kernels=kernels)


@dataclasses.dataclass(frozen=True)
class Case:
    """What one process does: how much memory in GiB, and whether it waits before it takes it."""

    run: Callable[[Setting], Iterator[Any]]
    template: str
    gib: float
    waits: bool = True

    @property
    def name(self) -> str:
        """As it is asked for."""
        return f"{self.run.__name__}-{self.template}"


_CASES = (
    *(Case(weights, template, 32, waits=False) for template in ("gluon", "tma", "pointer")),
    Case(weights, "few", 16, waits=False),
    *(Case(rows, template, 60) for template in ("gluon", "tma", "pointer")),
    *(Case(biases, template, 55) for template in ("tma", "pointer")),
    Case(scores, "pointer", 60),
    Case(pointwise, "pointer", 24, waits=False),
)
CASES = {case.name: case for case in _CASES}


def results(case: Case, setting: Setting, ready: Callable[[], None]) -> Iterator[Result]:
    """Run a case; ``ready`` is called before it takes its memory."""
    for found in case.run(setting):
        if found == "ready":
            ready()
        else:
            yield found


__all__ = ["CASES", "Case", "Result", "Setting", "results"]

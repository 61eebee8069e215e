"""A captured block in words: its router, its experts, what each target makes of it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from moec.ir.graph import Graph, Op, Value, producers
from moec.ir.opdef import opdef
from moec.manager import PassManager, parse_pipeline
from moec.pipeline import RAISE, pipeline

_ROUTER = ("moe.activate", "moe.select", "moe.weight", "moe.limit")
# Pointwise work that is arithmetic, and not an activation.
_ARITHMETIC = {
    *("t.add", "t.sub", "t.mul", "t.div", "t.neg", "t.cast", "t.clamp", "t.where"),
    *("t.eq", "t.ne", "t.lt", "t.le", "t.gt", "t.ge", "t.logical_not", "t.logical_and"),
}
# A target's name in a report -> the target, and whether its device has a copy engine.
_DEVICES = {
    "CPU": ("aten", False),
    "GPU with Triton (8.0 and up)": ("triton", False),
    "GPU with a copy engine (9.0 and up)": ("triton", True),
}


@dataclass(frozen=True)
class Description:
    """Router and experts of one captured graph, in words."""

    router: str
    experts: str


def describe(graph: Graph) -> Description:
    """What the rules for routers and the body of the experts make of a captured graph."""
    raised = PassManager(RAISE).run(graph)
    return Description(_router(raised), _experts(raised))


# routers
def _router(graph: Graph) -> str:
    ops = [op for op in graph.ops if op.kind in _ROUTER]
    if ops:
        return ", ".join(map(_shown, ops))
    before = {op.kind for op in _ancestors(graph, "moe.dispatch")}
    if before - {"t.cast"}:
        return "tensor operations"
    return "given by the caller" if _has(graph, "moe.dispatch") else "none"


def _shown(op: Op) -> str:
    attributes = [f"{k}={_value(v)}" for k, v in op.attrs.items()]
    bias = ["bias"] if op.kind == "moe.select" and len(op.operands) > 1 else []
    return f"{op.kind} {{{', '.join([*bias, *attributes])}}}"


def _value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _has(graph: Graph, kind: str) -> bool:
    return any(op.kind == kind for op in graph.ops)


def _ancestors(graph: Graph, kind: str) -> list[Op]:
    """The ops that the first op of a kind is computed from."""
    made = producers(graph)
    first = next((op for op in graph.ops if op.kind == kind), None)
    pending = list(first.operands) if first is not None else []
    found: dict[int, Op] = {}
    while pending:
        op = made.get(pending.pop())
        if op is not None and id(op) not in found:
            found[id(op)] = op
            pending += op.operands
    return list(found.values())


# experts
def _experts(graph: Graph) -> str:
    ops = _on_rows(graph)
    products = [op for op in ops if op.kind == "moe.grouped_mm"]
    if not products:
        return "no product over rows by expert"
    parts = [
        _layout(graph, products),
        "gated" if _is_gated(ops) else "not gated",
        "+".join(_activations(ops)) or "no activation",
        *(["biases"] if any(op.kind == "moe.expert_rows" for op in graph.ops) else []),
        *(["clamps"] if any(op.kind == "t.clamp" for op in ops) else []),
    ]
    return f"{len(products)} products, " + ", ".join(parts)


def _on_rows(graph: Graph) -> list[Op]:
    """The ops between the gathering of rows and their combination."""
    rows: set[Value] = set()
    found = []
    for op in graph.ops:
        begins = op.kind in ("moe.gather", "moe.expert_rows")
        if begins or (op.kind != "moe.combine" and rows & set(op.operands)):
            rows |= set(op.results)
            found.append(op)
    return found


def _layout(graph: Graph, products: list[Op]) -> str:
    made = producers(graph)
    kinds = {made[op.operands[1]].kind for op in products if op.operands[1] in made}
    if kinds & {"t.stack", "t.concat"}:
        return "one module an expert"
    if "t.reshape" in kinds:
        return "flattened weights"
    transposed = {bool(op.attrs.get("transposed")) for op in products}
    return "stacked [E, in, out]" if transposed == {True} else "stacked [E, out, in]"


def _is_gated(ops: list[Op]) -> bool:
    """Whether two values that depend on the tokens are multiplied before the last product."""
    products = [op for op in ops if op.kind == "moe.grouped_mm"]
    last = ops.index(products[-1])
    split = any(op.kind == "t.split" for op in ops[:last])
    gathered = [op.operands[0] for op in products]
    return split or len(set(gathered)) < len(gathered)


def _activations(ops: Collection[Op]) -> list[str]:
    found = [
        op.kind.removeprefix("t.")
        for op in ops
        if op.kind.startswith("t.") and op.kind not in _ARITHMETIC and opdef(op.kind).pointwise
    ]
    return list(dict.fromkeys(found))


# targets
@dataclass(frozen=True)
class Served:
    """What a device would run: the target, its kernels and the ops left to PyTorch, or why none."""

    device: str
    target: str
    kernels: int = 0
    others: int = 0
    failure: str = ""


def served(graph: Graph, training: bool) -> list[Served]:
    """What each kind of device would run for a graph: passes and code generation, without it."""
    return [_served(graph, name, *how, training) for name, how in _DEVICES.items()]


def _served(graph: Graph, device: str, target: str, descriptors: bool, training: bool) -> Served:
    from moec.codegen import emit_module

    try:
        calls = parse_pipeline(pipeline(target, training, descriptors))
        lowered = PassManager(calls).run(graph)
        emit_module(lowered, target=target)
    except Exception as error:  # a report goes on; the failure is a part of it
        return Served(device, target, failure=f"{type(error).__name__}: {error}".splitlines()[0])
    kernels = sum(op.kind.startswith("kern.") for op in lowered.ops)
    return Served(device, target, kernels, len(lowered.ops) - kernels)

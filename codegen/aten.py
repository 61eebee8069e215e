"""The ``aten`` target: each op as one PyTorch expression; grouped ops are calls of
:mod:`moec.runtime.grouped`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moec.errors import CodegenError
from moec.ir.dims import python_source
from moec.ir.graph import Op
from moec.ir.types import DTYPES

Arguments = list[str]
Expression = Callable[[Op, Arguments], str]


def number(value: float) -> str:
    """A number as Python source."""
    if value != value or value in (float("inf"), float("-inf")):
        return f'float("{value}")'
    return (
        repr(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(float(value))
    )


def dtype(name: str) -> str:
    """A dtype as Python source."""
    return str(DTYPES[name])


def shape(dims: Any) -> str:
    """A shape as Python source."""
    inner = ", ".join(python_source(d) for d in dims)
    return f"({inner},)" if len(dims) == 1 else f"({inner})"


def _call(name: str) -> Expression:
    return lambda op, a: f"{name}({', '.join(a)})"


def _infix(sign: str) -> Expression:
    def expression(op: Op, a: Arguments) -> str:
        return f"{a[0]} {sign} {a[1] if len(a) > 1 else number(op.attrs['other'])}"

    return expression


def _extreme(name: str) -> Expression:
    def expression(op: Op, a: Arguments) -> str:
        if len(a) == 2:
            return f"torch.{name}({a[0]}, {a[1]})"
        return f"{a[0]}.clamp({'min' if name == 'maximum' else 'max'}={number(op.attrs['other'])})"

    return expression


def _clamp(op: Op, a: Arguments) -> str:
    bounds = ", ".join(f"{k}={number(op.attrs[k])}" for k in ("min", "max") if k in op.attrs)
    return f"{a[0]}.clamp({bounds})"


def _softplus(op: Op, a: Arguments) -> str:
    options = "".join(f", {k}={number(v)}" for k, v in op.attrs.items())
    return f"F.softplus({a[0]}{options})"


def _full(op: Op, a: Arguments) -> str:
    size = op.attrs.get("shape", ())
    text = shape(size) if size else "()"
    kind = dtype(op.attrs["dtype"])
    return f"torch.full({text}, {number(op.attrs['value'])}, dtype={kind}, device=device)"


def _slice(op: Op, a: Arguments) -> str:
    rank = op.operands[0].type.rank
    axis = op.attrs["dim"] % rank
    step = op.attrs.get("step", 1)
    inner = f"{python_source(op.attrs['start'])}:{python_source(op.attrs['stop'])}" + (
        f":{step}" if step != 1 else ""
    )
    return f"{a[0]}[{', '.join([':'] * axis + [inner])}]"


def _split(op: Op, a: Arguments) -> str:
    parts = op.attrs["parts"]
    if op.attrs.get("layout", "concat") == "concat":
        return f"{a[0]}.chunk({parts}, dim=-1)"
    return ", ".join(f"{a[0]}[..., {i}::{parts}]" for i in range(parts))


def _merge(op: Op, a: Arguments) -> str:
    inner = ", ".join(a)
    if op.attrs.get("layout", "concat") == "concat":
        return f"torch.cat(({inner}), dim=-1)"
    return f"torch.stack(({inner}), dim=-1).flatten(-2)"


def _reduction(name: str) -> Expression:
    def expression(op: Op, a: Arguments) -> str:
        keep = ", keepdim=True" if op.attrs.get("keepdim", False) else ""
        return f"{a[0]}.{name}(dim={op.attrs['dims']!r}{keep})"

    return expression


def _topk(op: Op, a: Arguments) -> str:
    options = "".join(
        f", {k}={op.attrs[k]!r}" for k in ("dim", "largest", "sorted") if k in op.attrs
    )
    return f"{a[0]}.topk({python_source(op.attrs['k'])}{options})"


def _arange(op: Op, a: Arguments) -> str:
    start, step = op.attrs.get("start", 0), op.attrs.get("step", 1)
    size, kind = python_source(op.attrs["size"]), dtype(op.attrs["dtype"])
    stop = f"{start} + {step} * ({size})"
    return f"torch.arange({start}, {stop}, {step}, dtype={kind}, device=device)"


def _size(op: Op, a: Arguments) -> str:
    size, kind = python_source(op.attrs["size"]), dtype(op.attrs["dtype"])
    return f"torch.full((), {size}, dtype={kind}, device=device)"


def _one_group(op: Op, a: Arguments) -> str:
    return f"moe.one_group({python_source(op.attrs['rows'])}, device)"


def _divisor(op: Op, a: Arguments) -> str:
    return a[1] if len(a) > 1 else str(op.attrs["other"])


def _sort(op: Op, a: Arguments) -> str:
    dim, descending = op.attrs.get("dim", -1), op.attrs.get("descending", False)
    return f"{a[0]}.sort(dim={dim}, descending={descending}, stable=True)"


def _take(op: Op, a: Arguments) -> str:
    x, index = (v.type for v in op.operands)
    if index.rank == 1:
        return f"{a[0]}.index_select(0, {a[1]})"
    return (
        f"{a[0]}.index_select(0, {a[1]}.reshape(-1)).reshape({shape((*index.shape, *x.shape[1:]))})"
    )


def _index(name: str) -> Expression:
    def expression(op: Op, a: Arguments) -> str:
        source = f", {a[2]}" if len(a) > 2 else ""
        value = f", {number(op.attrs['value'])}" if "value" in op.attrs else ""
        index = a[1] if op.operands[1].type.dtype == "i64" else f"{a[1]}.long()"
        return f"{a[0]}.{name}({op.attrs['dim']}, {index}{source}{value})"

    return expression


def _grouped(name: str) -> Expression:
    """A call of the runtime: operands, then every attribute by name."""

    def expression(op: Op, a: Arguments) -> str:
        options = [f"{k}={_attribute(v)}" for k, v in op.attrs.items()]
        return f"moe.{name}({', '.join([*a, *options])})"

    return expression


def _attribute(value: Any) -> str:
    if isinstance(value, str):
        return dtype(value) if value in DTYPES else repr(value)
    if isinstance(value, bool):
        return repr(value)
    if isinstance(value, float):
        return number(value)
    return python_source(value)


TABLE: dict[str, Expression] = {
    **{
        f"t.{n}": _call(f"torch.{n}")
        for n in (
            "abs",
            "sign",
            "exp",
            "log",
            "log1p",
            "sqrt",
            "rsqrt",
            "reciprocal",
            "erf",
            "sigmoid",
            "tanh",
            "relu",
            "floor",
        )
    },
    **{
        f"t.{n}": _call(f"torch.{n}") for n in ("where", "logical_not", "logical_and", "logical_or")
    },
    **{f"t.{n}": _infix(s) for n, s in {"add": "+", "sub": "-", "mul": "*", "div": "/"}.items()},
    **{
        f"t.{n}": _infix(s)
        for n, s in {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}.items()
    },
    **{f"t.{n}": _reduction(n) for n in ("sum", "mean", "amax", "logsumexp")},
    **{f"t.{n}": _index(n) for n in ("gather", "scatter", "scatter_add")},
    "t.neg": lambda op, a: f"-{a[0]}",
    "t.silu": _call("F.silu"),
    "t.log_sigmoid": _call("F.logsigmoid"),
    "t.backward": _grouped("backward"),
    "t.maximum": _extreme("maximum"),
    "t.minimum": _extreme("minimum"),
    "t.gelu": lambda op, a: f"F.gelu({a[0]}, approximate={op.attrs.get('approximate', 'none')!r})",
    "t.softplus": _softplus,
    "t.clamp": _clamp,
    "t.pow": lambda op, a: f"{a[0]} ** {number(op.attrs['exponent'])}",
    "t.cast": lambda op, a: f"{a[0]}.to({dtype(op.attrs['dtype'])})",
    "t.full": _full,
    "t.reshape": lambda op, a: f"{a[0]}.reshape({shape(op.attrs['shape'])})",
    "t.permute": lambda op, a: f"{a[0]}.permute({op.attrs['dims']!r})",
    "t.expand": lambda op, a: f"{a[0]}.expand({shape(op.attrs['shape'])})",
    "t.slice": _slice,
    "t.unslice": _grouped("unslice"),
    "t.split": _split,
    "t.merge": _merge,
    "t.concat": lambda op, a: f"torch.cat(({', '.join(a)}), dim={op.attrs['dim']})",
    "t.stack": lambda op, a: f"torch.stack(({', '.join(a)},))",
    "t.softmax": lambda op, a: f"{a[0]}.softmax({op.attrs['dim']})",
    "t.cumsum": lambda op, a: f"{a[0]}.cumsum({op.attrs['dim']})",
    "t.topk": _topk,
    "t.one_hot": _grouped("one_hot"),
    "t.arange": _arange,
    "t.size": _size,
    "moe.one_group": _one_group,
    "t.quotient": lambda op, a: (
        f"torch.div({a[0]}, {_divisor(op, a)}, rounding_mode={op.attrs['mode']!r})"
    ),
    "t.remainder": lambda op, a: f"torch.remainder({a[0]}, {_divisor(op, a)})",
    "t.take": _take,
    "t.index_add": lambda op, a: f"torch.index_add({a[0]}, 0, {a[1]}, {a[2]})",
    "t.sort": _sort,
    "t.norm": lambda op, a: (
        f"torch.linalg.vector_norm({a[0]}, dim={op.attrs['dim']}, keepdim=True)"
    ),
    "t.linear": _call("F.linear"),
    "t.matmul": lambda op, a: f"{a[0]} @ {a[1]}",
}


def expression(op: Op, arguments: Arguments) -> str:
    """The PyTorch expression of an op on the named arguments."""
    if op.kind in TABLE:
        return TABLE[op.kind](op, arguments)
    if op.kind.startswith("moe."):
        return _grouped(op.kind[4:])(op, arguments)
    raise CodegenError(f"{op.loc or op.kind}: the aten target has no form of {op.kind}")

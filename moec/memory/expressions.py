"""What an op holds while it runs as a PyTorch expression: views, results, scratch memory.

Sizes are those of the CPU's kernels, which hold more than a GPU's where they convert operands
beforehand, and of :mod:`moec.runtime.grouped`. They are bounds: a branch that depends on data
counts as taken. ``tests/test_memory_ops.py`` compares them with what PyTorch's allocator sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from moec.ir.dims import Dim, canon
from moec.ir.graph import Op
from moec.ir.opdef import opdef
from moec.ir.types import SIZES, Type
from moec.memory.buffers import GRANULES, Layout, rounded
from moec.memory.sizes import least
from moec.runtime.grouped import FEW_ROWS

_INDEX, _FLAG, _SMALL = SIZES["i64"], SIZES["bool"], SIZES["i32"]
_HALVES = ("bf16", "f16")
# Numbers in expressions are tensors on the CPU; functions of the runtime make a few small ones.
_NUMBERS, _FEW_SMALL = 128, 8


@dataclass(frozen=True)
class Site:
    """An op where it is called: the types and layouts there.

    ``fullest`` says how many of so many rows the expert has that has most.
    """

    op: Op
    inputs: tuple[Type, ...]
    outputs: tuple[Type, ...]
    layouts: tuple[Layout, ...]
    target: str = "aten"
    fullest: Mapping[Dim, Dim] = field(default_factory=dict)

    @property
    def first(self) -> Type:
        """The type of the first operand."""
        return self.inputs[0]

    @property
    def result(self) -> Type:
        """The type of the first result."""
        return self.outputs[0]


# results
_PRODUCTS = {"t.linear", "t.matmul"}
_VIEWS = {"t.permute", "t.expand", "t.slice", "t.split"}
_FOLLOWING = {"t.scatter", "t.scatter_add", "t.index_add", "t.softmax", "t.cumsum", "t.sort"}


def is_view(site: Site) -> bool:
    """Whether the results are, or may be, the first operand's memory."""
    kind = site.op.kind
    if kind == "moe.activate":
        return bool(site.op.attrs["fn"] == "identity")
    return kind in _VIEWS or kind == "t.reshape"


def is_copy(site: Site) -> bool:
    """Whether the results are, or may be, memory of their own."""
    return not is_view(site) or (site.op.kind == "t.reshape" and Layout.ROWS != site.layouts[0])


def layout(site: Site) -> Layout:
    """How the elements of the results lie."""
    kind, layouts = site.op.kind, site.layouts
    if kind in ("t.slice", "t.split"):
        whole = site.first == site.result or _is_of_whole_rows(site)
        return max(layouts[0], Layout.ROWS if whole else Layout.GAPS, key=_rank)
    if kind == "t.expand":
        return layouts[0] if site.first == site.result else Layout.OTHER
    if kind == "t.permute":
        dims = site.op.attrs["dims"]
        return layouts[0] if dims == tuple(range(len(dims))) else Layout.OTHER
    if opdef(kind).pointwise or kind in _FOLLOWING:
        return Layout.OTHER if Layout.OTHER in layouts else Layout.ROWS
    return Layout.ROWS


def _is_of_whole_rows(site: Site) -> bool:
    attrs, rank = site.op.attrs, site.first.rank
    is_slice = site.op.kind == "t.slice"
    return is_slice and attrs["dim"] % max(rank, 1) == 0 and attrs.get("step", 1) == 1


def _rank(one: Layout) -> int:
    return int(one.value)


# scratch memory
Rule = Callable[[Site], Dim]


def scratch(site: Site) -> Dim:
    """Bytes that are held besides operands and results while the expression runs, at most."""
    kind = site.op.kind
    if kind in _PRODUCTS:
        return canon(_product(site))
    if kind in _RULES:
        return canon(_RULES[kind](site) + _FEW_SMALL * GRANULES[site.target])
    return _NUMBERS if site.target == "aten" and is_copy(site) else 0


def _accumulator(type_: Type) -> int:
    """Bytes of a number in which sums of that dtype are accumulated."""
    return 8 if type_.dtype == "f64" else 4


def _is_converted(type_: Type) -> bool:
    """Whether accumulating needs a copy in another dtype."""
    return type_.dtype not in ("f32", "f64")


def _log_sigmoid(site: Site) -> Dim:
    return site.result.bytes


def _sum(site: Site) -> Dim:
    """Integers are converted first."""
    convert = not site.first.is_float and site.first.dtype != "i64"
    return site.first.elements * _INDEX if convert else 0


def _mean(site: Site) -> Dim:
    """The CPU sums numbers of half precision in float32."""
    if site.target != "aten" or site.first.dtype not in _HALVES:
        return 0
    return (site.first.elements + site.result.elements) * _SMALL


def _index_add(site: Site) -> Dim:
    return _in_float32(site.result)


def _log_sum_exp(site: Site) -> Dim:
    return site.first.bytes + 3 * site.result.bytes + site.result.elements * _FLAG


def _index(site: Site) -> Dim:
    """An index of another dtype is converted; numbers of half precision are, too."""
    index = site.inputs[1]
    converted = index.elements * _INDEX if index.dtype != "i64" else 0
    return converted + sum(_in_float32(t) for t in (site.result, *site.inputs[2:]))


def _in_float32(type_: Type) -> Dim:
    """What a copy in float32 of numbers of half precision takes."""
    return type_.elements * _SMALL if type_.dtype in _HALVES else 0


def _one_hot(site: Site) -> Dim:
    return int(site.op.attrs["classes"]) * _INDEX + site.result.elements * _FLAG


def _sort(site: Site) -> Dim:
    axis = site.first.shape[site.op.attrs.get("dim", -1)] if site.first.rank else 1
    return axis * (_INDEX + SIZES[site.first.dtype]) + 2 * site.result.bytes


def _copied(site: Site, place: int) -> Dim:
    """The bytes of an operand, if it must be copied into rows."""
    return 0 if site.layouts[place] is Layout.ROWS else site.inputs[place].bytes


def _product(site: Site) -> Dim:
    """Products of matrices read transposed ones; gaps are copied, and axes that are broadcast."""
    total: Dim = 0
    for operand, how in zip(site.inputs[:2], site.layouts, strict=False):
        lead = site.result.shape[:-2]
        is_broadcast = operand.shape[:-2] != lead and (operand.dtype == "bf16" or len(lead) > 1)
        is_permuted = operand.rank > 2 and how is Layout.OTHER
        if operand.rank > 1 and (how is Layout.GAPS or is_permuted or is_broadcast):
            total += operand.with_shape(*lead, *operand.shape[-2:]).bytes
    return total + _accumulated(site, site.result)


def _accumulated(site: Site, result: Type) -> Dim:
    """Products in bfloat16 are accumulated in float32 beside their result on many CPUs."""
    if site.target != "aten" or result.dtype != "bf16":
        return 0
    return _in_float32(result) + 512


def _grouped_mm(site: Site) -> Dim:
    return _accumulated(site, site.result.with_shape(_fullest(site), *site.result.shape[1:]))


def _grouped_outer(site: Site) -> Dim:
    return _accumulated(site, site.result.with_shape(*site.result.shape[1:]))


def _fullest(site: Site) -> Dim:
    """The rows of the expert that has most."""
    rows = site.first.shape[0]
    return site.fullest.get(rows, rows)


def _take(site: Site) -> Dim:
    return _copied(site, 1)


def _own_backward(site: Site) -> Dim:
    extra = site.result.bytes * (2 if site.op.attrs["of"] == "log_sigmoid" else 0)
    return _copied(site, 0) + _copied(site, 1) + extra


# scratch memory of the runtime's functions
def _activate(site: Site) -> Dim:
    return site.result.bytes if site.op.attrs["fn"] == "sqrtsoftplus" else 0


def _select(site: Site) -> Dim:
    scores, pairs, attrs = site.first, site.result.elements, site.op.attrs
    width = SIZES[scores.dtype]
    total = scores.bytes * (len(site.inputs) - 1) + pairs * (width + _INDEX)
    if attrs.get("mode") == "group_limited":
        groups = scores.shape[0] * attrs["groups"]
        total += scores.bytes + groups * (5 * width + 4 * _INDEX + 3 * _FLAG)
    if attrs.get("mode") in ("margin", "threshold"):
        total += pairs * (width + _FLAG + _INDEX)
    return total


def _weight(site: Site) -> Dim:
    scores, pairs = site.first, site.inputs[1].elements
    total = pairs * (2 * _INDEX + _FLAG + 3 * SIZES[scores.dtype])
    if site.op.attrs.get("source", "gather") != "gather":
        total += pairs * (SIZES[scores.dtype] + _FLAG)
    return total


def _limit(site: Site) -> Dim:
    pairs, experts = site.first.elements, int(site.op.attrs["experts"])
    return pairs * (3 * (experts + 1) * _INDEX + 3 * _INDEX + 2 * _SMALL + 2 * _FLAG)


def _round_tokens(site: Site) -> Dim:
    """Indices and scores in their wider dtypes, one round's moves, and the ranks of tokens."""
    (tokens, experts), choices = site.inputs[1].shape, int(site.first.shape[1])
    width, lanes = max(SIZES[site.inputs[1].dtype], 4), int(experts) + 1
    places = choices * (2 * _INDEX + 2 * width + 2 * _FLAG)
    flags = _FLAG * (4 if site.op.attrs.get("groups", 1) > 1 else 1)
    row = places + lanes * (2 * width + flags) + 12 * _INDEX
    return tokens * row + 24 * lanes * _INDEX


def _dispatch(site: Site) -> Dim:
    pairs, experts = site.first.elements, int(site.op.attrs["experts"])
    return pairs * (4 * _INDEX + 2 * _SMALL + 2 * _FLAG) + (experts + 1) * (_SMALL + _INDEX) + 64


def _gather(site: Site) -> Dim:
    return site.inputs[1].elements * _SMALL


def _permute(site: Site) -> Dim:
    return _copied(site, 0)


def _rows_of_pairs(rows: Type, inverse: Type) -> Dim:
    """Rows found for pairs, without those of pairs that have none; the result included."""
    found = rows.with_shape(inverse.elements, *rows.shape[1:])
    return 2 * found.bytes + inverse.elements * (_SMALL + _FLAG)


def _unpermute(site: Site) -> Dim:
    return _rows_of_pairs(site.first, site.inputs[2]) - site.result.bytes


def _combine(site: Site) -> Dim:
    rows = site.first
    if rows.dtype in _HALVES:
        return _combine_in_turn(site)
    if rows.shape[0] == 0:
        return 0
    count, tokens = rows.shape[0], site.result.shape[0]
    few = rows.with_shape(least(count, FEW_ROWS), *rows.shape[1:])
    at_once = _rows_of_pairs(few, Type("i32", (few.shape[0],))) + few.bytes
    weights = count * (3 * SIZES[rows.dtype] + _FLAG + 2 * _SMALL)
    summed = rows.with_shape(*site.result.shape).bytes if rows.dtype != site.result.dtype else 0
    return at_once + weights + summed + count * _SMALL + tokens * 2 * _INDEX + 64


def _combine_in_turn(site: Site) -> Dim:
    rows, pairs = site.first, site.first.shape[0]
    copies = 2 if len(site.inputs) == 4 else 1
    wide = rows.with_dtype(site.result.dtype).bytes if rows.dtype != site.result.dtype else 0
    numbers = pairs * (2 * _INDEX + SIZES[rows.dtype] + _SMALL + _FLAG)
    return numbers + rows.bytes * copies + wide + _in_float32(site.result)


def _row_scale(site: Site) -> Dim:
    """Both are converted to a common dtype, and the product from it."""
    dtypes = {t.dtype for t in site.inputs}
    if len(dtypes) == 1:
        return 0
    common = "f64" if "f64" in dtypes else "f32"
    converted = (t for t in (*site.inputs, site.result) if t.dtype != common)
    return sum(t.with_dtype(common).bytes for t in converted)


def _row_dot(site: Site) -> Dim:
    a, width = site.first, _accumulator(site.first)
    copies = sum(_is_converted(t) for t in site.inputs)
    return a.elements * width * (1 + copies) + a.shape[0] * width


def _expert_rows(site: Site) -> Dim:
    table, rows = site.first, site.result.shape[0]
    return table.bytes + rows * (_SMALL + 2 * _INDEX) + table.shape[0] * _SMALL


def _group_sum(site: Site) -> Dim:
    x, width = site.first, _accumulator(site.first)
    if site.target == "triton":  # partial sums are there
        return site.result.elements * width
    rows = x.with_shape(_fullest(site), *x.shape[1:])
    copied = rows.elements * width if _is_converted(x) else 0
    experts, granule = int(site.result.shape[0]), GRANULES[site.target]
    sums = experts * rounded(canon(site.result.elements * width), granule)
    return copied + sums + site.result.elements * width


_RULES: dict[str, Rule] = {
    "t.log_sigmoid": _log_sigmoid,
    "t.sum": _sum,
    "t.cumsum": _sum,
    "t.logsumexp": _log_sum_exp,
    "t.gather": _index,
    "t.scatter": _index,
    "t.scatter_add": _index,
    "t.one_hot": _one_hot,
    "t.sort": _sort,
    "t.mean": _mean,
    "t.index_add": _index_add,
    "t.take": _take,
    "t.backward": _own_backward,
    "moe.activate": _activate,
    "moe.select": _select,
    "moe.weight": _weight,
    "moe.limit": _limit,
    "moe.round_tokens": _round_tokens,
    "moe.dispatch": _dispatch,
    "moe.gather": _gather,
    "moe.permute": _permute,
    "moe.unpermute": _unpermute,
    "moe.combine": _combine,
    "moe.row_scale": _row_scale,
    "moe.row_dot": _row_dot,
    "moe.grouped_mm": _grouped_mm,
    "moe.grouped_outer": _grouped_outer,
    "moe.expert_rows": _expert_rows,
    "moe.group_sum": _group_sum,
}

__all__ = ["Site", "is_copy", "is_view", "layout", "scratch"]

"""The faults that are planted to see whether the net is tight: one wrong line each.

They are mistakes that a person makes: a sign, a swapped operand, a forgotten case, an off by one.
``named`` is what bisection has to print: the pass, and the op or rule.
"""

from __future__ import annotations

from moec.fuzz.planting import Fault

_SIMPLIFY, _RAISE, _ADJOINT = "passes/simplify.py", "passes/raise_router.py", "passes/adjoint.py"
_POINTWISE, _TENSOR = "moec/ops/pointwise.py", "moec/ops/tensor.py"
_ROUTING, _ATEN = "moec/ops/routing.py", "codegen/aten.py"

RULES = (
    Fault(
        "times-minus-one",
        _SIMPLIFY,
        'return op.operands[0] if op.attrs.get("other") == 1.0 else None',
        'return op.operands[0] if abs(op.attrs.get("other") or 0) == 1.0 else None',
        ("simplify", "other=-1.0"),
    ),
    Fault(
        "permutes-composed-backwards",
        _SIMPLIFY,
        "dims=tuple(first[d] for d in dims)",
        "dims=tuple(dims[d] for d in first)",
        ("simplify", "t.permute"),
    ),
    Fault(
        "permute-taken-for-identity",
        _SIMPLIFY,
        "if dims == tuple(range(len(dims))):",
        "if sorted(dims) == list(range(len(dims))) and op.result.type == op.operands[0].type:",
        ("simplify", "t.permute"),
    ),
    Fault(
        "split-of-other-merge",
        _SIMPLIFY,
        "    return inner.operands if same else None",
        "    return inner.operands",
        ("simplify", "t.split"),
    ),
    Fault(
        "merge-of-other-split",
        _SIMPLIFY,
        "    return inner.operands[0] if same else None",
        "    return inner.operands[0]",
        ("simplify", "t.merge"),
    ),
    Fault(
        "halves-swapped",
        _SIMPLIFY,
        "return start // width if aligned else None",
        "return parts - 1 - start // width if aligned else None",
        ("simplify", "t.slice"),
    ),
    Fault(
        "alternating-halves-swapped",
        _SIMPLIFY,
        "return start if whole and stop >= size - parts + start + 1 else None",
        "return parts - 1 - start if whole and stop >= size - parts + start + 1 else None",
        ("simplify", "t.slice"),
    ),
    Fault(
        "transposed-kept",
        _SIMPLIFY,
        'flipped = not op.attrs.get("transposed", False)',
        'flipped = bool(op.attrs.get("transposed", False))',
        ("simplify", "moe.grouped_mm"),
    ),
    Fault(
        "negated-absolute",
        _SIMPLIFY,
        "return inner.operands[0] if inner is not None and inner.kind == op.kind else None",
        'return inner.operands[0] if inner is not None and inner.kind in (op.kind, "t.relu")'
        " else None",
        ("simplify", "t.neg"),
    ),
    Fault(
        "scale-squared",
        _RAISE,
        'scale=float(op.attrs["other"]), hint',
        'scale=float(op.attrs["other"]) ** 2, hint',
        ("raise-router", "moe.weight"),
    ),
    Fault(
        "every-score-a-softmax",
        _RAISE,
        "        return op.operands[0], op.kind[2:]\n    inner",
        '        return op.operands[0], "softmax"\n    inner',
        ("raise-router", "t.sigmoid"),
    ),
    Fault(
        "root-forgotten",
        _RAISE,
        'return inner.operands[0], "sqrtsoftplus"',
        'return inner.operands[0], "sigmoid"',
        ("raise-router", "t.sqrt"),
    ),
    Fault(
        "group-score-mixed-up",
        _RAISE,
        'return source, "max"',
        'return source, "sum_top2"',
        ("raise-router", "t.topk"),
    ),
    Fault(
        "selection-bias-forgotten",
        _RAISE,
        "            return [plain, bias]",
        "            return [plain]",
        ("raise-router", "t.topk"),
    ),
    Fault(
        "late-activation-mixed-up",
        _RAISE,
        'return b("moe.weight", *weight.operands, source=op.kind[2:], hint=op.result.hint)',
        'return b("moe.weight", *weight.operands, source="sigmoid", hint=op.result.hint)',
        ("raise-router", "t.softmax"),
    ),
    Fault(
        "row-scale-lost",
        _ADJOINT,
        'return b("moe.row_scale", product, scale, hint=op.result.hint)',
        "return product",
        ("adjoint", "moe.grouped_mm"),
    ),
    Fault(
        "other-side-unscaled",
        _ADJOINT,
        'other = b("moe.row_scale", op.operands[1], scale)',
        "other = op.operands[1]",
        ("adjoint", "moe.grouped_outer"),
    ),
    Fault(
        "half-of-a-dot",
        _ADJOINT,
        'return b("t.add", *parts, hint=op.result.hint)',
        "return parts[0]",
        ("adjoint", "moe.row_dot"),
    ),
    Fault(
        "attributes-do-not-count",
        "passes/cse.py",
        "return op.kind, op.operands, attrs, op.body",
        'return op.kind, op.operands, "", op.body',
        ("cse",),
    ),
    Fault(
        "order-of-operands-does-not-count",
        "passes/cse.py",
        "return op.kind, op.operands, attrs, op.body",
        "return op.kind, frozenset(op.operands), attrs, op.body",
        ("cse",),
    ),
    Fault(
        "second-result-is-dead",
        "passes/dce.py",
        "if any(v in live for v in op.results):",
        "if op.results[0] in live:",
        ("dce",),
    ),
    Fault(
        "recomputed-results-mixed-up",
        "passes/recompute.py",
        "zip(op.results, copied.results, strict=True)",
        "zip(op.results, copied.results[::-1], strict=True)",
        ("recompute", "t.split"),
    ),
    Fault(
        "low-rank-scale-lost",
        "passes/split_low_rank.py",
        "    if term.scale != 1:\n        inner",
        "    if term.scale > 1:\n        inner",
        ("split-low-rank", "moe.grouped_mm"),
    ),
    Fault(
        "fused-results-mixed-up",
        "passes/clusters.py",
        "mapping = dict(zip(outputs, kernel.results, strict=True))",
        "mapping = dict(zip(outputs, kernel.results[::-1], strict=True))",
        ("fuse-",),
    ),
)

GRADIENTS = (
    Fault(
        "sigmoid-slope",
        _POINTWISE,
        'return b("t.mul", g, b("t.mul", op.result, _one_minus(b, op.result)))',
        'return b("t.mul", g, _one_minus(b, op.result))',
        ("grad", "t.sigmoid"),
    ),
    Fault(
        "tanh-slope",
        _POINTWISE,
        '_one_minus(b, b("t.mul", op.result, op.result))',
        "_one_minus(b, op.result)",
        ("grad", "t.tanh"),
    ),
    Fault(
        "silu-slope",
        _POINTWISE,
        'return b("t.mul", g, b("t.mul", s, slope))',
        'return b("t.mul", g, s)',
        ("grad", "t.silu"),
    ),
    Fault(
        "erf-factor",
        _POINTWISE,
        "2 / math.sqrt(math.pi)",
        "1 / math.sqrt(math.pi)",
        ("grad", "t.erf"),
    ),
    Fault(
        "gelu-tanh-slope",
        _POINTWISE,
        "3 * root * cubic",
        "2 * root * cubic",
        ("grad", "t.gelu"),
    ),
    Fault(
        "gelu-bell",
        _POINTWISE,
        'b("t.mul", x, x), -0.5)), 1 / math.sqrt(2 * math.pi))',
        'b("t.mul", x, x), -1.0)), 1 / math.sqrt(2 * math.pi))',
        ("grad", "t.gelu"),
    ),
    Fault(
        "rsqrt-sign",
        _POINTWISE,
        "_scale(b, cube, -0.5)",
        "_scale(b, cube, 0.5)",
        ("grad", "t.rsqrt"),
    ),
    Fault(
        "clamp-edge",
        _POINTWISE,
        '((low, "t.ge"), (high, "t.le"))',
        '((low, "t.ge"), (high, "t.ge"))',
        ("grad", "t.clamp"),
    ),
    Fault(
        "power-not-lowered",
        _POINTWISE,
        'b("t.pow", _x(op), exponent=exponent - 1)',
        'b("t.pow", _x(op), exponent=exponent)',
        ("grad", "t.pow"),
    ),
    Fault(
        "difference-sign",
        _POINTWISE,
        "return [g, g if sign > 0 else b",
        "return [g, g if sign else b",
        ("grad", "t.sub"),
    ),
    Fault(
        "factors-swapped",
        _POINTWISE,
        'return [b("t.mul", g, y), b("t.mul", g, x)]',
        'return [b("t.mul", g, x), b("t.mul", g, y)]',
        ("grad", "t.mul"),
    ),
    Fault(
        "quotient-sign",
        _POINTWISE,
        'b("t.neg", b("t.div", b("t.mul", g, op.result), y))',
        'b("t.div", b("t.mul", g, op.result), y)',
        ("grad", "t.div"),
    ),
    Fault(
        "permute-not-undone",
        _TENSOR,
        "dims=tuple(sorted(range(len(dims)), key=dims.__getitem__))",
        "dims=dims",
        ("grad", "t.permute"),
    ),
    Fault(
        "softmax-sum",
        _TENSOR,
        'return (b("t.mul", b("t.sub", g, total), op.result),)',
        'return (b("t.mul", b("t.add", g, total), op.result),)',
        ("grad", "t.softmax"),
    ),
    Fault(
        "concat-place",
        _TENSOR,
        "            start = stop\n",
        "            start = 0 * stop\n",
        ("grad", "t.concat"),
    ),
    Fault(
        "weight-scale",
        _ROUTING,
        'g = b("t.mul", g, other=attrs["scale"])',
        'g = b("t.div", g, other=attrs["scale"])',
        ("grad", "moe.weight"),
    ),
    Fault(
        "unrouted-gradient",
        "moec/ops/routed.py",
        'unrouted = b("t.lt", inverse, other=0.0)',
        'unrouted = b("t.lt", inverse, other=-1.0)',
        ("grad", "moe."),
    ),
)

EMITTERS = (
    Fault(
        "step-forgotten",
        _ATEN,
        'f":{step}" if step != 1 else ""',
        '""',
        ("aten module", "t.slice"),
    ),
    Fault(
        "alternating-parts",
        _ATEN,
        '[..., {i}::{parts}]" for i in range(parts))',
        '[..., {i}::{parts}]" for i in reversed(range(parts)))',
        ("aten module", "t.split"),
    ),
    Fault(
        "bounds-swapped",
        _ATEN,
        '{number(op.attrs[k])}" for k in ("min", "max") if k in op.attrs',
        '{number(-op.attrs[k])}" for k in ("min", "max") if k in op.attrs',
        ("aten module", "t.clamp"),
    ),
    Fault(
        "order-forgotten",
        _ATEN,
        'op.attrs.get("dim", -1), op.attrs.get("descending", False)',
        'op.attrs.get("dim", -1), False',
        ("aten module", "t.sort"),
    ),
    Fault(
        "last-row-of-a-block",
        "codegen/blocked.py",
        'writer.line(f"high = low + {block_rows(op)}")',
        'writer.line(f"high = min(low + {block_rows(op)}, {count} - 1)")',
        ("aten module", "kern.pointwise"),
    ),
    Fault(
        "capacity-rounded-down",
        "moec/ir/dims.py",
        'return f"-(-({inner[0]}) // ({inner[1]}))"',
        'return f"(({inner[0]}) // ({inner[1]}))"',
        ("aten module", "moe.limit"),
    ),
    Fault(
        "outer-product-of-the-wrong-rows",
        "moec/runtime/grouped.py",
        "torch.mm(a[low:high].t(), b[low:high], out=out[e])",
        "torch.mm(a[low:high].t(), b[low:high].roll(1, 0), out=out[e])",
        ("aten module", "moe.grouped_outer"),
    ),
)

FAULTS = (*RULES, *GRADIENTS, *EMITTERS)

__all__ = ["FAULTS"]

"""Refusing code that takes another path at other sizes: a recording would only show one of them."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from torch import nn

from moec.errors import CaptureError

Place = tuple[str, int]  # file and line
_SIZE_METHODS = {"size", "numel", "nelement", "__len__"}
_CHECKED = (0, 1)  # the comparison with the block itself runs at these sizes


def refuse_size_branches(module: nn.Module, symbolic: Collection[Place] | None = None) -> None:
    """Raise :class:`CaptureError` if a method compares a number of tokens with anything but 0 or 1.

    Read off the source of the module's classes and of those below it, torch's own aside: ``min``
    and ``max`` of a size count as comparisons; the size of the last axis, the width, does not.
    ``symbolic`` are the places where a run with symbols for sizes was seen to compare tensors with
    them: no branch. (``min`` and ``max`` are none in such a run either.)
    """
    for cls in {type(m) for m in module.modules()}:
        if not cls.__module__.startswith("torch."):
            for function in _methods(cls):
                _check(function, symbolic)


def limits_counts(module: nn.Module) -> bool:
    """Whether a class's source could limit a number: by ``min`` or ``max`` of two, or by asking
    for order with anything but 0 or 1. Source that cannot be read might.
    """
    for cls in {type(m) for m in module.modules()}:
        if not cls.__module__.startswith("torch."):
            trees = [_tree(function) for function in _methods(cls)]
            if any(tree is None or any(map(_limits, ast.walk(tree))) for tree in trees):
                return True
    return False


def _limits(node: ast.AST) -> bool:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id in ("min", "max") and len(node.args) > 1
    if not isinstance(node, ast.Compare):
        return False
    ordered = any(isinstance(op, ast.Lt | ast.LtE | ast.Gt | ast.GtE) for op in node.ops)
    sides = [node.left, *node.comparators]
    return ordered and not any(
        isinstance(side, ast.Constant) and side.value in _CHECKED for side in sides
    )


def _tree(function: Callable[..., object]) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError, TypeError):
        return None


def _methods(cls: type) -> Iterator[Callable[..., object]]:
    for name, member in vars(cls).items():
        if inspect.isfunction(member) and not name.startswith("__"):
            yield inspect.unwrap(member)


def _check(function: Callable[..., object], symbolic: Collection[Place] | None) -> None:
    try:
        lines, first = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError, TypeError):
        return  # no source: the comparison with the block itself has to do
    sizes, path = _size_names(tree), inspect.getsourcefile(function) or "?"
    for node in ast.walk(tree):
        if not _depends_on_size(node, sizes):
            continue
        start, end = (first + getattr(node, n, 1) - 1 for n in ("lineno", "end_lineno"))
        if symbolic is not None and (
            isinstance(node, ast.Call) or any((path, n) in symbolic for n in range(start, end + 1))
        ):
            continue
        raise CaptureError(
            f"{Path(path).name}:{start}: {ast.unparse(node)!r} depends on the number of tokens, "
            "so the block may take another path at sizes that were not tried"
        )


def _depends_on_size(node: ast.AST, sizes: set[str]) -> bool:
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        sides = node.args if node.func.id in ("min", "max") and len(node.args) > 1 else []
    else:
        return False
    if not any(_is_size(side, sizes) for side in sides):
        return False
    others = [side for side in sides if not _is_size(side, sizes)]
    return not all(isinstance(o, ast.Constant) and o.value in _CHECKED for o in others)


def _is_size(node: ast.AST, sizes: set[str]) -> bool:
    """Whether an expression holds a number of tokens."""
    match node:
        case ast.Subscript(value=ast.Attribute(attr="shape"), slice=index):
            return not _is_last(index)
        case ast.Call(func=ast.Attribute(attr="size"), args=[index]):
            return not _is_last(index)
        case ast.Call(func=ast.Attribute(attr=attr)) if attr in _SIZE_METHODS:
            return True
        case ast.Call(func=ast.Attribute(value=ast.Name(id="torch" | "F"))):
            return False  # a tensor of that size
        case ast.Call(func=ast.Name(id="len"), args=[ast.Attribute(attr="shape")]):
            return False  # the rank
        case ast.Call(func=ast.Name(id="len"), args=[ast.Name()]):
            return True
        case ast.Name(id=name):
            return name in sizes
    return any(_is_size(child, sizes) for child in ast.iter_child_nodes(node))


def _is_last(index: ast.expr) -> bool:
    return isinstance(index, ast.UnaryOp) and ast.unparse(index) == "-1"


def _size_names(tree: ast.AST) -> set[str]:
    """Variables that hold numbers of tokens; of an unpacked shape all but the last."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign) or len(node.targets) != 1:
            continue
        target, value = node.targets[0], node.value
        if isinstance(target, ast.Tuple) and _is_shape(value):
            found |= {t.id for t in target.elts[:-1] if isinstance(t, ast.Name)}
        elif isinstance(target, ast.Name) and _is_size(value, found):
            found.add(target.id)
    return found


def _is_shape(node: ast.expr) -> bool:
    match node:
        case ast.Attribute(attr="shape") | ast.Call(func=ast.Attribute(attr="size"), args=[]):
            return True
    return False

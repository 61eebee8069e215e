"""Reading IR text: a hand-written lexer and recursive-descent parser with ``file:line:column``
errors.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from moec.errors import DimError, IRError, MoecError
from moec.ir.builder import infer_types
from moec.ir.dims import Dim, Range, dim, parse_dim
from moec.ir.graph import Graph, Location, Op, Value
from moec.ir.lexer import Lexer, Token
from moec.ir.types import DTYPES, Type
from moec.ir.verify import check_frame

_T = TypeVar("_T")
MAX_DEPTH = 32
# What a list may hold, and how long all different dims of a file may be together: the algebra of
# dims takes up to a millisecond a character, and as long for 16 of them as for one minimum.
MAX_ITEMS, MAX_DIM_TEXT, _EXTREME = 1 << 16, 1 << 11, 16


def parse(text: str, filename: str = "<text>") -> Graph:
    """Read exactly one graph; :class:`ParseError` names file, line and column."""
    parser = _Parser(text, filename)
    graph = parser.graph()
    parser.expect_end()
    return graph


def parse_file(text: str, filename: str = "<text>") -> list[Graph]:
    """Read any number of graphs."""
    parser = _Parser(text, filename)
    graphs = []
    while parser.token.kind != "end":
        graphs.append(parser.graph())
    return graphs


class _Parser:
    def __init__(self, text: str, filename: str) -> None:
        self.lexer = Lexer(text, filename)
        self.depth = 0
        self.dims: dict[str, Dim] = {}
        self.dim_text = 0

    def fail(self, message: str, offset: int | None = None) -> NoReturn:
        self.lexer.fail(message, offset)

    @property
    def token(self) -> Token:
        return self.lexer.token

    def next(self) -> Token:
        return self.lexer.next()

    def at(self, text: str) -> bool:
        return self.token.text == text and self.token.kind in ("mark", "word")

    def accept(self, text: str) -> bool:
        if self.at(text):
            self.next()
            return True
        return False

    def expect(self, text: str) -> Token:
        if not self.at(text):
            self.fail(f"expected {text!r}, found {self.token.text!r}")
        return self.next()

    def take(self, kind: str, what: str) -> str:
        if self.token.kind != kind:
            self.fail(f"expected {what}, found {self.token.text!r}")
        return self.next().text

    def expect_end(self) -> None:
        if self.token.kind != "end":
            self.fail(f"expected the end of the text, found {self.token.text!r}")

    def listed(self, item: Callable[[], _T], closers: tuple[str, ...]) -> list[_T]:
        found: list[_T] = []
        while not any(self.at(c) for c in closers):
            found.append(item())
            if len(found) > MAX_ITEMS:
                self.fail(f"a list of more than {MAX_ITEMS} items")
            if not self.accept(","):
                break
        return found

    # graphs
    def graph(self) -> Graph:
        start = self.token.offset
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.fail(f"graphs are nested more than {MAX_DEPTH} deep")
        self.expect("graph")
        name = self.take("at", "the graph's name (@name)")[1:]
        scope: dict[str, Value] = {}
        self.expect("(")
        inputs = self.listed(lambda: self.input(scope), (")", ";"))
        cotangents = self.listed(lambda: self.input(scope), (")",)) if self.accept(";") else []
        self.expect(")")
        ranges: dict[str, Range] = {}
        if self.accept("where"):
            self.listed(lambda: self.range(ranges), ("{",))
        self.expect("{")
        ops = []
        while not self.at("return"):
            ops.append(self.op(scope))
        outputs, gradients = self.returned(scope)
        self.expect("}")
        self.depth -= 1
        cut = tuple(inputs), tuple(ops), outputs
        graph = Graph(name, *cut, ranges, tuple(cotangents), gradients)
        try:
            check_frame(graph)
        except IRError as error:
            self.fail(str(error), start)
        return graph

    def returned(
        self, scope: dict[str, Value]
    ) -> tuple[tuple[Value, ...], tuple[Value | None, ...]]:
        self.expect("return")
        outputs = self.listed(lambda: self.use(scope), ("}", "grad"))
        gradients: list[Value | None] = []
        if self.accept("grad"):
            gradients = self.listed(
                lambda: None if self.accept("none") else self.use(scope), ("}",)
            )
        return tuple(outputs), tuple(gradients)

    def input(self, scope: dict[str, Value]) -> Value:
        offset = self.token.offset
        name = self.take("value", "an input (%name)")[1:]
        self.expect(":")
        return self.define(scope, name, self.type(), offset)

    def define(self, scope: dict[str, Value], name: str, type_: Type, offset: int) -> Value:
        if name in scope:
            self.fail(f"%{name} is defined twice", offset)
        scope[name] = Value(type_, name)
        return scope[name]

    def use(self, scope: dict[str, Value]) -> Value:
        offset = self.token.offset
        name = self.take("value", "a value (%name)")[1:]
        if name not in scope:
            self.fail(f"%{name} is not defined before its use", offset)
        return scope[name]

    def range(self, ranges: dict[str, Range]) -> None:
        low = self.integer()
        self.expect("<=")
        offset = self.token.offset
        name = self.take("word", "the name of a dim")
        high = self.integer() if self.accept("<=") else None
        if name in ranges or (high is not None and high < low):
            self.fail(
                f"the range of {name} is {'given twice' if name in ranges else 'empty'}", offset
            )
        try:
            dim(name)
        except DimError as error:
            self.fail(str(error), offset)
        ranges[name] = low, high

    def integer(self) -> int:
        negative = self.accept("-")
        digits = self.take("int", "an integer")
        return -int(digits) if negative else int(digits)

    # ops
    def op(self, scope: dict[str, Value]) -> Op:
        line = self.token.line
        names = [(self.token.offset, self.take("value", "a result (%name) or 'return'")[1:])]
        while self.accept(","):
            names.append((self.token.offset, self.take("value", "a result (%name)")[1:]))
        self.expect("=")
        kind_offset = self.token.offset
        kind = self.take("word", "the kind of an op")
        self.expect("(")
        operands = self.listed(lambda: self.use(scope), (")",))
        self.expect(")")
        attrs = self.attributes() if self.accept("{") else {}
        self.expect(":")
        types = [self.type()]
        while self.accept(","):
            types.append(self.type())
        body = self.body() if self.accept("[") else None
        if len(types) != len(names):
            self.fail(
                f"{kind} names {len(names)} results but gives {len(types)} types", kind_offset
            )
        self.check(kind, operands, attrs, body, types, kind_offset)
        results = tuple(self.define(scope, n, t, o) for (o, n), t in zip(names, types, strict=True))
        return Op(kind, tuple(operands), results, attrs, body, self.place(line))

    def place(self, line: int) -> Location | None:
        return self.lexer.places.get(line)

    def body(self) -> Graph:
        graph = self.graph()
        self.expect("]")
        return graph

    def check(
        self,
        kind: str,
        operands: list[Value],
        attrs: dict[str, Any],
        body: Graph | None,
        types: list[Type],
        offset: int,
    ) -> None:
        try:
            inferred = infer_types(kind, [v.type for v in operands], attrs, body)
        except IRError as error:
            self.fail(str(error), offset)
        if tuple(types) != inferred:
            self.fail(
                f"{kind} gives {', '.join(map(str, inferred))}, not {', '.join(map(str, types))}",
                offset,
            )

    def attributes(self) -> dict[str, Any]:
        attrs: dict[str, Any] = {}

        def one() -> None:
            offset = self.token.offset
            name = self.take("word", "the name of an attribute")
            if name in attrs:
                self.fail(f"attribute {name!r} is given twice", offset)
            self.expect("=")
            attrs[name] = self.attribute()

        self.listed(one, ("}",))
        self.expect("}")
        return attrs

    def attribute(self) -> Any:
        token = self.token
        if token.kind == "float":
            return float(self.next().text)
        if token.kind == "string":
            try:
                return json.loads(self.next().text)
            except ValueError:
                self.fail("malformed string", token.offset)
        if self.accept("true") or self.accept("false"):
            return token.text == "true"
        if self.accept("["):
            self.depth += 1
            if self.depth > MAX_DEPTH:
                self.fail(f"lists are nested more than {MAX_DEPTH} deep")
            items = tuple(self.listed(self.attribute, ("]",)))
            self.expect("]")
            self.depth -= 1
            return items
        return self.dim()

    # types and dims
    def type(self) -> Type:
        offset = self.token.offset
        dtype = self.take("word", "a type")
        if dtype not in DTYPES:
            self.fail(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}", offset)
        self.expect("[")
        shape = self.listed(self.dim, ("]",))
        self.expect("]")
        try:
            return Type(dtype, tuple(shape))
        except IRError as error:
            self.fail(str(error), offset)

    def dim(self) -> Dim:
        """A dim ends at the first comma or bracket that it did not open."""
        start, words = self.token.offset, self.dim_words()
        if not words:
            self.fail(f"expected a dim, found {self.token.text!r}")
        # from the tokens, not the text between them, in which a comment would read as a division
        text = " ".join(words)
        if text.isdigit() and len(words) == 1:
            return int(text)
        if text not in self.dims:
            self.dims[text] = self.new_dim(text, start)
        return self.dims[text]

    def new_dim(self, text: str, start: int) -> Dim:
        self.dim_text += len(text) + _EXTREME * (text.count("Min") + text.count("Max"))
        if self.dim_text > MAX_DIM_TEXT:
            self.fail(f"different dims of more than {MAX_DIM_TEXT} characters together", start)
        try:
            return parse_dim(text)
        except MoecError as error:
            self.fail(str(error), start)

    def dim_words(self) -> list[str]:
        depth, words = 0, []
        while self.token.kind in ("int", "word") or (
            self.token.kind == "mark" and self.token.text in "-+*^(),"
        ):
            text = self.token.text
            if depth == 0 and text in (")", ","):
                break
            depth += {"(": 1, ")": -1}.get(text, 0)
            if depth > MAX_DEPTH:
                self.fail(f"brackets are nested more than {MAX_DEPTH} deep")
            words.append(self.next().text)
        return words

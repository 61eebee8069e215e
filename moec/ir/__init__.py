"""The IR: small, typed, immutable, straight-line; its text reads back to the same graph."""

from moec.ir.builder import Builder, make_op
from moec.ir.dims import Dim, dim
from moec.ir.graph import Graph, Location, Op, Value
from moec.ir.parser import parse, parse_file
from moec.ir.text import show
from moec.ir.types import Type
from moec.ir.verify import verify

__all__ = [
    "Builder",
    "Dim",
    "Graph",
    "Location",
    "Op",
    "Type",
    "Value",
    "dim",
    "make_op",
    "parse",
    "parse_file",
    "show",
    "verify",
]

"""Mutations of texts: of bytes, of tokens, and of what a line of IR is made of."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

Mutation = Callable[[random.Random, bytes, Sequence[bytes]], bytes]

_TOKEN = re.compile(rb"[A-Za-z_0-9.]+|\s+|.", re.DOTALL)
_INTEGER = re.compile(rb"(?<![A-Za-z_0-9.])\d+(?![A-Za-z_0-9.])")
_NAME = re.compile(rb"%[A-Za-z_0-9]+")
_SHAPE = re.compile(rb"\[[^\[\]\n]{0,60}\]")
_LIST = re.compile(rb"(?:%[A-Za-z_0-9]+|none)(?:, (?:%[A-Za-z_0-9]+|none))*")
_ATTRIBUTES = re.compile(rb"\{[^{}\n]+\}")
_DTYPE = re.compile(rb"\b(?:f64|f32|bf16|f16|i64|i32|i8|u8|bool)\b")
_MOST = 20_000  # bytes of a mutated text: longer ones are for the corpus

_BYTES = [b"\x00", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\r", b"\r\n", b"\x1b[2J", b"\x0c"]
_BYTES += ["\u202e".encode(), "\u0663".encode(), "\u0430".encode(), b"\xed\xa0\x80", b"\\", b'"']
_INTEGERS = [b"0", b"1", b"2", b"3", b"64", b"65", b"2147483648", b"9223372036854775807", b"-1"]
_INTEGERS += [b"9223372036854775808", b"9" * 30, b"9" * 31, b"1" + b"0" * 400, b"007", b"1e9"]
_DIMS = [b"T", b"2*T", b"T*T", b"T^8", b"T^9", b"T**T**T", b"(T+1)^8", b"ceildiv(T, 0)", b"-T"]
_DIMS += [b"ceildiv(T, 2)", b"floordiv(T, T)", b"Min(T, 4, 8*T)", b"Max(T, Q)", b"T + Q", b"torch"]
_DIMS += [b"__import__", b"for", b"(T + Q)*(T - Q)", b"((((T))))", b"1 - T", b"floordiv(T*T, T)"]
_DIMS += [b"(A+B+C+D+E)^6*(F+G+H+I)^6", b"*".join([b"(A+B)"] * 40), b"Q", b"(T + Q)^8"]
_DIMS += [b"Min(" + b", ".join(b"Max(A%d, B)" % i for i in range(40)) + b")", b"-" * 300 + b"T"]
_WORDS = [b"graph", b"return", b"grad", b"none", b"where", b"inf", b"nan", b"-inf", b"true", b"%x"]
_WORDS += [b"@__class__", b"%class", b"%__import__", b"%torch", b"%low", b"kern.pointwise", b"eval"]
_WORDS += [b"t.reshape", b"t.permute", b"t.split", b"t.full", b"moe.dispatch", b"t.backward", b"{}"]
_WORDS += [b"t.slice", b"t.expand", b"t.one_hot", b"t.cast", b"t.take", b"moe.grouped_mm", b"t.add"]
_WORDS += [b"[", b"]", b"(", b")", b"{", b"}", b",", b"=", b":", b";", b"//", b"// a.py:1 (", b"<="]
_WORDS += [b'"concat"', b'"f32"', b'"\\ud800"', b'"\\u0000"', b'"""', b"1.5", b"-0.0", b"1e999"]


def _place(chance: random.Random, data: bytes) -> int:
    return chance.randrange(len(data) + 1)


def _span(chance: random.Random, data: bytes) -> tuple[int, int]:
    low = _place(chance, data)
    return low, min(len(data), low + int(chance.expovariate(1 / 12)) + 1)


# bytes
def flip(chance: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    low = _place(chance, data[1:])
    return data[:low] + bytes([chance.randrange(256)]) + data[low + 1 :]


def insert(chance: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    low = _place(chance, data)
    return data[:low] + chance.choice(_BYTES) + data[low:]


def delete(chance: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    low, high = _span(chance, data)
    return data[:low] + data[high:]


def repeat(chance: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    low, high = _span(chance, data)
    return data[:high] + data[low:high] * chance.choice((1, 2, 40, 300)) + data[high:]


def truncate(chance: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    return data[: _place(chance, data)]


def splice(chance: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    other = chance.choice(others)
    return data[: _place(chance, data)] + other[_place(chance, other) :]


# tokens
def _tokens(chance: random.Random, data: bytes) -> tuple[list[bytes], int]:
    found = _TOKEN.findall(data) or [b""]
    return found, chance.randrange(len(found))


def drop_token(chance: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    found, i = _tokens(chance, data)
    return b"".join(found[:i] + found[i + 1 :])


def replace_token(chance: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    found, i = _tokens(chance, data)
    found[i] = chance.choice(chance.choice((_WORDS, _DIMS, _INTEGERS)))
    return b"".join(found)


def insert_token(chance: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    found, i = _tokens(chance, data)
    found[i] += b" " + chance.choice(chance.choice((_WORDS, _DIMS, _INTEGERS))) + b" "
    return b"".join(found)


def swap_tokens(chance: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    found, i = _tokens(chance, data)
    k = chance.randrange(len(found))
    found[i], found[k] = found[k], found[i]
    return b"".join(found)


# structure
def _replaced(
    chance: random.Random, data: bytes, pattern: re.Pattern[bytes], new: Callable[[bytes], bytes]
) -> bytes:
    """One match of a pattern, chosen at random, replaced; or all equal ones, one time in three."""
    matches = list(pattern.finditer(data))
    if not matches:
        return data
    match = chance.choice(matches)
    text = new(match[0])
    if chance.random() < 0.33:
        return pattern.sub(lambda m: text if m[0] == match[0] else m[0], data)
    return data[: match.start()] + text + data[match.end() :]


def change_integer(chance: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    return _replaced(chance, data, _INTEGER, lambda _: chance.choice(_INTEGERS))


def change_dim(chance: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    def new(shape: bytes) -> bytes:
        if chance.random() < 0.1:
            return b"[]"
        parts = shape[1:-1].split(b",")
        parts[chance.randrange(len(parts))] = chance.choice((*_DIMS, *_INTEGERS))
        return b"[" + b", ".join(parts * chance.choice((1, 1, 1, 2, 40))) + b"]"

    return _replaced(chance, data, _SHAPE, new)


def change_name(chance: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    names = _NAME.findall(data) or [b"%x"]
    odd = [b"%class", b"%__builtins__", b"%torch", b"%low", b"%" + b"n" * 300, b"%T", b"%device"]
    return _replaced(chance, data, _NAME, lambda _: chance.choice((*names, *odd)))


def change_dtype(chance: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    kinds = [b"f64", b"f32", b"bf16", b"f16", b"i64", b"i32", b"i8", b"u8", b"bool", b"f8"]
    return _replaced(chance, data, _DTYPE, lambda _: chance.choice(kinds))


def change_attribute(chance: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    values = [
        *_INTEGERS,
        *_DIMS,
        b'"x"',
        b"[]",
        b"[1, 0]",
        b"[-1]",
        b"true",
        b"nan",
        b"-inf",
        b"2.5",
    ]

    def new(text: bytes) -> bytes:
        parts = text[1:-1].split(b", ")
        i = chance.randrange(len(parts))
        parts[i] = parts[i].split(b"=")[0] + b"=" + chance.choice(values)
        return b"{" + b", ".join(parts) + b"}"

    return _replaced(chance, data, _ATTRIBUTES, new)


def change_symbol(chance: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Another expression for T, everywhere or where types are written."""
    pattern = chance.choice((rb"\bT\b", rb"(?<=\[)T\b", rb"(?<=<= )T\b"))
    return re.sub(pattern, chance.choice((*_DIMS, *_INTEGERS)), data)


def change_list(chance: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Drop, double, reverse or bring in an item of a list of values."""
    names = _NAME.findall(data) or [b"%x"]

    def new(text: bytes) -> bytes:
        items = text.split(b", ")
        i = chance.randrange(len(items))
        kinds = [items[::-1], items[:i] + items[i + 1 :], [*items, chance.choice(names)]]
        return b", ".join(chance.choice([*kinds, [*items[:i], b"none", *items[i:]], items * 2]))

    return _replaced(chance, data, _LIST, new)


def add_op(chance: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """A well-formed op, as far as it can be told, before the last return."""
    before, found, after = data.rpartition(b"\n  return")
    dim, name = chance.choice(_DIMS), b"%%new%d" % chance.randrange(100)
    value = chance.choice([b"0.0", b"-0.0", b"1e-20", b"nan", b"-inf", b"3.1415926535", b"5"])
    full = b'%s = t.full() {dtype="f32", shape=[%s], value=%s} : f32[%s]' % (name, dim, value, dim)
    line = chance.choice([full, full.replace(b"[%s]" % dim, b"[%s, 4, %s]" % (dim, dim))])
    neg = b"  %%neg = t.neg(%s) : f32[%s]" % (name, dim)
    return b"\n".join([before, b"  " + line, *chance.choice(([], [neg]))]) + found + after


def change_lines(chance: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Drop, double, move or bring in a line."""
    lines = data.split(b"\n")
    i, k = (chance.randrange(len(lines)) for _ in range(2))
    other = chance.choice(others).split(b"\n")
    changed: list[list[bytes]] = [
        [*lines[:i], *lines[i + 1 :]],
        [*lines[:i], lines[k], *lines[i:]],
        [*lines[:i], chance.choice(other), *lines[i:]],
        [*lines[:i], b"  %k = kern.pointwise(%x) : f32[T] [", *lines, b"  ]", *lines[i:]],
    ]
    return b"\n".join(chance.choice(changed))


BYTES: tuple[Mutation, ...] = (flip, insert, delete, repeat, truncate, splice)
TOKENS: tuple[Mutation, ...] = (drop_token, replace_token, insert_token, swap_tokens)
STRUCTURE: tuple[Mutation, ...] = (
    *(change_integer, change_dim, change_name, change_dtype, change_attribute, change_lines),
    *(change_symbol, change_list, add_op),
)


def mutated(chance: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """A text after one to four mutations of one kind."""
    kind = chance.choice((BYTES, TOKENS, STRUCTURE, STRUCTURE))
    for _ in range(chance.choice((1, 1, 1, 2, 3, 4))):
        data = chance.choice(kind)(chance, data, others)[:_MOST]
    return data


__all__ = ["mutated"]

"""``moec passes`` and ``moec ops``: what there is."""

from __future__ import annotations

from typing import Annotated

import typer

from moec.cli.console import print_table
from moec.errors import IRError
from moec.ir.opdef import DIALECTS, OpDef, all_ops
from moec.manager import PassDef, all_passes


def passes() -> None:
    """List the passes.

    Name, what it does, options with their defaults. The same in full is in docs/passes.md. moec
    opt -p takes these names.

    \b
    Example:
      moec passes
    """
    rows = [(p.name, first_sentence(p.doc), options_of(p)) for p in all_passes().values()]
    print_table(("pass", "what it does", "options"), rows)


def ops(
    dialect: Annotated[
        str | None, typer.Argument(help="Only these: t, moe or kern.", show_default=False)
    ] = None,
) -> None:
    """List the operations of the IR.

    Kind, meaning, attributes (those in brackets may be absent). The same in full is in docs/ops.md.

    \b
    Example:
      moec ops moe
    """
    if dialect is not None and dialect not in DIALECTS:
        raise IRError(f"there is no dialect {dialect!r}; dialects: {', '.join(DIALECTS)}")
    chosen = [op for op in all_ops().values() if dialect in (None, op.dialect)]
    rows = [(op.kind, first_sentence(op.doc), attributes_of(op)) for op in chosen]
    print_table(("op", "meaning", "attributes"), rows)


def first_sentence(text: str) -> str:
    """The first sentence of a docstring, without the marks for code."""
    paragraph = " ".join(text.split("\n\n", 1)[0].split())
    return paragraph.split(". ", 1)[0].replace("``", "")


def options_of(definition: PassDef) -> str:
    """Options and their defaults: ``max-ops=64``."""
    return ", ".join(f"{k.replace('_', '-')}={v!r}" for k, v in definition.options.items())


def attributes_of(op: OpDef) -> str:
    """Attributes, those with a default in brackets: ``k, [mode]``."""
    required = sorted(op.required)
    return ", ".join([*required, *(f"[{a}]" for a in sorted(set(op.attrs) - op.required))])

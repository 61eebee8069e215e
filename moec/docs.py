"""Reference pages: ``python -m moec.docs`` writes those from docstrings, ``python -m moec.docs
support`` the table of model families; ``--check`` compares (CI).
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import moec.ops.kernel
import moec.ops.moe
from moec import pipeline
from moec.ir.opdef import OpDef, all_ops
from moec.manager import PassDef, all_passes, parse_pipeline

_NOTE = "<!-- Written by `python -m moec.docs` from docstrings; edit those. -->"
_DIALECTS = {
    "t": "Tensor algebra: pointwise work, shapes, reductions, indexing and dense products.",
    "moe": moec.ops.moe.__doc__ or "",
    "kern": moec.ops.kernel.__doc__ or "",
}
_COUNTS = {"Type": "one value", "tuple[Type, Type]": "two values"}
_COUNTS["tuple[Type, Type, Type]"] = "three values"
_STAGES = (
    ("raise", pipeline.RAISE, "what the model means"),
    ("grad", pipeline.GRAD, "training only"),
    ("keep", pipeline.KEEP, "training only"),
    ("fuse", pipeline.FUSE, "`triton`"),
    ("lower", "lower", "`triton`"),
    ("rows", "fuse-rows, dce", "`aten`"),
)


def plain(text: str) -> str:
    """A docstring as Markdown: single marks around code."""
    return text.replace("``", "`").replace("::\n", ":\n")


# operations
def ops_page() -> str:
    """``docs/ops.md``."""
    parts = [
        "# Operations",
        _NOTE,
        "Each operation is declared once, in `moec/ops`: types, meaning in plain PyTorch,\n"
        "gradient. Operands in brackets may be absent; attributes stand in braces. How operations\n"
        "are written down is in [ir.md](ir.md).",
    ]
    for dialect, text in _DIALECTS.items():
        chosen = [op for op in all_ops().values() if op.dialect == dialect]
        parts += [f"## The `{dialect}.` dialect", plain(inspect.cleandoc(text))]
        parts += [_op_entry(op) for op in chosen]
    return "\n\n".join(parts) + "\n"


def _op_entry(op: OpDef) -> str:
    lines = [f"### `{op.kind}`", f"`{signature_of(op)}`", plain(op.doc)]
    if op.attrs:
        lines.append(_attribute_table(op))
    return "\n\n".join([*lines, _facts(op)])


def signature_of(op: OpDef) -> str:
    """How an op is called: ``moe.select(scores, [bias]) {k, [mode]}``."""
    operands = [_operand(p) for p in _parameters(op) if p.kind is not p.KEYWORD_ONLY]
    attributes = [p.name if p.default is p.empty else f"[{p.name}]" for p in _attributes(op)]
    braces = f" {{{', '.join(attributes)}}}" if attributes else ""
    return f"{op.kind}({', '.join(operands)}){braces}" + (" [body]" if op.has_body else "")


def _parameters(op: OpDef) -> list[inspect.Parameter]:
    return list(inspect.signature(op.infer).parameters.values())


def _attributes(op: OpDef) -> list[inspect.Parameter]:
    return [p for p in _parameters(op) if p.kind is p.KEYWORD_ONLY and p.name != "body"]


def _operand(parameter: inspect.Parameter) -> str:
    if parameter.kind is parameter.VAR_POSITIONAL:
        return f"{parameter.name}..."
    return parameter.name if parameter.default is parameter.empty else f"[{parameter.name}]"


def _attribute_table(op: OpDef) -> str:
    rows = ["| attribute | type | default |", "| --- | --- | --- |"]
    for p in _attributes(op):
        kind = str(p.annotation).replace(" | None", "").replace("|", "or")
        rows.append(f"| `{p.name}` | {kind} | {_default(p.default)} |")
    return "\n".join(rows)


def _default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "required"
    return "absent" if value is None else f"`{value!r}`"


def _facts(op: OpDef) -> str:
    returned = str(inspect.signature(op.infer).return_annotation)
    gives = "what its body returns" if op.has_body else _COUNTS.get(returned, "several values")
    gradient = "differentiable" if op.vjp is not None else "no gradient"
    facts = [f"Gives {gives}", gradient, *(["pointwise"] if op.pointwise else [])]
    return "; ".join([*facts, *(["with a cost formula"] if op.cost is not None else [])]) + "."


# passes
def passes_page() -> str:
    """``docs/passes.md``."""
    stages = [f"| {name} | `{text}` | {when} |" for name, text, when in _STAGES]
    parts = [
        "# Passes",
        _NOTE,
        "A pass is a function from graph to graph; its keyword arguments are its options. On the\n"
        'command line: `moec opt a.moe -p "cse, fuse-gemm{max-ops=16}"`. The pipeline is in\n'
        "`moec/pipeline.py`:",
        "\n".join(["| stage | passes | when |", "| --- | --- | --- |", *stages]),
        "The `aten` target calls library products and needs no kernels; it fuses only work on the\n"
        "same rows.",
    ]
    return "\n\n".join([*parts, *map(_pass_entry, in_order())]) + "\n"


def in_order() -> list[PassDef]:
    """All passes: first those of the pipeline, by first use, then the others by name."""
    used = [call.definition for call in parse_pipeline(pipeline.pipeline("triton", True))]
    own = [p for p in all_passes().values() if p.is_own]
    return list({p.name: p for p in [*used, *own]}.values())


def _pass_entry(definition: PassDef) -> str:
    parts = [f"## `{definition.name}`", plain(definition.doc)]
    if definition.options:
        rows = ["| option | default |", "| --- | --- |"]
        rows += [f"| `{k.replace('_', '-')}` | `{v!r}` |" for k, v in definition.options.items()]
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


# the command
PAGES = {"ops.md": ops_page, "passes.md": passes_page}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages, or with ``--check`` say which are stale; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m moec.docs", description=__doc__)
    parser.add_argument(
        "page", nargs="?", choices=["support"], help="the table of families, minutes of work"
    )
    parser.add_argument("--only", default="", help="of the table only these families, by comma")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    parser.add_argument("--folder", type=Path, default=Path("docs"), help="where the pages are")
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        parser.error(f"there is no folder {options.folder}; run this in the root of the checkout")
    if options.page == "support":
        try:
            return _support(options.folder / "support.md", options.check, options.only)
        except KeyError as error:
            parser.error(f"no family: {error.args[0]}")
    if options.only:
        parser.error("--only is for the page support")
    pages = {options.folder / name: page() for name, page in PAGES.items()}
    stale = [path for path, text in pages.items() if _read(path) != text]
    if not options.check:
        for path in stale:
            path.write_text(pages[path], encoding="utf-8")
    for path in stale:
        print(f"{path} is stale; run python -m moec.docs" if options.check else f"wrote {path}")
    return int(bool(options.check and stale))


def _support(path: Path, check: bool, only: str) -> int:
    """Write the table of families, or compare it (with ``only``: some of its rows); the exit code.

    Without ``check``, rows that ``only`` does not name are left as they were.
    """
    from moec.families import table

    names = [name for name in only.split(",") if name]
    text = _read(path) or ""
    found = table.rows(names, lambda row: print(f"{row.family}: {row.compiled}", flush=True))
    written = table.with_rows(text, found) if names else table.page(found)
    stale = [row.family for row in found if table.line(row) not in text.splitlines()]
    if check:
        for family in stale:
            print(f"{path}: the row of {family} is stale; run python -m moec.docs support")
        return int(written != text)
    path.write_text(written, encoding="utf-8")
    print(f"wrote {path}: {len(stale)} rows are new")
    return 0


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


if __name__ == "__main__":
    sys.exit(main())

"""What every benchmark prints and writes: where it ran, a Markdown table, JSON."""

import datetime
import importlib.metadata
import json
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("moec", "torch", "triton", "transformers")


def environment(device: str) -> dict[str, str]:
    """Date, device and versions: without them a figure cannot be compared with another."""
    found = {"date": datetime.datetime.now(datetime.UTC).date().isoformat()}
    if device == "cuda":
        found["device"] = torch.cuda.get_device_name()
        found["cuda"] = str(torch.version.cuda)
    else:
        found["device"] = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    found["python"] = platform.python_version()
    return found | {name: version_of(name) for name in PACKAGES}


def version_of(package: str) -> str:
    """The installed version; "not installed" for a package used from its source folder."""
    if package == "torch":
        return torch.__version__  # the metadata lacks the build's suffix
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def describe(facts: dict[str, str]) -> str:
    """The environment on one line."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An aligned Markdown table; the first column is text, the others are figures."""
    rows = [tuple(row) for row in rows]
    widths = [max(len(line[at]) for line in [header, *rows]) for at in range(len(header))]
    marks = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [aligned(header, widths), aligned(marks, widths)]
    return "\n".join(lines + [aligned(row, widths) for row in rows])


def aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    """One line of a Markdown table."""
    first = cells[0].ljust(widths[0])
    others = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return f"| {' | '.join([first, *others])} |"


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    """Write the figures to `path`, if one was asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")

"""The page: the data of a report inside one HTML file."""

from __future__ import annotations

import html
import json
import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

from torch import nn

from moec.ir.graph import Graph
from moec.manager import PassManager, parse_pipeline
from moec.pipeline import pipeline as default_pipeline
from moec.report.data import Subject, all_data
from moec.reproducer import versions


def report_of_graphs(
    graphs: Sequence[Graph], target: str, training: bool = False, passes: str | None = None
) -> str:
    """The report on some graphs and the passes (default: the target's) run over each."""
    calls = parse_pipeline(default_pipeline(target, training) if passes is None else passes)
    subjects = []
    for graph in graphs:
        manager = PassManager(calls)
        manager.run(graph)
        subjects.append(Subject(f"@{graph.name}", target, graph, manager.history))
    return _page(", ".join(f"@{g.name}" for g in graphs), subjects)


def report_of_model(model: nn.Module, target: str, training: bool = False) -> str:
    """The report on the distinct MoE blocks of a model, compiled or not."""
    from moec.capture.regions import find_regions

    calls = parse_pipeline(default_pipeline(target, training))
    subjects: dict[str, Subject] = {}
    notes: dict[str, list[str]] = {}
    left: dict[str, list[str]] = {}
    for found in find_regions(model):
        if found.graph is None:
            left.setdefault(found.reason, []).append(found.name or "(the model)")
            continue
        notes.setdefault(found.fingerprint, []).append(found.name or "(the model)")
        if found.fingerprint not in subjects:
            manager = PassManager(calls)
            manager.run(found.graph)
            subjects[found.fingerprint] = Subject(
                f"@{found.graph.name}",
                target,
                found.graph,
                manager.history,
                notes[found.fingerprint],
                source_files(found.module),
            )
    return _page(type(model).__name__, list(subjects.values()), left)


def source_files(module: nn.Module) -> dict[str, str]:
    """The source files of a module's classes, by name, as far as they can be read."""
    paths = {
        getattr(sys.modules.get(type(m).__module__), "__file__", None) for m in module.modules()
    }
    found: dict[str, str] = {}
    for path in sorted(p for p in paths if p):
        if "/torch/" not in path and Path(path).is_file():
            found[Path(path).name] = Path(path).read_text(encoding="utf-8", errors="replace")
    return found


def _page(
    title: str, subjects: Sequence[Subject], left: Mapping[str, Sequence[str]] | None = None
) -> str:
    template = resources.files("moec.report").joinpath("page.html").read_text(encoding="utf-8")
    data = json.dumps(all_data(title, subjects, versions(), left or {}), separators=(",", ":"))
    # "</" must not end the script that holds the data
    safe = data.replace("</", "<\\/").replace("<!--", "<\\!--")
    return template.replace("__TITLE__", html.escape(title)).replace('"__DATA__"', safe)


__all__ = ["report_of_graphs", "report_of_model"]

"""A planned step as a picture, and as a page with the picture and tables."""

from __future__ import annotations

import html
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moec.budget.model_plan import ModelStep
from moec.budget.summary import Item, held_between, repeated, summary_lines
from moec.budget.text import shown_bytes
from moec.errors import CompileError
from moec.plan import Plan, replay

_GIB = 2**30
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
pre { background: #f5f5f2; padding: .8rem; overflow-x: auto; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem; text-align: right; }
td:nth-last-child(-n+2), th:nth-last-child(-n+2) { text-align: left; }
tr:nth-child(even) { background: #f5f5f2; } svg { max-width: 100%; height: auto; }
"""


def write_report(path: Path, step: ModelStep, plan: Plan, budget: int) -> None:
    """Write a picture (.png, .svg) or a page (.html) that needs nothing else.

    Raises:
        CompileError: matplotlib is not installed.
    """
    if path.suffix == ".html":
        path.write_text(_page(step, plan, budget), encoding="utf-8")
        return
    path.write_bytes(_picture(step, plan, budget, path.suffix[1:]))


def _picture(step: ModelStep, plan: Plan, budget: int, form: str) -> bytes:
    """Memory over the time of the step, with the plan and without."""
    try:
        import matplotlib
    except ImportError as error:
        raise CompileError("a report needs matplotlib: pip install moec[plots]") from error
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "moec"  # the same picture has the same bytes
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 4), layout="constrained")
    order = step.planned.problem.order
    for name, sequence, color in (("as captured", order, "#bbb"), ("planned", plan.sequence, "C0")):
        times, held = _curve(step, sequence)
        axes.step(times, held, where="post", label=name, color=color)
        crossing = times[list(sequence).index(step.planned.boundary)]
        axes.axvline(crossing, color=color, linestyle=":", linewidth=1)
    axes.axhline(budget / _GIB, color="C3", linewidth=1, label="budget")
    axes.set(xlabel="ms (dotted: the backward pass begins)", ylabel="GiB held", ylim=(0, None))
    axes.legend(loc="upper left")
    buffer = io.BytesIO()
    metadata: Any = {"Date": None} if form == "svg" else None
    figure.savefig(buffer, format=form, dpi=120, metadata=metadata)
    pyplot.close(figure)
    return buffer.getvalue()


def _curve(step: ModelStep, sequence: Sequence[int]) -> tuple[list[float], list[float]]:
    """When each execution begins, in ms, and what is held during it, in GiB."""
    nodes, now, times = step.planned.problem.nodes, 0.0, []
    for node in sequence:
        times.append(1e3 * now)
        now += nodes[node].duration
    held = replay(step.planned.problem, sequence).held
    return times, [size / _GIB for size in held]


def _page(step: ModelStep, plan: Plan, budget: int) -> str:
    picture = _picture(step, plan, budget, "svg").decode()
    picture = picture[picture.index("<svg") :]
    title = html.escape(f"{step.name} within {shown_bytes(budget)}")
    summary = html.escape("\n".join(list(summary_lines(step, plan, budget, 0))[:4]))
    return "".join(
        [
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
            f"<style>{_STYLE}</style></head><body><h1>{title}</h1><pre>{summary}</pre>{picture}",
            *_table("Held between the passes", held_between(step, plan.sequence), False),
            *_table("Runs again in the backward pass", repeated(step, plan.sequence), True),
            "</body></html>\n",
        ]
    )


def _table(title: str, items: Sequence[Item], timed: bool) -> Iterator[str]:
    yield f"<h2>{title}</h2>"
    if not items:
        yield "<p>Nothing.</p>"
        return
    heads = ["count", "results", *(["ms"] if timed else []), "operation", "source"]
    yield "<table><tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"
    for item in items:
        time = [f"{1e3 * item.seconds:.2f}"] if timed else []
        cells = [str(item.count), shown_bytes(item.bytes), *time, item.name, item.place]
        yield "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
    yield "</table>"


__all__ = ["write_report"]

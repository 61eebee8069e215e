"""Log lines about captures: what was read, in how long, and why it was read again."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from moec.logs import RECOMPILES, REGIONS
from moec.mode import Mode

if TYPE_CHECKING:
    from moec.region_captures import RegionCaptures


@contextlib.contextmanager
def log_capture(region: RegionCaptures, mode: Mode, is_known: bool) -> Iterator[None]:
    """Log what the capture made inside gave, and, if there was one before, what is new about it."""
    if not (REGIONS.isEnabledFor(logging.INFO) or RECOMPILES.isEnabledFor(logging.INFO)):
        yield
        return
    name, before = region.name or "the model", next(reversed(region.found), None)
    if before is not None and not is_known:
        RECOMPILES.info("%s: captured again: %s", name, what_is_new(mode, before))
    start = time.perf_counter()
    yield
    kind = type(region.candidate.module).__name__
    REGIONS.info("%s (%s): %s", name, kind, _outcome(region, mode, is_known, start))


def _outcome(region: RegionCaptures, mode: Mode, is_known: bool, start: float) -> str:
    found = region.found[mode]
    if found.graph is None:
        return f"not captured: {found.reason}"
    if is_known:
        return f"shares the capture of its structure, {found.fingerprint}"
    took = f"{len(found.graph.ops)} ops in {time.perf_counter() - start:.2f} s"
    return f"captured as {region.kind}, {took}, structure {found.fingerprint}"


def what_is_new(mode: Mode, before: Mode) -> str:
    """The fields in which a mode differs from an earlier one: ``dtype bfloat16, not float32``."""
    pairs = (
        (f.name, getattr(mode, f.name), getattr(before, f.name)) for f in dataclasses.fields(Mode)
    )
    new = [f"{n.replace('_', ' ')} {_plain(a)}, not {_plain(b)}" for n, a, b in pairs if a != b]
    return "; ".join(new) or "the module was changed"


def _plain(value: Any) -> str:
    return str(value).removeprefix("torch.")


def log_forgotten(region: RegionCaptures) -> None:
    """Log that captures are dropped: settings, submodules or weights are others than before."""
    if not RECOMPILES.isEnabledFor(logging.INFO) or not region.found:
        return
    from moec.structure import plain_settings

    now = plain_settings(region.candidate.module)
    then = region.settings
    changed = [n for n in {**then, **now} if now.get(n) != then.get(n)]
    words = (
        f"settings changed: {', '.join(changed)}" if changed else "a submodule or weight changed"
    )
    RECOMPILES.info("%s: its captures are dropped: %s", region.name or "the model", words)


__all__ = ["log_capture", "log_forgotten", "what_is_new"]

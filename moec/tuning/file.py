"""Tuning files: JSON with the machine, versions, and a line for each kernel that was measured.

A file can cost speed and nothing else: one that was made on another machine or for another Triton
is left aside, a malformed one too, and a tile that a kernel cannot have is refused where it is
asked for. docs/tuning.md describes the format.
"""

from __future__ import annotations

import functools
import json
import logging
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch

from moec.codegen.triton.tiles import Tile
from moec.data_reader import DataReader
from moec.errors import ParseError
from moec.files import decoded, read_bounded, read_json
from moec.ir.types import FLOATS
from moec.printable import printable
from moec.tuning.kernels import GEMM, OUTER, Kernel
from moec.tuning.space import TEMPLATES

FORMAT = "moec-tuning/1"
MOST_BYTES, MOST_ENTRIES = 1 << 20, 4096
_LOG = logging.getLogger("moec.kernels")
_warned: set[tuple[str, str]] = set()


@dataclass(frozen=True)
class Entry:
    """What was measured of a kernel: the best template and tile, and the default's time.

    It holds where the kernel can have between ``low`` and ``high`` rows.
    """

    kernel: Kernel
    template: str
    tile: Tile
    ms: float
    default_ms: float
    low: int
    high: int


@dataclass(frozen=True)
class Tuning:
    """A tuning file: where it was measured, and its entries."""

    device: str
    versions: Mapping[str, str]
    date: str
    entries: tuple[Entry, ...]

    def find(self, kernel: Kernel, most: int | None) -> Entry | None:
        """The entry for a kernel that has at most so many rows (``None``: no bound): of several,
        that of the most rows.
        """
        fits = [e for e in self.entries if e.kernel == kernel and (most is None or e.low <= most)]
        return max(fits, key=lambda e: (e.high, -e.ms), default=None)


# writing
def show_tuning(tuning: Tuning) -> str:
    """The text of a file, a line an entry."""
    head = {
        "format": FORMAT,
        "device": tuning.device,
        "versions": dict(tuning.versions),
        "date": tuning.date,
    }
    lines = ",\n".join(f"  {json.dumps(_data(e))}" for e in tuning.entries)
    body = ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in head.items())
    return f'{{\n{body},\n "kernels": [\n{lines}\n ]\n}}\n'


def _data(entry: Entry) -> dict[str, Any]:
    measured = {"ms": entry.ms, "default_ms": entry.default_ms}
    tile = list(entry.tile.attribute)
    rows = [entry.low, entry.high]
    return {**entry.kernel.data, "rows": rows, "template": entry.template, "tile": tile} | measured


# reading
def parse_tuning(text: str, name: str) -> Tuning:
    """Read a file's text.

    Raises:
        ParseError: ``name:line:column: message``.
    """
    name = printable(name)
    data = _Reader(name, text, 0, read_json(text, name)).mapping("a tuning file")
    top = _Reader(name, text, 0, data)
    if data.get("format") != FORMAT:
        top.fail(f'"format" is not "{FORMAT}"')
    kernels = data.get("kernels")
    if not isinstance(kernels, list) or len(kernels) > MOST_ENTRIES:
        top.fail(f'"kernels" is no list of at most {MOST_ENTRIES} entries')
    places = _places(text, len(kernels))
    entries = (
        _Reader(name, text, place, one).entry() for place, one in zip(places, kernels, strict=True)
    )
    words = top.words(data, "versions")
    return Tuning(top.word(data, "device"), words, top.word(data, "date"), tuple(entries))


def _places(text: str, count: int) -> list[int]:
    """Where the entries begin in a text that was read as JSON; 0 where that cannot be found."""
    found, start = list[int](), re.search(r'"kernels"\s*:\s*\[\s*', text)
    decoder, at = json.JSONDecoder(), start.end() if start else len(text)
    for _ in range(count):
        try:
            _, end = decoder.raw_decode(text, at)
        except ValueError:  # another list of that name came first
            return [0] * count
        found.append(at)
        after = re.compile(r"\s*,?\s*").match(text, end)
        at = after.end() if after else end
    return found


class _Reader(DataReader):
    """A piece of a tuning file."""

    def entry(self) -> Entry:
        """The piece as an entry."""
        data = self.mapping("an entry")
        kind, template = self.word(data, "kind"), self.word(data, "template")
        dtype, gather = self.word(data, "dtype"), self.word(data, "gather")
        if kind not in (GEMM, OUTER) or template not in TEMPLATES or dtype not in FLOATS:
            self.fail(f"no kernel {kind[:40]!r} of {dtype[:40]!r} in {template[:40]!r}")
        if not isinstance(data.get("transposed"), bool):
            self.fail('"transposed" is not true or false')
        names = ("experts", "depth", "columns", "parts")
        experts, depth, columns, parts = (self.whole(data.get(n), n) for n in names)
        reads = self.whole(data.get("reads"), "reads")
        low, high = self.wholes(data, "rows", 2)
        sizes = (experts, depth, columns, parts)
        kernel = Kernel(kind, dtype, *sizes, data["transposed"], gather, reads)
        tile = Tile(*self.wholes(data, "tile", 5, 6))
        times = self.number(data, "ms"), self.number(data, "default_ms")
        return Entry(kernel, template, tile, *times, low, high)


# what a compilation asks
def load_tuning(name: str) -> Tuning | None:
    """The tuning of a name that :func:`shipped` gave, or of a file's path, if it is of use here.

    ``None``, with one warning, for what cannot be read; with a line in the log for what was
    measured on another machine or with another Triton.
    """
    path = _SHIPPED / f"{name}.json" if name in _DEVICES.values() else Path(name)
    try:
        stat = path.stat()
        tuning = _read(path, stat.st_mtime_ns, stat.st_size)
    except (OSError, ParseError) as error:
        words = f"{printable(str(path))}: {error.strerror}" if isinstance(error, OSError) else error
        if (str(path), str(words)) not in _warned:
            _warned.add((str(path), str(words)))
            warnings.warn(f"moec: {words}; tiles are chosen by rule", stacklevel=2)
        return None
    problem = is_foreign(tuning)
    if problem:
        _LOG.info("tuning %s is not used: %s", path, problem)
    return None if problem else tuning


@functools.lru_cache(maxsize=16)
def _read(path: Path, changed: int, size: int) -> Tuning:
    return parse_tuning(decoded(read_bounded(path, MOST_BYTES), str(path), MOST_BYTES), str(path))


def is_foreign(tuning: Tuning) -> str:
    """Why a tuning says nothing of this machine; empty if it does, or where there is no GPU."""
    if not torch.cuda.is_available():
        return ""
    return measured_elsewhere(tuning, torch.cuda.get_device_name(), "triton")


class Measured(Protocol):
    """What says where it was measured."""

    @property
    def device(self) -> str: ...
    @property
    def versions(self) -> Mapping[str, str]: ...


def measured_elsewhere(found: Measured, here: str, package: str) -> str:
    """Why measurements do not hold on the device ``here``: they are of another one, or of another
    minor version of a package; empty if they hold.
    """
    if found.device != here:
        return f"measured on {found.device}, this is {here}"
    theirs, own = found.versions.get(package, ""), versions()[package]
    if theirs.split(".")[:2] != own.split(".")[:2]:
        return f"measured with {package} {theirs or 'unknown'}, this is {own}"
    return ""


def versions() -> dict[str, str]:
    """The versions that times depend on."""
    found = {"torch": str(torch.__version__)}
    for name in ("moec", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


_SHIPPED = Path(__file__).parent
_DEVICES = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200"}


def shipped(device: torch.device) -> str:
    """The name of the tuning that comes with moec for a device; empty if there is none."""
    if device.type != "cuda":
        return ""
    name = _DEVICES.get(torch.cuda.get_device_name(device), "")
    return name if (_SHIPPED / f"{name}.json").is_file() else ""

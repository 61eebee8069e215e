"""Files of rates: JSON with the machine, versions, the date, and what ``moec calibrate`` measured.

A file can make a plan worse and nothing else: one that is malformed, of another device or of
another version of PyTorch is refused with a warning, and the guesses of :mod:`moec.budget.rates`
are used.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moec.budget.rates import PRODUCTS, RATES, WORK, Rates
from moec.data_reader import DataReader
from moec.errors import ParseError
from moec.files import decoded, read_bounded, read_json
from moec.ir.types import FLOATS
from moec.printable import printable
from moec.tuning.file import measured_elsewhere

FORMAT = "moec-rates/1"
MOST_BYTES = 1 << 16
# No device does more in a second, nor needs longer for a kernel: a file that says so is wrong.
_MOST_RATE, _MOST_LAUNCH = 1e20, 1.0


@dataclass(frozen=True)
class Calibration:
    """Rates, and where they were measured; ``kind`` is "cuda" or "cpu"."""

    device: str
    kind: str
    versions: Mapping[str, str]
    date: str
    rates: Rates


GUESSED = {
    kind: Calibration(name, kind, {}, "", RATES[kind])
    for kind, name in (("cuda", "an H100, guessed"), ("cpu", "a few cores, guessed"))
}


def device_name(device: torch.device) -> str:
    """What a device is called in a file; of a CPU with the threads that PyTorch uses."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip()[:120] if found else platform.processor() or platform.machine()


# writing
def show_calibration(calibration: Calibration) -> str:
    """The text of a file, a line a kind of work."""
    head = {"format": FORMAT, **asdict(calibration)}
    rates = head.pop("rates")
    lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in rates.items())
    body = ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in head.items())
    return f'{{\n{body},\n "rates": {{\n{lines}\n }}\n}}\n'


# reading
def parse_calibration(text: str, name: str) -> Calibration:
    """Read a file's text.

    Raises:
        ParseError: ``name:line:column: message``.
    """
    name = printable(name)
    top = DataReader(name, text, 0, read_json(text, name))
    data = top.mapping("a file of rates")
    if data.get("format") != FORMAT:
        top.fail(f'"format" is not "{FORMAT}"')
    if top.word(data, "kind") not in RATES:
        top.fail('"kind" is neither "cuda" nor "cpu"')
    about = top.word(data, "device"), data["kind"], top.words(data, "versions")
    rates = _RatesReader(name, text, _place(text, "rates"), data.get("rates")).rates()
    return Calibration(*about, top.word(data, "date"), rates)


def _place(text: str, key: str) -> int:
    found = re.search(rf'"{key}"\s*:\s*', text)
    return found.end() if found else 0


class _RatesReader(DataReader):
    def rates(self) -> Rates:
        """The piece as rates."""
        data = self.mapping('"rates"')
        work = {kind: self._of(kind, data.get(kind)) for kind in WORK}
        if not work[PRODUCTS]:
            self.fail(f'"{PRODUCTS}" has no rate')
        launch = self.number(data, "launch", "number of seconds")
        if launch > _MOST_LAUNCH:
            self.fail(f'"launch" is more than {_MOST_LAUNCH} s')
        return Rates(**work, bytes=self._rate(data, "bytes"), launch=launch)

    def _of(self, kind: str, value: Any) -> dict[str, float]:
        place = _place(self.text, kind)
        reader = _RatesReader(self.name, self.text, place, value)
        data = reader.mapping(f'"{kind}"')
        if not data.keys() <= set(FLOATS):
            reader.fail(f'"{kind}" has other keys than {", ".join(FLOATS)}')
        return {dtype: reader._rate(data, dtype) for dtype in data}

    def _rate(self, data: dict[str, Any], key: str) -> float:
        rate = self.number(data, key, "rate")
        if not 0 < rate <= _MOST_RATE:
            self.fail(f'"{key}" is no rate')
        return rate


# what a plan asks
def read_calibration(path: Path) -> Calibration:
    """The calibration in a file.

    Raises:
        OSError: it cannot be read.
        ParseError: it is malformed.
    """
    data = read_bounded(path, MOST_BYTES)
    return parse_calibration(decoded(data, str(path), MOST_BYTES), str(path))


def calibration_on(
    device: torch.device, path: str | None, warn: Callable[[str], object]
) -> Calibration:
    """What a file says of this machine's device, or the guesses where there is no file or it is of
    no use here, which ``warn`` is told.
    """
    return _usable(
        path,
        device.type,
        warn,
        lambda found: measured_elsewhere(found, device_name(device), "torch"),
    )


def calibration_for(kind: str, path: str | None, warn: Callable[[str], object]) -> Calibration:
    """As :func:`calibration_on`, for a device of a kind that may be elsewhere."""
    return _usable(path, kind, warn, lambda _: "")


def _usable(
    path: str | None,
    kind: str,
    warn: Callable[[str], object],
    foreign: Callable[[Calibration], str],
) -> Calibration:
    guessed = GUESSED["cuda" if kind == "cuda" else "cpu"]
    if path is None:
        return guessed
    try:
        found = read_calibration(Path(path))
        problem = _of_another_kind(found, kind) or foreign(found)
        problem = f"{printable(path)}: {problem}" if problem else ""
    except OSError as error:
        problem = f"{printable(path)}: {error.strerror}"
    except ParseError as error:
        problem = str(error)
    if problem:
        warn(f"moec: {problem}; times are modelled from moec's own guesses at rates")
    return guessed if problem else found


def _of_another_kind(found: Calibration, kind: str) -> str:
    names = {"cuda": "a GPU", "cpu": "a CPU"}
    if found.kind == kind:
        return ""
    return f"measured on {names[found.kind]} ({found.device}), the plan is for {names[kind]}"


__all__ = [
    "FORMAT",
    "Calibration",
    "calibration_for",
    "calibration_on",
    "device_name",
    "parse_calibration",
    "read_calibration",
    "show_calibration",
]

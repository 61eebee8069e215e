"""``moec calibrate``: what this device does in a second, for the times of plans."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer

from moec.cli.console import print_table, progress, say
from moec.files import write_whole

if TYPE_CHECKING:
    from moec.budget.rates import Rates


def calibrate(
    output: Annotated[Path, typer.Option("-o", "--output", help="The file of rates.")] = Path(
        "rates.json"
    ),
    seconds: Annotated[float, typer.Option(min=1.0, help="About so long in all.")] = 60.0,
) -> None:
    """Measure this device's rates, from which plans within a memory budget take their times.

    Of the GPU, or of the CPU where there is none: how many bytes it copies in a second, how long
    one more kernel takes, and the rates of products, of experts' products as moec emits them, and
    of attention, by dtype. The file is for moec.compile's option "rates" and for moec plan MODEL
    --budget --rates.

    \b
    Examples:
      moec calibrate
      moec calibrate --seconds 20 -o h100.json
    """
    from moec.budget.calibrate import calibrated, jobs, shapes_of
    from moec.budget.rates_file import show_calibration

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count = len(jobs(device, shapes_of(device)))
    with progress("measuring", count) as step:
        found = calibrated(device, seconds, step, say)
    write_whole(output.resolve(), show_calibration(found).encode())
    print_table(("rate", "dtype", "measured"), list(_rows(found.rates)))
    say(f"wrote {output}: {found.device}")


def _rows(rates: Rates) -> Iterator[tuple[str, str, str]]:
    from moec.budget.rates import WORK

    yield "bytes", "", f"{rates.bytes / 1e9:.1f} GB/s"
    yield "launch", "", f"{1e6 * rates.launch:.2f} us"
    for kind in WORK:
        for dtype, rate in getattr(rates, kind).items():
            yield kind, dtype, f"{rate / 1e12:.4g} TFLOP/s"


__all__ = ["calibrate"]

"""The emitted kernels of a training step under NVIDIA's compute-sanitizer.

    python -m benchmarks.sanitizer                     every template and tool
    python -m benchmarks.sanitizer --templates gluon --tools racecheck --limit 300

A small block runs forward and backward at several numbers of tokens and routings. PyTorch takes
each tensor's memory from the driver, so that an access past a tensor's end is one past an
allocation. What the tools cannot see is told apart. initcheck does not count what the copy engine
stores as written, so it looks at the template that has no copy engine, at a block whose rows of
logits it cannot take either (cuBLAS); that nothing unwritten is read by the others is shown by
benchmarks.emitted_check, in memory full of NaN. racecheck reports the bytes by which Triton sends
each group of warps to its function, which barriers of all warps guard: reports of the first line
of a kernel and of its `warp_specialize` are counted apart, and `control` is a kernel that does
nothing else. It needs an NVIDIA GPU and compute-sanitizer on the path.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import torch

from .emitted_check import TEMPLATES, Shape, artifact, inputs, run_both
from .report import describe, environment, markdown_table, write_json

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
CONTROL = "control"
WITHOUT_COPY_ENGINE = "pointer"
SMALL = Shape(512, 256, 7, 2)  # 7 logits a row are no multiple of 16 bytes
CASES = ((1, "random"), (257, "random"), (257, "one"), (600, "skewed"))
DONE = "steps done by "
PLACE = re.compile(r"(?:Read|Write) access at .* in (\S+):(\d+)")


def worker(template: str) -> None:
    """The steps that are looked at; prints which file the kernels are in."""
    if template == CONTROL:
        from . import sanitizer_control

        out = torch.zeros(2, dtype=torch.int32, device="cuda")
        sanitizer_control.dispatch[(4,)](out, num_warps=4)
        if out.tolist() != [1, 2]:
            raise SystemExit("the control did not run")
        print(f"{DONE}{sanitizer_control.__file__}", flush=True)
        return
    descriptors, gluon = TEMPLATES[template]
    compiled = artifact(SMALL, descriptors, True, gluon=gluon)
    for tokens, routing in CASES:
        torch.manual_seed(0)
        data = inputs(SMALL, tokens, routing)
        results = run_both(compiled, data, torch.randn_like(data[0]))
        if not all(bool(t.isfinite().all()) for t in results):
            raise SystemExit(f"results that are not finite at T = {tokens}, {routing}")
    print(f"{DONE}{compiled.path}", flush=True)


def look(template: str, tool: str, limit: int) -> dict[str, Any]:
    """One tool's verdict on one template."""
    row: dict[str, Any] = {"template": template, "tool": tool}
    command = ["compute-sanitizer", "--tool", tool, "--print-limit", "2000"]
    command += [sys.executable, "-m", "benchmarks.sanitizer", "--worker", template]
    environ = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environ)
    except subprocess.TimeoutExpired:
        return row | {"verdict": f"stopped after {limit} s"}
    lines = (done.stdout + done.stderr).splitlines()
    said = [line.removeprefix("=========").strip() for line in lines if line[:9] == "=" * 9]
    verdict = next((s for s in reversed(said) if "SUMMARY" in s), "no summary")
    files = [line.removeprefix(DONE) for line in lines if line.startswith(DONE)]
    if not files:
        return row | {"verdict": f"not finished: {verdict}", "said": said[:200]}
    return row | {"verdict": verdict, "said": said[:200], **places(said, Path(files[0]))}


def places(said: list[str], file: Path) -> dict[str, int]:
    """How many places of races are where Triton sends warps to their functions, and elsewhere."""
    text, found = file.read_text().splitlines(), {"dispatch": 0, "elsewhere": 0}
    for place in filter(None, map(PLACE.search, said)):
        line = text[int(place[2]) - 1] if place[1] == file.name else ""
        at_dispatch = line.startswith("def ") or "warp_specialize(" in line
        found["dispatch" if at_dispatch else "elsewhere"] += 1
    return found


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    counts = (str(row.get(n, "-")) for n in ("dispatch", "elsewhere"))
    return (row["template"], row["tool"], *counts, row["verdict"])


def cases(templates: list[str], tools: list[str]) -> list[tuple[str, str]]:
    """What to run: initcheck where all stores are seen, the control for racecheck."""
    found = [
        (template, tool)
        for template, tool in product(templates, tools)
        if tool != "initcheck" or template == WITHOUT_COPY_ENGINE
    ]
    if "racecheck" in tools and "gluon" in templates:
        found.append((CONTROL, "racecheck"))
    return found


def main() -> None:
    """Look and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--templates", nargs="+", choices=TEMPLATES, default=list(TEMPLATES))
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--limit", type=int, default=300, help="seconds for each")
    parser.add_argument("--together", type=int, default=6, help="processes at a time")
    parser.add_argument("--json", type=Path, help="also write what the tools say to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker)
        return
    if not torch.cuda.is_available() or shutil.which("compute-sanitizer") is None:
        parser.error("it needs an NVIDIA GPU, and compute-sanitizer on the path")
    facts = environment("cuda")
    print(describe(facts), flush=True)
    wanted = cases(arguments.templates, arguments.tools)
    with ThreadPoolExecutor(arguments.together) as pool:
        rows = list(pool.map(lambda case: look(case[0], case[1], arguments.limit), wanted))
    header = ("template", "tool", "places at dispatch", "elsewhere", "verdict")
    print(markdown_table(header, map(cells, rows)))
    write_json(arguments.json, {"environment": facts, "rows": rows})


if __name__ == "__main__":
    main()

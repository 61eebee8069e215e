"""Tiles for the blocks of benchmarks/train.py, measured on this GPU into one tuning file.

Run from the project's root:

    python -m benchmarks.tune --seconds 540 -o out/h100.json
    python -m benchmarks.tune --dry-run --only s7b-n256       the cost model's ranking, anywhere

Each block is transformers' own, captured as moec.compile captures it, with as many tokens as in
benchmarks/train.py; forward and backward kernels are timed in their places in the block. The file
is written after each block, and `--seconds` bounds the whole run.
"""

import argparse
from pathlib import Path

import torch

from moec.capture.regions import find_regions
from moec.cli.tune import print_ranking, run_jobs
from moec.ir import Graph
from moec.targets import has_descriptors, has_gluon
from moec.tuning.search import Wanted, all_sizes, lowered, wanted

from .hf_blocks import random_block
from .report import describe, environment
from .train_step import SIZES


def graph_of(name: str, device: str) -> Graph:
    """The graph that moec captures of a block, of the same structure on any device."""
    block = random_block(SIZES[name].shape, device, torch.bfloat16)
    (found,) = find_regions(block)
    if found.graph is None:
        raise SystemExit(f"{name}: {found.reason}")
    return found.graph


def job(name: str, device: str, top: int) -> tuple[Graph, list[Wanted]]:
    """A block's kernels, and what to try for each."""
    here = torch.device(device)
    is_here = device == "cuda"
    descriptors, gluon = not is_here or has_descriptors(here), not is_here or has_gluon(here)
    templates = (*(["gluon"] if gluon else []), *(["tma"] if descriptors else []), "pointer")
    ready = lowered(graph_of(name, device), True, descriptors, gluon)
    return ready, wanted(ready, all_sizes(ready, SIZES[name].tokens), templates, top)


def main() -> None:
    """Rank or measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    blocks = [n for n, size in SIZES.items() if n != "tiny" and not size.zipf]
    parser.add_argument("--only", nargs="+", choices=SIZES, default=blocks)
    parser.add_argument("--seconds", type=float, default=540.0, help="for all blocks together")
    parser.add_argument("--top", type=int, default=6, help="candidates of each kernel")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/tuning.json"))
    parser.add_argument("--dry-run", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.dry_run:
        parser.error("no CUDA device here; --dry-run prints what would be measured")
    print(describe(environment(device)), flush=True)
    jobs = []
    for name in arguments.only:
        ready, kernels = job(name, device, arguments.top)
        jobs.append((ready, kernels, SIZES[name].tokens))
        if arguments.dry_run:
            print_ranking(ready, kernels)
        torch.cuda.empty_cache()
    if not arguments.dry_run:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        run_jobs(jobs, arguments.seconds, arguments.output)


if __name__ == "__main__":
    main()

"""The pages of docs/ are true: what they show is executed, and what is generated is fresh.

Blocks of one page run in order in one temporary folder. A `moe NAME` block is written to the file
NAME. `console` blocks are run as far as they call moec or ls (a page may show `make test` too).
What they print must match what is shown, where a line or a piece of it may be `...`. The `python`
blocks of a page share their names; `python no-run` is not executed. A `text output` block is what
the `python` block before it prints, with the same `...`.
"""

import contextlib
import io
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moec import docs
from moec.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
EXIT_CODE = re.compile(r"\s*#\s*exit code (\d+)\s*$")
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass
class Block:
    """A fenced block of a page, and the line where its text begins."""

    info: list[str]
    text: str
    line: int


def blocks_of(page: Path) -> Iterator[Block]:
    source = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(source):
        yield Block(match["info"].split(), match["text"], source.count("\n", 0, match.start()) + 2)


def run_python(block: Block, page: Path, names: dict[str, object]) -> str:
    # Blank lines in front make tracebacks name the page's own lines.
    code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, names)
    return printed.getvalue()


def check_output(block: Block, page: Path, printed: str) -> None:
    assert as_pattern(block.text.splitlines()).fullmatch(printed.rstrip("\n") + "\n"), (
        f"{page.name}:{block.line}: {printed}\nis not\n{block.text}"
    )


def commands_of(text: str) -> list[tuple[str, list[str]]]:
    """Each `$ command` with the lines shown below it."""
    commands: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            commands.append((line[2:], []))
        elif commands:
            commands[-1][1].append(line)
    return commands


def run_command(command: str) -> tuple[int, str] | None:
    """Exit code and output of a moec or ls command; None for what is only shown."""
    words = shlex.split(command, comments=True)
    if words[0] == "ls":
        return 0, "\n".join(sorted(os.listdir(words[1] if len(words) > 1 else "."))) + "\n"
    if words[0] != "moec":
        return None
    result = CliRunner().invoke(app, words[1:], prog_name="moec")
    return result.exit_code, result.output


def as_pattern(shown: list[str]) -> re.Pattern[str]:
    """The lines in order; `...` alone is any number of lines, inside a line any text."""
    pieces = []
    for line in shown:
        if line.strip() == "...":
            pieces.append(r"(?:.*\n)*?")
        else:
            pieces.append(".*?".join(map(re.escape, line.rstrip().split("..."))) + r"[ \t]*\n")
    return re.compile("".join(pieces))


def run_console(block: Block, page: Path) -> None:
    for command, shown in commands_of(block.text):
        found = run_command(command)
        if found is None:
            continue
        code, output = found
        expected = EXIT_CODE.search(command)
        where = f"{page.name}:{block.line}: $ {command}\n{output}"
        assert code == (int(expected[1]) if expected else 0), where
        if shown:
            assert as_pattern(shown).fullmatch(output), f"{where}\nis not\n" + "\n".join(shown)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_is_true(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    printed = ""
    for block in blocks_of(page):
        match block.info:
            case ["moe", name]:
                Path(name).write_text(block.text, encoding="utf-8")
            case ["python"]:
                printed = run_python(block, page, names)
            case ["text", "output"]:
                check_output(block, page, printed)
            case ["console"]:
                run_console(block, page)


def test_generated_pages_are_fresh() -> None:
    for name, page in docs.PAGES.items():
        shown = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert shown == page(), f"docs/{name} is stale: run python -m moec.docs"


def test_check_reports_stale_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ["--folder", str(tmp_path)]
    assert docs.main(["--check", *folder]) == 1
    assert "is stale" in capsys.readouterr().out
    assert docs.main(folder) == 0
    assert docs.main(["--check", *folder]) == 0


def test_every_link_between_pages_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"

"""A headless browser for the tests of the report, and the pictures of it in docs/images.

``python -m tests.browser`` takes the pictures anew, of an OLMoE block at the sizes of OLMoE-1B-7B.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

_NAMES = ("chromium", "google-chrome", "google-chrome-stable", "chromium-browser")
IMAGES = Path(__file__).parents[1] / "docs" / "images"


def chromium() -> str:
    """The path of the browser; without one the test is skipped, and in CI it fails."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        words = f"no browser here: none of {', '.join(_NAMES)} is on the path"
        if os.environ.get("CI"):
            pytest.fail(words)
        pytest.skip(f"{words}; on Debian: apt-get install chromium")
    return found


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A headless chromium."""
    path = chromium()
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path)
        try:
            yield running
        finally:
            running.close()


def take_pictures(page: Page, folder: Path) -> list[Path]:
    """Pictures of a report that is open: the overview, a pass, memory, and kernels."""
    taken = []

    def take(name: str) -> None:
        page.locator("main").evaluate("main => main.scrollTop = 0")
        page.mouse.move(0, 0)
        path = folder / f"report-{name}.png"
        page.screenshot(path=path)
        taken.append(path)

    page.locator("[data-tab=Overview]").click()
    take("overview")
    page.locator("#stages button", has_text="fuse-gemm").click()
    page.locator("#only").check()
    page.locator(".op.added").first.click()
    take("pass")
    page.locator("[data-tab=Memory]").click()
    take("memory")
    page.locator("[data-tab=Kernels]").click()
    page.locator(".chips button").nth(1).click()
    page.mouse.move(0, 0)
    path = folder / "report-kernels.png"
    page.screenshot(path=path)
    return [*taken, path]


def main() -> None:
    """Write docs/images/report-*.png."""
    from PIL import Image
    from transformers import OlmoeConfig

    from moec.capture.model_spec import load_model
    from moec.report import report_of_model

    with tempfile.TemporaryDirectory() as folder, browser() as running:
        OlmoeConfig(intermediate_size=1024).save_pretrained(folder)
        report = Path(folder) / "report.html"
        report.write_text(report_of_model(load_model(folder), "triton", training=True))
        page = running.new_page(viewport={"width": 1280, "height": 800})
        page.goto(report.as_uri())
        IMAGES.mkdir(exist_ok=True)
        for path in take_pictures(page, Path(folder)):
            small = Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE)
            small.save(IMAGES / path.name, optimize=True)


if __name__ == "__main__":
    main()

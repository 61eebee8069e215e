"""The report in a real browser: clicked through, searched, by keyboard, narrow and dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from moec.report import report_of_model

from .models import build

pytest.importorskip("playwright", reason="playwright (of the dev extra) is not installed")

from playwright.sync_api import Browser, Page, expect

from .browser import browser, take_pictures


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "olmoe.html"
    path.write_text(report_of_model(build("olmoe"), "triton", training=True), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def running() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.fixture
def page(running: Browser, report: Path) -> Iterator[Page]:
    """The open report; it may say nothing on the console and ask for nothing but its file."""
    page = running.new_page(viewport={"width": 1280, "height": 800})
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url))
    page.goto(report.as_uri())
    yield page
    assert [line for line in said if not line.startswith("data:")] == [report.as_uri()]
    page.close()


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def stage(page: Page, name: str) -> None:
    page.locator("#stages button", has_text=name).first.click()


def test_it_is_small_and_opens_at_once(page: Page, report: Path) -> None:
    assert report.stat().st_size < 2_000_000
    loaded = "performance.getEntriesByType('navigation')[0].loadEventEnd"
    assert 0 < page.evaluate(loaded) < 1000


def test_the_overview_leads_to_passes(page: Page) -> None:
    expect(page.locator(".card")).to_have_count(6)
    assert "model.layers.0.mlp, model.layers.1.mlp" in page.locator("#notes").inner_text()
    page.get_by_role("cell", name="fuse-routing", exact=True).get_by_role("button").click()
    expect(page.locator("h2").first).to_contain_text("fuse-routing")


def test_every_pass_can_be_opened(page: Page) -> None:
    buttons = page.locator("#stages button")
    for index in range(buttons.count()):
        buttons.nth(index).click()
        expect(page.locator("#stages [aria-current=true]")).to_have_attribute(
            "data-stage", str(index)
        )
        assert page.locator(".op").count() > 0


def test_differences_are_marked_and_can_be_alone(page: Page) -> None:
    stage(page, "raise-router")
    added, removed = page.locator(".op.added"), page.locator(".op.removed")
    assert added.count() and removed.count()
    assert "moe.select" in " ".join(added.all_inner_texts())
    assert "t.topk" in " ".join(removed.all_inner_texts())
    colours = {
        one.evaluate("e => getComputedStyle(e).backgroundColor")
        for one in (added.first, removed.first, page.locator(".op.same").first)
    }
    assert len(colours) == 3
    everything = page.locator(".op").count()
    page.locator("#only").check()
    expect(page.locator(".gap").first).to_contain_text("the same")
    assert added.count() <= page.locator(".op").count() < everything


def test_an_op_leads_to_the_models_lines_and_a_kernel_to_its_body(page: Page) -> None:
    stage(page, "fuse-gemm")
    page.locator(".op", has_text="t.linear").first.click()
    detail = page.locator(".detail")
    expect(detail.locator(".source b")).to_contain_text("F.linear")
    expect(detail).to_contain_text("modeling_olmoe.py")
    page.locator(".op", has_text="t.linear").first.click()
    expect(detail).to_have_count(0)
    page.locator(".op.added", has_text="kern.grouped_gemm").first.click()
    expect(detail.locator(".body")).to_contain_text("moe.grouped_mm")


def test_shapes_are_symbolic(page: Page) -> None:
    stage(page, "input")
    assert "f32[2*T, " in page.locator(".ops").inner_text()


def test_search_counts_by_pass_marks_and_filters(page: Page) -> None:
    stage(page, "input")
    everything = page.locator(".op").count()
    page.locator("#search").fill("Topk")
    expect(page.locator("#stages button").first.locator(".hits")).to_have_text("1")
    expect(page.locator("mark").first).to_have_text("topk")
    assert page.locator(".op").count() == 1
    page.locator("#search").fill("no such thing")
    expect(page.locator(".ops")).to_contain_text("nothing found")
    page.locator("#search").press("Escape")
    assert page.locator(".op").count() == everything


def test_each_kernel_stands_beside_its_body(page: Page) -> None:
    tab(page, "Kernels")
    pairs = page.locator(".pair")
    assert pairs.count() >= 6
    body, kernel = pairs.first.locator(".body"), pairs.first.locator(".kernel")
    expect(body).to_contain_text("moe.dispatch")
    expect(kernel).to_contain_text("@triton.jit")
    left, right = body.bounding_box(), kernel.bounding_box()
    assert left and right and left["x"] + left["width"] <= right["x"]
    page.locator(".chips button").last.click()
    expect(page.locator("main h2").last).to_be_in_viewport()
    tab(page, "Module")
    expect(page.locator(".module")).to_contain_text("def backward(")


def test_the_memory_timeline_says_what_lives_where(page: Page) -> None:
    tab(page, "Memory")
    bars = page.locator(".chart").first.locator(".bars button")
    assert page.locator(".bars .backward").count() > 3
    peak = page.locator(".chart").first.locator("[aria-pressed=true]")
    tallest = max(bars.evaluate_all("all => all.map(e => e.offsetHeight)"))
    assert peak.evaluate("e => e.offsetHeight") == tallest
    rows = page.locator(".scroll").first.locator("tbody tr")
    at_peak = rows.all_inner_texts()
    bars.first.click()
    assert rows.all_inner_texts() != at_peak
    page.keyboard.press("ArrowRight")
    expect(bars.nth(1)).to_have_attribute("aria-pressed", "true")
    before = page.locator("h2").first.inner_text()
    page.locator("#tokens").select_option("65536")
    assert page.locator("h2").first.inner_text() != before


def test_it_is_used_by_keyboard(page: Page) -> None:
    tab(page, "Graph")
    page.keyboard.press("/")
    expect(page.locator("#search")).to_be_focused()
    page.keyboard.type("silu")
    expect(page.locator("mark").first).to_have_text("silu")
    page.keyboard.press("Escape")
    expect(page.locator("mark")).to_have_count(0)
    tab(page, "Overview")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Graph")).to_be_focused()
    for _ in range(6):
        page.keyboard.press("ArrowDown")
    expect(page.locator("#stages [aria-current=true]")).to_contain_text("raise-router")
    expect(page.locator("#stages [aria-current=true]")).to_be_focused()
    page.locator(".op").first.focus()
    page.keyboard.press("Enter")
    expect(page.locator(".detail")).to_have_count(1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_in_light_and_dark(page: Page, scheme: str) -> None:
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    tab(page, "Graph")
    for selector in ("body", ".op.same", ".op.same .dims", "nav li.unchanged button", ".row"):
        assert contrast(page, selector) >= 4.5, selector
    page.locator("#theme").click()
    luminance = page.evaluate(f"{LUMINANCE}; luminance(getComputedStyle(document.body).color)")
    assert (luminance > 0.5) == (scheme == "light")


LUMINANCE = """
const channel = (c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const luminance = (text) => {
  const [r, g, b] = text.match(/[0-9.]+/g).slice(0, 3).map(Number).map(channel);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}"""


def contrast(page: Page, selector: str) -> float:
    """The contrast of an element's text with what is behind it, as WCAG defines it."""
    measure = f"""(element) => {{ {LUMINANCE};
      let behind = element;
      const clear = (e) => getComputedStyle(e).backgroundColor === "rgba(0, 0, 0, 0)";
      while (clear(behind) && behind.parentElement) behind = behind.parentElement;
      const [a, b] = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor]
        .map(luminance).sort();
      return (b + 0.05) / (a + 0.05); }}"""
    found: float = page.locator(selector).first.evaluate(measure)
    return found


@pytest.mark.parametrize("width", [360, 700, 1024])
def test_a_narrow_window_does_not_overflow(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    for name in ("Overview", "Graph", "Memory", "Kernels", "Module"):
        tab(page, name)
        wide = "document.documentElement.scrollWidth"
        assert page.evaluate(wide) <= width, name


def test_a_view_is_drawn_fast(page: Page) -> None:
    timed = """() => { const start = performance.now();
      for (let i = 0; i < subject().stages.length; i += 1) show("Graph", i);
      document.body.offsetHeight; return (performance.now() - start) / subject().stages.length; }"""
    assert page.evaluate(timed) < 100


def test_the_pictures_of_the_docs_can_be_taken(page: Page, tmp_path: Path) -> None:
    taken = take_pictures(page, tmp_path)
    assert [path.name for path in taken] == [
        "report-overview.png",
        "report-pass.png",
        "report-memory.png",
        "report-kernels.png",
    ]
    assert all(path.stat().st_size > 10_000 for path in taken)

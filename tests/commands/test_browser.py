"""The report page in Chromium: it fits, fetches nothing, and is legible in light and dark mode."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tiny

import streamprune

pytestmark = pytest.mark.slow

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the extra `browser`)")

ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
CONTRAST = """() => {
  const paint = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => {
    paint.clearRect(0, 0, 1, 1); paint.fillStyle = colour; paint.fillRect(0, 0, 1, 1);
    return [...paint.getImageData(0, 0, 1, 1).data].map((v, i) => i == 3 ? v / 255 : v);
  };
  const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
  const background = element => {
    if (!element) return [255, 255, 255, 1];
    const own = rgba(getComputedStyle(element).backgroundColor);
    return own[3] == 1 ? own : over(own, background(element.parentElement));
  };
  const light = c => {
    const [r, g, b] = c.slice(0, 3).map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  document.querySelectorAll('details').forEach(each => each.open = true);
  const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement, text = walk.currentNode.textContent.trim();
    if (!text || element.closest('title')) continue;
    const style = getComputedStyle(element), under = background(element);
    const ink = over(rgba(element.closest('svg') ? style.fill : style.color), under);
    const [high, low] = [light(ink), light(under)].sort((a, b) => b - a);
    found.push([(high + 0.05) / (low + 0.05), text.slice(0, 40)]);
  }
  return found;
}"""
CUT_OFF = """() => [...document.querySelectorAll('svg text')].filter(text => {
  const own = text.getBoundingClientRect(), card = text.closest('figure').getBoundingClientRect();
  return own.left < card.left || own.right > card.right || own.top < card.top || own.bottom > card.bottom;
}).map(text => text.textContent)"""
TOUCHING = """() => [...document.querySelectorAll('svg')].flatMap(svg => {
  const boxes = [...svg.querySelectorAll('text')].map(text => [text.getBoundingClientRect(), text.textContent]);
  return boxes.flatMap(([a, one], i) => boxes.slice(i + 1).filter(([b]) =>
    a.left < b.right && b.left < a.right && a.top + 2 < b.bottom && b.top + 2 < a.bottom).map(([, two]) => one + ' | ' + two));
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no chromium is installed")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=ARGUMENTS.split())
        yield running
        running.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every section, eight blocks and long names."""
    folder = tmp_path_factory.mktemp("browser")
    dense = make_tiny(
        folder / "a-model-with-a-rather-long-name-that-nobody-would-want-to-type-twice", "llama", num_hidden_layers=8
    )
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog, " * 60)
    out = folder / "its-pruned-version"
    streamprune.prune(
        streamprune.Config(model=dense, out=out, ratio=0.3, calibration=text, samples=6, seq_len=24, round_to=4)
    )
    row = {"seconds": 1.0, "forward_equivalents": 1.0, "parameters": 5_000_000_000}
    rows = [{**row, "label": "dense", "ratio": 0.0, "ratio_blocks": 0.0, "perplexity": 5.6}]
    for label in ("default", "a-label-of-some-length", *(f"variant-{k}" for k in range(8))):
        rows += [{**row, "label": label, "ratio": r, "ratio_blocks": r, "perplexity": 6 + 9 * r} for r in (0.2, 0.5)]
    table = {"model": str(dense), "protocol": "made up", "notes": [], "rows": rows}
    (folder / "compare.json").write_text(json.dumps(table))
    return streamprune.report(
        out,
        against=dense,
        prompts=["the quick", "a" * 30],
        tokens=12,
        text=text,
        seq_len=24,
        comparison=folder / "compare.json",
        html=folder / "page.html",
    )


@pytest.fixture
def opened(browser: Any, page: Path) -> Iterator[Callable[..., Any]]:
    """`opened(width, scheme)` opens the page; afterwards there must be no console messages and no other requests."""
    contexts, complaints, requests = [], [], []

    def open_page(width: int, scheme: str = "light", path: Path = page) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("dialog", lambda dialog: complaints.append(dialog.message))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(path.as_uri())
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert len(requests) == len(contexts)
    assert all(url.startswith("file:") for url in requests)


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_page_fits_the_screen(width: int, opened: Callable[..., Any]) -> None:
    tab = opened(width)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    sizes = tab.evaluate(
        "[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect()).map(b => [b.width, b.height])"
    )
    assert len(sizes) == 9
    assert all(wide > 250 and high > 140 for wide, high in sizes)
    assert tab.evaluate(CUT_OFF) == []
    assert tab.evaluate(TOUCHING) == []


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(scheme: str, width: int, opened: Callable[..., Any]) -> None:
    found = opened(width, scheme).evaluate(CONTRAST)
    assert len(found) > 300
    assert min(found) >= [4.5], min(found)


def test_dark_mode_swaps_text_and_background(opened: Callable[..., Any]) -> None:
    looks = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    (page, ink), (dark_page, dark_ink) = (
        [sum(map(int, colour[4:-1].split(","))) for colour in opened(1280, scheme).evaluate(looks)]
        for scheme in ("light", "dark")
    )
    assert page > 600 > 150 > ink
    assert dark_ink > 600 > 150 > dark_page


def test_marks_are_drawn_in_colour(opened: Callable[..., Any]) -> None:
    """No mark has the default: black, or no stroke."""
    tab = opened(1280)
    fills = tab.evaluate(
        "[...document.querySelectorAll('svg rect:not(.hover), svg circle:not(.none)')].map(e => getComputedStyle(e).fill)"
    )
    strokes = tab.evaluate("[...document.querySelectorAll('svg polyline')].map(e => getComputedStyle(e).stroke)")
    assert "rgb(0, 0, 0)" not in fills
    assert "none" not in strokes
    lines = tab.evaluate("[...document.querySelectorAll('polyline.depth')].map(e => getComputedStyle(e).stroke)")
    assert len(set(lines)) == 8


def test_links_have_targets_and_charts_have_labels(opened: Callable[..., Any]) -> None:
    tab = opened(1280)
    assert tab.evaluate("[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.hash))")
    assert tab.evaluate("[...document.querySelectorAll('svg')].every(s => s.getAttribute('aria-label').length > 20)")
    assert tab.evaluate("document.documentElement.lang") == "en"
    tab.click("#sites summary")
    assert tab.is_visible("#sites td")


def test_the_content_policy_blocks_scripts(page: Path, opened: Callable[..., Any], tmp_path: Path) -> None:
    """Even unescaped, a script does not run."""
    spoilt = tmp_path / "spoilt.html"
    attack = "<p id=here></p><script>document.body.id = 'run'</script>"
    spoilt.write_text(page.read_text().replace("<main>", f"<main>{attack}"))
    tab = opened(1280).context.new_page()
    tab.goto(spoilt.as_uri())
    assert tab.query_selector("#here") is not None
    assert tab.evaluate("document.body.id") == ""

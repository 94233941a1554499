"""The page as people see it: in a real browser, wide and narrow, light and dark."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedgraft.report.html import comparison_page, run_page
from tests.report.chromium import Chromium, find
from tests.report.conftest import made_record

PROGRAM = find()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="no Chromium here, so nobody looks at the page (Debian: apt install chromium)"),
]
LOOKS = [(width, dark) for width in (1200, 400) for dark in (False, True)]

CONTRAST = """(() => {
  const channel = c => (c /= 255, c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const numbers = colour => (colour.match(/[\\d.]+/g) || []).map(Number);
  const ground = node => {
    for (; node; node = node.parentElement) {
      const colour = numbers(getComputedStyle(node).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const poor = [];
  for (const node of document.body.querySelectorAll("*")) {
    if (![...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim())) continue;
    if (node.closest("title, desc") || node.closest(".on-dark, .on-bright")) continue;
    const style = getComputedStyle(node);
    const [a, b] = [luminance(numbers(node.ownerSVGElement ? style.fill : style.color)), luminance(ground(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) poor.push(`${node.tagName}.${node.getAttribute("class")} ${ratio.toFixed(2)}`);
  }
  return [...new Set(poor)];
})()"""

CUT_OFF = """(() => {
  const width = document.documentElement.clientWidth;
  return [...document.body.querySelectorAll("*")]
    .filter(node => !node.closest(".scroll, pre, .skip") && node.getBoundingClientRect().right > width + 1)
    .map(node => node.tagName + " " + node.textContent.slice(0, 40));
})()"""

LETTERS = """(() => {
  const scale = svg => svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
  const texts = [...document.querySelectorAll("figure svg text")];
  return Math.min(...texts.map(node => parseFloat(getComputedStyle(node).fontSize) * scale(node.ownerSVGElement)));
})()"""

FRAMES = """[...document.querySelectorAll(".scroll")].filter(node => node.scrollWidth > node.clientWidth + 1)
  .map(node => node.tabIndex === 0 && node.clientWidth <= innerWidth)"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    assert PROGRAM is not None
    chromium = Chromium(PROGRAM, tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Pages on disk by name; names and values are longer than any line."""
    long = [f"client-{'long' * 12}-{number}" for number in range(9)]
    stopped = made_record(done=1, environment={}, folder=Path("a-folder-with-a-name-" + "as-long-" * 12 + "as-this"))
    wide = made_record(long, layers=48, per_layer=2, rounds=40)
    wide.recipe["model"]["name"] = "/models/" + "a-model-with-a-very-long-name-" * 4
    documents = {
        "run": run_page(made_record()),
        "wide": run_page(wide),
        "stopped": run_page(stopped),
        "comparison": comparison_page([made_record(), wide, stopped]),
    }
    folder = tmp_path_factory.mktemp("pages")
    for name, document in documents.items():
        (folder / f"{name}.html").write_text(document, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in documents}


@pytest.mark.parametrize("name", ["run", "wide", "stopped", "comparison"])
def test_opens_quietly_and_can_be_read(browser, files, name):
    for width, dark in LOOKS:
        look = f"{name}, {width} px, {'dark' if dark else 'light'}"
        browser.go(files[name], width, dark)
        assert browser.complaints() == [], look
        assert [url for url in browser.requests() if not url.startswith("data:")] == [files[name].as_uri()], look
        assert browser.evaluate("innerWidth") == width
        assert browser.evaluate("document.documentElement.scrollWidth") <= width, look
        assert browser.evaluate(CUT_OFF) == [], look
        assert browser.evaluate(CONTRAST) == [], look
        paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, paper.removeprefix("rgb(").removesuffix(")").split(","))) < 384) == dark, look
        assert browser.evaluate(LETTERS) >= 10, look


def test_the_tables_of_a_narrow_page_scroll_in_their_own_frames(browser, files):
    browser.go(files["wide"], 400, False)
    frames = browser.evaluate(FRAMES)
    assert frames
    assert all(frames)


def test_the_browser_would_complain(browser, tmp_path):
    """The checks above see an error, a request, a page that is too wide and grey on grey."""
    page = tmp_path / "bad.html"
    page.write_text(
        '<meta name="viewport" content="width=device-width"><body style="background:#fff"><script>console.error(1); nothing()</script>'
        '<img src="x.png"><p style="width:900px;color:#aaa">pale</p>'
    )
    browser.go(page, 400, False)
    assert {event["method"] for event in browser.complaints()} == {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"}
    assert len(browser.requests()) == 2
    assert browser.evaluate("document.documentElement.scrollWidth") > 400
    assert browser.evaluate(CONTRAST) == ["P.null 2.32"]
    assert browser.evaluate(CUT_OFF)

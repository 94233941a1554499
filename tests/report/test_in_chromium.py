"""The page as people see it: in a real browser, wide and narrow, light and dark."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fedgraft.report.html import comparison_page, run_page
from tests.report.chromium import Chromium, find
from tests.report.conftest import made_record, measured_record
from tests.report.test_html import named, seeded

PROGRAM = find()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="no Chromium here, so nobody looks at the page (Debian: apt install chromium)"),
]
LOOKS = [(width, dark) for width in (1280, 390) for dark in (False, True)]

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


TABLE = """[...document.querySelectorAll("table[data-sorts]")].find(table => table.getAttribute("aria-label") === "{label}")"""
ROWS = "[..." + TABLE + ".tBodies[0].rows].map(row => row.cells[0].textContent)"
HEADING = TABLE + ".tHead.rows[0].cells[{column}].firstChild"

EVERY_COLUMN = """(() => {
  const wrong = [], empty = ["", "–", "nan"];
  for (const table of document.querySelectorAll("table[data-sorts]")) {
    const number = text => Number((text.replaceAll(",", "").match(/^[+-]?[\\d.]+/) || ["NaN"])[0]);
    [...table.tHead.rows[0].cells].forEach((heading, at) => {
      heading.firstChild.click();
      const told = [...table.tBodies[0].rows].map(row => row.cells[at].textContent.trim());
      const first = told.findIndex(text => empty.includes(text)), known = told.filter(text => !empty.includes(text));
      const ordered = known.map(number).every((value, n, all) => Number.isNaN(value) || n === 0 || all[n - 1] <= value);
      if (at > 0 && !ordered || first >= 0 && first < known.length) wrong.push(`${table.ariaLabel}: ${heading.textContent}: ${told}`);
    });
  }
  return wrong;
})()"""

HIDDEN = """[...document.querySelectorAll(".scroll")]
  .filter(node => !node.closest("details:not([open])") && getComputedStyle(node).overflowX !== "visible").map(node => node.ariaLabel)"""

DRAWN = """[...document.querySelectorAll("figure")].filter(figure => {
  const drawing = figure.querySelector("svg[role=img]"), box = drawing.getBoundingClientRect();
  const inside = [...drawing.querySelectorAll("path, rect, line, tspan")].some(part => part.getBoundingClientRect().width > 0);
  return box.width > 100 && box.height > 30 && inside;
}).map(figure => figure.id)"""

SERIES = """(() => {
  const figure = document.getElementById("{figure}");
  const parts = [...figure.querySelectorAll("svg [data-series]")];
  const seen = part => getComputedStyle(part).display !== "none" && getComputedStyle(part).opacity > 0.5;
  return {
    lines: parts.filter(part => part.matches(".line, .mark") && seen(part)).map(part => Number(part.dataset.series)),
    bands: parts.filter(part => part.matches(".band") && getComputedStyle(part).display !== "none")
      .map(part => Number(part.dataset.series)),
    pressed: [...figure.querySelectorAll(".legend button")].map(button => button.getAttribute("aria-pressed")),
  };
})()"""


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
        "measured": run_page(measured_record()),
        "many": comparison_page([named(f"m{at}", at) for at in range(12)]),
        "wide": run_page(wide),
        "stopped": run_page(stopped),
        "comparison": comparison_page([made_record(), wide, stopped]),
        "seeds": comparison_page([measured_record(lift=seed / 10, recipe=seeded(seed)) for seed in range(3)] + [named("fedavg")]),
    }
    folder = tmp_path_factory.mktemp("pages")
    for name, document in documents.items():
        (folder / f"{name}.html").write_text(document, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in documents}


@pytest.mark.parametrize("name", ["run", "measured", "wide", "stopped", "comparison", "many", "seeds"])
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
    browser.go(files["wide"], 390, False)
    frames = browser.evaluate(FRAMES)
    assert frames
    assert all(frames)


@pytest.mark.parametrize("press", ["click", "Enter", " "])
def test_tables_sort_by_click_and_by_key(browser, files, press):
    """By mean loss: m0 is the best and m11 the worst; the third press brings back the order of the page."""
    browser.go(files["many"], 1280, False)
    label, heading = "response loss (nats/token)", HEADING.replace("{column}", "1")
    rows, heading = (expression.replace("{label}", label) for expression in (ROWS, heading))
    given = browser.evaluate(rows)
    assert given == ["base", *(f"m{at}" for at in range(12))]
    orders = []
    for _ in range(3):
        browser.press(heading, press)
        orders.append((browser.evaluate(f"{heading}.parentElement.ariaSort"), browser.evaluate(rows)))
    by_loss = browser.evaluate(rows.replace("row.cells[0].textContent", "[Number(row.cells[1].textContent), row.cells[0].textContent]"))
    ascending = [name for _, name in sorted(by_loss, key=lambda pair: pair[0])]  # rows of equal loss stay as they were
    descending = [name for _, name in sorted(by_loss, key=lambda pair: -pair[0])]
    assert ascending != given
    assert orders == [("ascending", ascending), ("descending", descending), ("none", given)]
    assert browser.complaints() == []


def test_every_table_that_says_so_sorts_by_every_column(browser, files):
    """All pages: cells that are told apart by their numbers come in the order of these, those without one last."""
    for path in files.values():
        browser.go(path, 1280, False)
        assert browser.evaluate(EVERY_COLUMN) == [], path.name


@pytest.mark.parametrize(("name", "count"), [("measured", 22), ("many", 8), ("seeds", 10)])
def test_every_figure_is_drawn(browser, files, name, count):
    for width, dark in LOOKS:
        browser.go(files[name], width, dark)
        ids = browser.evaluate("[...document.querySelectorAll('figure')].map(figure => figure.id)")
        assert len(ids) == count, ids
        assert browser.evaluate(DRAWN) == ids


@pytest.mark.parametrize("press", ["click", "Enter", " "])
def test_an_entry_of_a_legend_that_is_pressed_brings_out_its_series(browser, files, press):
    browser.go(files["seeds"], 1280, False)
    state, entry = SERIES.replace("{figure}", "experts-drift"), "document.querySelectorAll('#experts-drift .legend button')[1]"
    before = browser.evaluate(state)
    assert before == {"lines": [0, 1], "bands": [0], "pressed": ["false", "false"]}
    browser.press(entry, press)
    assert browser.evaluate(state) | {"bands": []} == {"lines": [1], "bands": [], "pressed": ["false", "true"]}
    browser.press(entry, press)
    browser.rest()
    assert browser.evaluate(state) == before


def test_of_many_bands_one_is_seen_when_its_entry_is_pressed(browser, tmp_path):
    page = tmp_path / "page.html"
    runs = [named(f"m{at}", at + seed * 9) for at in range(4) for seed in (0, 1)]
    runs = [dataclasses.replace(run, recipe=seeded(at % 2, f"m{at // 2}")) for at, run in enumerate(runs)]
    page.write_text(comparison_page(runs), encoding="utf-8")
    browser.go(page, 390, True)
    state = SERIES.replace("{figure}", "experts-drift")
    assert browser.evaluate(state)["bands"] == []
    browser.press("document.querySelectorAll('#experts-drift .legend button')[2]", "click")
    assert browser.evaluate(state) == {"lines": [2], "bands": [2], "pressed": ["false", "false", "true", "false"]}


def test_a_screen_reader_hears_figures_tables_and_their_order(browser, files):
    browser.go(files["measured"], 1280, False)
    nodes = [node for node in browser.ask("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    heard = {(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes}
    titles = browser.evaluate("[...document.querySelectorAll('svg[role=img] > title')].map(title => title.textContent)")
    assert len(titles) == 22
    images = {name for role, name in heard if role in {"image", "img"}}
    assert all(any(name.startswith(title) for name in images) for title in titles)
    assert ("table", "response loss (nats/token)") in heard
    assert ("columnheader", "personal") in heard
    assert ("button", "personal") in heard
    assert ("main", "") in heard


def test_a_printed_page_shows_all_and_nothing_to_press(browser, files):
    for name in ("measured", "many", "wide"):
        browser.go(files[name], 794, False)
        browser.ask("Emulation.setEmulatedMedia", media="print")
        try:
            assert browser.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
            assert browser.evaluate(HIDDEN) == [], name
            assert browser.evaluate("document.documentElement.scrollWidth") <= 794, name
        finally:
            browser.ask("Emulation.setEmulatedMedia", media="")


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

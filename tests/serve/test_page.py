"""The page in a real browser: models are chosen, asked and set side by side."""

from __future__ import annotations

import json
import time

import pytest

import fedgraft
from fedgraft.serve.keys import make_keys, read_keys
from tests.report.chromium import Chromium, find
from tests.report.test_in_chromium import CONTRAST, CUT_OFF, LOOKS

PROGRAM = find()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="no Chromium here, so nobody looks at the page (Debian: apt install chromium)"),
]


class Address(str):
    """An address where the browser expects a file."""

    def as_uri(self):
        return str(self)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium = Chromium(PROGRAM, tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.close()


def until(browser, expression):
    end = time.monotonic() + 30
    while not browser.evaluate(expression):
        assert time.monotonic() < end, browser.evaluate("document.body.innerText")
        time.sleep(0.05)


def send(browser, text):
    browser.evaluate(f"document.querySelector('#message').value = {json.dumps(text)}; document.querySelector('#send').click()")
    until(browser, "document.querySelector('#send').textContent === 'Send' && !document.querySelector('#message').value")


TURNS = """[...document.querySelectorAll("section")].map(s => [s.querySelector("h2").textContent,
  ...[...s.querySelectorAll("p:not(.note)")].map(p => p.textContent)])"""


def test_models_answer_side_by_side_and_remember(serving, browser):
    server = serving()
    browser.go(Address(f"{server.url}/"), 1200, False)
    until(browser, "document.querySelectorAll('#models input').length === 5")
    browser.evaluate("document.querySelector('#length').value = 12; document.querySelector('input[value=garden]').click()")
    assert browser.evaluate("[...document.querySelectorAll('section h2')].map(h => h.textContent)") == [
        "base",
        "shared",
        "bakery",
        "garden",
    ]
    send(browser, "How many <b>beans</b>?")
    send(browser, "And boats?")
    turns, client = browser.evaluate(TURNS), server.client()
    for name, first, one, second, two in turns:
        said = [{"role": "user", "content": first}]
        wish = {"model": name, "temperature": 0, "max_tokens": 12}
        assert client.chat.completions.create(messages=said, **wish).choices[0].message.content == one
        said += [{"role": "assistant", "content": one}, {"role": "user", "content": second}]
        assert client.chat.completions.create(messages=said, **wish).choices[0].message.content == two
    assert [first for _, first, *_ in turns] == ["How many <b>beans</b>?"] * 4
    assert browser.evaluate("document.querySelectorAll('section b').length") == 0
    assert {url.split("/")[2] for url in browser.requests() if not url.startswith("data:")} == {server.url.split("/")[2]}
    assert browser.complaints() == []
    browser.evaluate("document.querySelector('#forget').click()")
    assert all(len(turn) == 1 for turn in browser.evaluate(TURNS))


def test_can_be_read_wide_and_narrow_light_and_dark(serving, browser):
    server = serving()
    for width, dark in LOOKS:
        browser.go(Address(f"{server.url}/"), width, dark)
        until(browser, "document.querySelectorAll('#models input').length === 5")
        browser.evaluate("document.querySelector('#length').value = 40")
        send(browser, "How many boats are there on the third day, and who says so?" + "x" * 80)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        assert browser.evaluate(CONTRAST) == []
        if width < 600:
            assert browser.evaluate(CUT_OFF) == []
        assert browser.complaints() == []


def test_a_key_is_asked_for_and_opens_its_models(serving, trained, browser, tmp_path):
    names = fedgraft.load(trained("flex").folder).models
    make_keys(tmp_path / "keys.json", names)
    keys = {entry["name"]: entry["key"] for entry in json.loads((tmp_path / "keys.json").read_text())["keys"]}
    server = serving(read_keys(tmp_path / "keys.json", names))
    browser.go(Address(f"{server.url}/"), 1200, False)
    until(browser, "!document.querySelector('#unlock').hidden")
    unlock = "document.querySelector('#key').value = {}; document.querySelector('#unlock button').click()"
    browser.evaluate(unlock.format("'wrong'"))
    until(browser, "document.querySelector('#status').textContent.includes('not known')")
    browser.evaluate(unlock.format(json.dumps(keys["garden"])))
    until(browser, "document.querySelectorAll('#models input').length === 3")
    send(browser, "How many beans?")
    assert [turn[0] for turn in browser.evaluate(TURNS)] == ["base", "shared", "garden"]

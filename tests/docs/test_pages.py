"""What the documentation names exists, what is generated is fresh, and the site builds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from typing import get_args

import pytest

from fedgraft.deployment.site_settings import SiteSettings
from fedgraft.recipe import Recipe, load_recipe
from fedgraft.settings import Section
from fedgraft.yaml_text import read_yaml
from tests.docs.pages import DOCS, GENERATED, RECORDS, ROOT, WRITTEN, blocks
from tools.docs import reference

KINDS = {name: get_args(field.annotation) or (field.annotation,) for name, field in Recipe.model_fields.items()}
SECTIONS = {
    name: list(dict.fromkeys(key for kind in kinds for key in kind.model_fields))
    for name, kinds in KINDS.items()
    if all(isinstance(kind, type) and issubclass(kind, Section) for kind in kinds)
}
CODE = re.compile(r"`([^`\n]+)`")


@pytest.mark.parametrize(("file", "text"), reference.pages().items(), ids=lambda value: value.name if hasattr(value, "name") else "")
def test_generated_page_is_fresh(file, text):
    assert file.read_text(encoding="utf-8") == text, f"{file.relative_to(ROOT)} is out of date; run: make docs"


def test_the_generated_pages_are_those_the_tests_know():
    assert {path.relative_to(DOCS).as_posix() for path in reference.pages()} == set(GENERATED)


def test_reference_has_every_key_and_option():
    text = reference.recipe_page()
    for section, keys in SECTIONS.items():
        table = text.partition(f"## {section}\n")[2].partition("\n## ")[0]
        assert list(dict.fromkeys(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))) == keys
    assert all(f"## {name}\n" in reference.cli_page() for name in commands())


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.stem)
def test_named_keys_and_commands_exist(page):
    for code in CODE.findall(page.read_text(encoding="utf-8")):
        section, dot, key = code.partition(".")
        if dot and section in SECTIONS and not code.endswith((".json", ".yaml")) and (word := re.match(r"\w+", key)):
            assert word[0] in SECTIONS[section] or section == "method", f"{page.name}: {code}"
        if (command := re.match(r"fedgraft (\w+)", code)) and not code.startswith("fedgraft --"):
            assert command[1] in commands(), f"{page.name}: {code}"


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.stem)
def test_recipes_on_the_page_are_valid(page):
    for block in blocks(page):
        if block.title == "site.yaml":
            SiteSettings.model_validate(read_yaml(block.text, f"{page.name}, line {block.line}"))
        elif block.language == "yaml":
            load_recipe(read_yaml(block.text, f"{page.name}, line {block.line}"))


def test_commands_stand_in_fenced_blocks_only():
    """An indented block would not be run; the records are exempt."""
    for page in WRITTEN:
        outside = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        assert not re.search(r"^ {4,}(fedgraft|make|pip|python) ", outside, re.MULTILINE), page.name
    assert all((DOCS / name).is_file() for name in RECORDS)


@pytest.mark.parametrize("drawing", sorted((DOCS / "drawings").glob("*.svg")), ids=lambda path: path.stem)
def test_drawing_has_a_text_alternative_and_a_dark_dress(drawing):
    root = ElementTree.parse(drawing).getroot()
    words = {child.tag.rpartition("}")[2]: child.text or "" for child in root}
    assert words["title"]
    assert len(words["desc"].split()) > 20
    assert "prefers-color-scheme: dark" in words["style"]
    assert any(re.search(rf"!\[[^\]]{{40,}}\]\(drawings/{drawing.name}\)", page.read_text(encoding="utf-8")) for page in WRITTEN)


def test_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    site = tmp_path / "site"
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    done = subprocess.run(words, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    names = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    assert {page.relative_to(DOCS).with_suffix(".html").as_posix() for page in DOCS.rglob("*.md")} <= names
    fetched = re.compile(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\"']?(?:https?:)?//[^>]*>")
    assert [tag for name in sorted(names) for tag in fetched.findall((site / name).read_text(encoding="utf-8"))] == []


def commands() -> set[str]:
    return set(reference.get_command(reference.app).commands)

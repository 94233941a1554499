"""Every command and Python block of the documentation is carried out, page by page, in an empty folder.

A page is followed from top to bottom as a reader would: a block with a title is saved under it, `fedgraft` runs in this process, other
commands in a shell. Comments above a block, which readers don't see, say what is different here: `run smaller` gives every run further
settings, `begins with` follows another page first, `not run` leaves a block out and says why.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fedgraft import recipe, runner
from tests.docs.pages import ROOT, WRITTEN, Block, blocks, commands
from tests.run.conftest import command  # noqa: F401  # a fixture

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in Click:DeprecationWarning")


def with_blocks() -> list[Path]:
    return [page for page in WRITTEN if any(runs(block) for block in blocks(page))]


def runs(block: Block) -> bool:
    return "not run" not in block.marks and (block.language == "bash" or (block.language == "python" and not block.title))


@pytest.fixture
def follow(command, monkeypatch, tmp_path):  # noqa: F811
    """Follow a page up to a block that it holds, or to its end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    original = runner.run

    def fedgraft(words: list[str], place: str) -> None:
        done = command(*words)
        assert done.code == 0, f"{place}: fedgraft {shlex.join(words)}\n{done.out}{done.err}"

    def shell(line: str, place: str) -> None:
        done = subprocess.run(["bash", "-euc", line], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{place}: {line}\n{done.stdout}{done.stderr}"

    def carry_out(block: Block, place: str) -> None:
        smaller = shlex.split(block.marks.get("run smaller", ""))

        def run_smaller(*arguments, overrides=None, **options):
            return original(*arguments, overrides=[*smaller, *(overrides or [])], **options)

        monkeypatch.setattr(runner, "run", run_smaller)
        if block.language == "python":
            exec(compile(block.text, place, "exec"), {})
            return
        for line in commands(block.text):
            words = shlex.split(line, comments=True)
            if words[0] == "fedgraft":
                fedgraft(words[1:], place)
            else:
                shell(line, place)

    def do(page: Path) -> None:
        for block in blocks(page):
            place = f"{page.relative_to(ROOT)}, line {block.line}"
            if "begins with" in block.marks:
                for earlier in blocks(ROOT / block.marks["begins with"]):
                    save(earlier)
                shell(f"python {shlex.quote(next(iter(Path().glob('make_*.py'))).name)}", place)
            save(block)
            if runs(block):
                carry_out(block, place)

    return do


def save(block: Block) -> None:
    if block.title:
        Path(block.title).write_text(block.text, encoding="utf-8")


@pytest.mark.parametrize("page", with_blocks(), ids=lambda page: page.stem)
def test_page_can_be_followed(follow, page):
    follow(page)


def test_a_failing_command_is_noticed(follow, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    for text in ("fedgraft run nowhere.yaml", "cat nowhere.txt"):
        page.write_text(f"Text.\n\n```bash\n{text}\n```\n")
        with pytest.raises(AssertionError, match=r"page\.md, line 3: .*nowhere"):
            follow(page)


def test_what_is_not_run_says_why():
    reasons = [block.marks["not run"] for page in WRITTEN for block in blocks(page) if "not run" in block.marks]
    assert reasons
    assert all(len(reason.split()) >= 3 for reason in reasons)


def test_smaller_settings_are_settings():
    for page in WRITTEN:
        for block in blocks(page):
            recipe.load_recipe({}, shlex.split(block.marks.get("run smaller", "")))

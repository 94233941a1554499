"""A tiny world on disk, the process that forks killable runs, and the command line in process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import PreTrainedTokenizerFast

from fedgraft.report.record import Record
from fedgraft.runner import run
from tests.run.world import World, build

with warnings.catch_warnings():  # typer imports names that click deprecates
    warnings.simplefilter("ignore", DeprecationWarning)
    from fedgraft import cli

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TERM": "dumb", "COLUMNS": "100"}


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> World:
    return build(tmp_path_factory.mktemp("world"), tiny_tokenizer)


@pytest.fixture(scope="session")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> Record:
    """One finished FLEx run; not to be changed."""
    return run(world.recipe(), out=tmp_path_factory.mktemp("finished") / "flex")


@pytest.fixture(scope="session")
def driver(world: World) -> Iterator[Callable[..., dict[str, Any]]]:
    """`driver(recipe=, out=)` or `driver(folder=, rounds=)`, and `kill_after=` or `crash_at=`: one forked run and how it ended."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.run.driver"],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def send(job: dict[str, Any]) -> None:
        process.stdin.write(json.dumps({name: value for name, value in job.items() if value is not None}) + "\n")
        process.stdin.flush()

    def ask(**job: Any) -> dict[str, Any]:
        send({name: str(value) if isinstance(value, Path) else value for name, value in job.items()})
        answer = process.stdout.readline()
        assert answer, "the driver is gone"
        return dict(json.loads(answer))

    send(world.recipe())
    yield ask
    process.stdin.close()
    process.wait(timeout=30)
    process.stdout.close()


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`command("run", ...)`: the command line as `python -m fedgraft` would do it, in this process."""
    monkeypatch.setenv("COLUMNS", "100")

    def do(*words: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["fedgraft", *map(str, words)])
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        return Outcome(code, *capfd.readouterr())

    return do

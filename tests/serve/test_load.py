"""Many at once: no crash, no leak, and nobody gets the answer of another's model."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import httpx
import pytest
import torch

import fedgraft
from tests.run.conftest import ENVIRONMENT, ROOT
from tests.serve.load import TOKENS, storm

QUESTIONS = ["How many boats on day 3?", "Beans?", "How many loafs are there on day 12?"]


@pytest.fixture(scope="module")
def expected(trained):
    """What every model says by itself."""
    loaded, found = fedgraft.load(trained("flex").folder), {}
    for name in loaded.models:
        for question in QUESTIONS:
            ids = torch.tensor([loaded.prompt(question)])
            with loaded.using(name) as model:
                found[name, question] = loaded.decode(model.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0, ids.shape[1] :])
    assert len(set(found.values())) > 10
    return found


def test_nobody_gets_another_s_answer(serving, expected):
    server = serving(batch=6)
    assert storm(server.url, expected, 64) == []
    assert server.service.scheduler.alive


def served(folder, *words):
    """A server in a process of its own, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fedgraft", "serve", str(folder), "--port", "0", *words],
        cwd=ROOT,
        env=ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])},
        stdout=subprocess.PIPE,
        text=True,
    )
    return process, process.stdout.readline().strip()


@pytest.mark.slow
def test_a_process_stops_with_0_when_it_is_told_to(trained):
    process, url = served(trained("flex").folder, "--quiet")
    with process:
        try:
            assert httpx.get(f"{url}/health", timeout=30).status_code == 200
            process.terminate()
            assert process.wait(120) == 0
        finally:
            process.kill()


@pytest.mark.deploy
def test_a_thousand_requests_leave_the_memory_as_it_was(trained, expected):
    process, url = served(trained("flex").folder, "--quiet")
    with process:
        try:
            assert storm(url, expected, 400) == []
            before = memory(url)
            assert storm(url, expected, 1000) == []
            assert memory(url) / before == pytest.approx(1, abs=0.05)
            process.terminate()
            assert process.wait(120) == 0
        finally:
            process.kill()  # before the block waits for its end


def memory(url):
    text = httpx.get(f"{url}/metrics", timeout=30).text
    return float(re.search(r"^fedgraft_resident_bytes (\S+)$", text, re.MULTILINE)[1])

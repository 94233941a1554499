"""A site behind a run: the same bits as in process, with a worker that dies and without any."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading

import pytest

from fedgraft import files
from fedgraft.deployment import door, forward, service
from fedgraft.deployment.guard import Guard
from fedgraft.deployment.place import place_of
from fedgraft.deployment.site_settings import load_site
from fedgraft.engine.wire import Frame
from fedgraft.runner import run
from tests.architecture.test_lazy import HEAVY, loaded_by
from tests.deployment.conftest import wait_for
from tests.deployment.sites import NAME, memories, outcome, over, recipe, site

ROUNDS = 3


@pytest.fixture(scope="module")
def reference(world, tmp_path_factory):
    """(what the run leaves in process, its client's memory), for FLEx with one client."""
    folder = tmp_path_factory.mktemp("reference")
    run(recipe(world, site(folder, world).parent / "rows"), out=folder / "run")
    return outcome(folder / "run"), memories(folder / "run" / "clients" / NAME)


def own_memories(file):
    (folder,) = (place_of(file).state / "runs").iterdir()
    return memories(folder / "clients" / NAME)


class Forked:
    """A worker in a child of this process, which spares it the imports."""

    def __init__(self, file):
        self.pid, self.code = os.fork(), None
        if self.pid == 0:
            try:
                service.work(file)
            finally:
                os._exit(int(sys.exc_info()[0] is not None))
        place = place_of(file).door
        wait_for(lambda: listens(place) == self.pid)

    def ended(self):
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code

    def kill(self):
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)
        return self.ended()


def listens(place):
    try:
        return forward.status(place)["pid"]
    except ConnectionError:
        return None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and kill -9")
def test_a_worker_killed_between_rounds_leaves_no_trace_in_the_bits(world, tmp_path, reference):
    file = site(tmp_path, world)
    place, workers = place_of(file), [Forked(file)]

    def before(number):
        if number == 2:  # the choice of experts was question 0, so a round is behind it and two lie ahead
            assert workers[-1].kill() == -signal.SIGKILL
            workers.append(Forked(file))

    try:
        run(recipe(world, tmp_path / "rows"), out=tmp_path / "run", connect=over(forward.to_site(socket=place.door), before))
        status = forward.status(place.door)
        forward.stop(place.door)
        assert workers[-1].ended() == 0
    finally:
        for worker in workers:
            worker.kill()
    assert (outcome(tmp_path / "run"), own_memories(file)) == reference
    assert (status["pid"], status["answered"]) == (workers[-1].pid, ROUNDS)  # two rounds and the evaluation
    verdicts = [line["verdict"] for line in files.read_lines(place.log)]
    assert verdicts == ["loaded", "answered", "answered", "loaded", *["answered"] * ROUNDS]
    assert not (place.door / door.SOCKET).exists()


def test_without_a_worker_it_is_slow_and_says_so(world, tmp_path, reference, caplog):
    file = site(tmp_path, world)
    with caplog.at_level(logging.INFO, logger="fedgraft"):
        run(recipe(world, tmp_path / "rows"), out=tmp_path / "run", connect=over(forward.to_site(settings=file)))
    assert (outcome(tmp_path / "run"), own_memories(file)) == reference
    warned = [entry.getMessage() for entry in caplog.records if entry.levelno == logging.WARNING]
    assert len(warned) == ROUNDS + 2
    assert "loads base model and rows for every question" in warned[0]
    verdicts = [line["verdict"] for line in files.read_lines(place_of(file).log)]
    assert verdicts == ["loaded", "answered"] * (ROUNDS + 2)


def test_the_base_is_loaded_once_and_the_log_says_so(world, tmp_path, reference):
    settings, place = load_site(site(tmp_path, world))
    told = []
    guard = Guard(settings=settings, place=place, tell=told.append)
    run(recipe(world, tmp_path / "rows"), out=tmp_path / "run", connect=over(lambda request, partition: guard.handle(request)))
    assert (outcome(tmp_path / "run"), own_memories(tmp_path / "site.yaml")) == reference
    assert [line for line in told if "loading the base" in line] == [f"loading the base model {world.model}"]
    lines = files.read_lines(place.log)
    assert [line.get("question") for line in lines] == [None, "graft", *["train"] * ROUNDS, "evaluate"]
    assert [line.get("round") for line in lines] == [None, 0, *range(ROUNDS), ROUNDS]
    assert lines[2]["trees"].keys() == {"shared"}
    assert lines[2]["trees"]["shared"]["places"] == ["attention"]
    assert all(line["bytes"] > 0 and len(line["sha256"]) == 64 for line in lines[1:])


def test_no_worker_and_no_settings_is_a_refusal(tmp_path):
    answer = forward.to_site(socket=tmp_path)(Frame(kind="leave", facts={"run": "a"}).encode(), None)
    assert "start it with: fedgraft site" in Frame.decode(answer).facts["reason"]
    with pytest.raises(ValueError, match=r"name the site's settings"):
        forward.to_site()


def test_a_worker_that_is_gone_in_mid_question_is_a_refusal(tmp_path, start):
    process = start(tmp_path / "door")
    handle = forward.to_site(socket=tmp_path / "door")
    assert handle(b"echo:hello", None) == b"hello"
    wait = tmp_path / "never"

    def killed():
        wait_for(wait.with_name("never.begun").exists)
        process.kill()

    killer = threading.Thread(target=killed)
    killer.start()
    reason = Frame.decode(handle(f"wait:{wait}".encode(), None)).facts["reason"]
    killer.join()
    assert "went away in the middle" in reason


@pytest.mark.parametrize("options", [[], ["--loopback"]], ids=["unix", "loopback"])
@pytest.mark.parametrize("length", [1001, 5_000_000])
def test_what_the_worker_does_not_take_says_why(tmp_path, start, options, length):
    start(tmp_path / "door", *options)
    handle = forward.to_site(socket=tmp_path / "door")
    answer = Frame.decode(handle(b"x" * length, None))
    assert answer.kind == "refused"
    assert "at most 1000" in answer.facts["reason"] or "went away" in answer.facts["reason"]
    assert handle(b"echo:next", None) == b"next"


def test_the_forwarding_process_loads_neither_torch_nor_pydantic():
    assert loaded_by("import fedgraft.deployment.forward") & HEAVY == set()

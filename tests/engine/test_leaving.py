"""A client that leaves a run over a grid: not asked again, nothing of it merged, and the record says from when on."""

from __future__ import annotations

import json

import pytest

from fedgraft import reach, runner
from fedgraft.report.html import run_page
from fedgraft.trouble import Stopped
from tests.engine.test_flower import Watch, digests, flower
from tests.methods.harness import ROWS
from tests.run.world import contents

LEAN = {"federation": {"rounds": 3}}
KEPT = {"keep_replies": True}


class Gone:
    """Whether a client is let in: `name` is not any more once it was asked so many training questions."""

    def __init__(self, grid, name: str, after: int) -> None:
        self.grid, self.name, self.after = grid, name, after

    def __call__(self, client: str) -> bool:
        asked = [one for one in self.grid.requests if one.facts.get("question") == "train" and one.facts.get("client") == self.name]
        return client != self.name or len(asked) < self.after


def lines(folder):
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_bytes().splitlines()]


def asked(grid, name):
    return [one.facts["question"] for one in grid.requests if one.facts.get("client") == name]


def test_what_comes_after_the_leave_is_not_merged(place, tmp_path, grid_of):
    """It leaves while its second reply is on the way."""
    grid, watch = grid_of(), Watch()
    recipe = flower(place.recipe("fedavg", **LEAN), **KEPT)
    name = sorted(ROWS)[1]
    record = runner.run(recipe, out=tmp_path / "afar", connect=reach.over(grid, admitted=Gone(grid, name, 2)), progress=watch)
    assert [name in line["clients"] for line in record.rounds] == [True, False, False]
    assert [line.get("left") for line in record.rounds] == [None, [name], [name]]
    assert record.further["left"] == {name: 1}
    assert name not in record.results
    assert f"{name} before round 2" in run_page(record)
    assert asked(grid, name) == ["train", "train"]
    assert [text for text in watch.warnings if "has left" in text] == [
        f"client {name!r} has left the federation: nothing of it is in round 2 and after"
    ]
    assert [path.parent.parent.name for path in (tmp_path / "afar" / "replies").glob(f"*/*/{name}.safetensors")] == ["round-00000"]


def test_a_stopped_run_goes_on_without_the_one_that_left(place, tmp_path, grid_of):
    """With the same bits as if it had not been stopped; what depends on all clients' names stays as it began."""
    recipe = flower(place.recipe("hetlora", options={"ranks": [4, 2, 3]}, **LEAN))
    through, grid = grid_of(folder=tmp_path / "through-sites"), grid_of(folder=tmp_path / "stopped-sites")
    name = sorted(ROWS)[0]
    runner.run(recipe, out=tmp_path / "through", connect=reach.over(through, admitted=Gone(through, name, 2)))
    with pytest.raises(Stopped):  # in round 3
        runner.run(recipe, out=tmp_path / "stopped", connect=reach.over(grid, admitted=Gone(grid, name, 2)), progress=Watch(6))
    grid.nodes = {number: node for number, node in grid.nodes.items() if node.partition != 0}
    runner.resume(tmp_path / "stopped", connect=reach.over(grid, admitted=lambda client: client != name))
    assert digests(tmp_path / "stopped")["state"] == digests(tmp_path / "through")["state"]
    assert [line.get("left") for line in lines(tmp_path / "stopped")] == [None, [name], [name]]


def test_when_all_have_left_the_run_ends(place, tmp_path, grid_of):
    with pytest.raises(ValueError, match=r"all clients have left the federation.*continue with"):
        runner.run(
            flower(place.recipe("fedavg", **LEAN)), out=tmp_path / "afar", connect=reach.over(grid_of(), admitted=lambda client: False)
        )


def test_replies_are_kept_alike_on_every_engine_and_dropped_without_a_commit(place, tmp_path, grid_of):
    recipe = place.recipe("scaffold", **LEAN)
    here = runner.run(recipe | {"engine": KEPT}, out=tmp_path / "here")
    runner.run(flower(recipe, **KEPT), out=tmp_path / "afar", connect=reach.over(grid_of()))

    def kept(folder):
        return sorted(contents(folder / "replies"))

    assert kept(tmp_path / "here") == kept(tmp_path / "afar")
    assert len(kept(tmp_path / "here")) == 1 + 3 * (3 + 1)
    with pytest.raises(Stopped):
        runner.run(recipe | {"engine": KEPT}, out=tmp_path / "stopped", progress=Watch(5))  # in round 2
    stray = tmp_path / "stopped" / "replies" / "round-00002" / "0-train" / "nobody.safetensors"
    stray.parent.mkdir(parents=True)
    stray.touch()
    assert (tmp_path / "stopped" / "replies" / "round-00001").exists()
    runner.resume(tmp_path / "stopped")
    assert kept(tmp_path / "stopped") == kept(here.folder)
    merged = "replies/round-00002/merged.txt"
    assert (tmp_path / "stopped" / merged).read_bytes() == (here.folder / merged).read_bytes()


def test_a_disk_too_small_for_the_replies_is_told_before_training(place, tmp_path, monkeypatch):
    monkeypatch.setattr("fedgraft.kept.shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match=r"engine.keep_replies: the replies of all rounds take up to .* 1 kB are free"):
        runner.run(place.recipe("fedavg") | {"engine": KEPT}, out=tmp_path / "here")
    assert not (tmp_path / "here").exists()

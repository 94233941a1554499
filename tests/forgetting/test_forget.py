"""Forgetting one client: what must come out is known exactly in small cases, and by a twin of a few lines in the others."""

from __future__ import annotations

import json
import shutil

import pytest

from fedgraft import plugins
from fedgraft.bundle import Bundle
from fedgraft.forgetting.forget import NOTE, forget
from fedgraft.forgetting.redo import refuse
from fedgraft.kept import Kept
from fedgraft.report.record import Record
from fedgraft.runner import resume, run
from fedgraft.tree import digest
from tests.run.conftest import command, world  # noqa: F401  # fixtures
from tests.run.world import contents

LEAN = {
    "method": {"name": "fedavg"},
    "training": {"steps": 1},
    "evaluation": {"rows": 1, "generate": False, "models": ["personal"], "experts": False},
    "engine": {"name": "inprocess", "keep_replies": True},
}
OUT = {"join": {"harbour": 99}}  # it never takes part


def state(folder):
    return Bundle.load(folder / "state" / "state.safetensors")


def start(folder):
    return Bundle.load(folder / "replies" / "open.safetensors").tree("shared")


def reply(folder, number, client):
    return Bundle.load(folder / "replies" / f"round-{number:05d}" / "0-train" / f"{client}.safetensors")


def go(world, out, **sections):  # noqa: F811
    return run(world.recipe(**LEAN | sections), out=out).folder


@pytest.fixture(scope="module")
def three(world, tmp_path_factory):  # noqa: F811
    """Three rounds of FedAvg with three clients; not to be changed."""
    return go(world, tmp_path_factory.mktemp("three") / "run")


@pytest.fixture
def copied(three, tmp_path):
    return shutil.copytree(three, tmp_path / "run")


@pytest.fixture(scope="module")
def two(world, tmp_path_factory):  # noqa: F811
    """One round of two clients."""
    return go(world, tmp_path_factory.mktemp("two") / "run", federation={"rounds": 1, **OUT})


def test_of_two_clients_in_one_round_the_other_one_s_reply_is_left(two, tmp_path):
    done = forget(two, "garden", out=tmp_path / "new")
    assert digest(state(done.redone).tree("shared")) == digest(reply(two, 0, "bakery").tree("shared"))
    assert done.rounds == [0]


def test_a_client_that_never_took_part_leaves_no_trace_to_remove(two, tmp_path):
    done = forget(two, "harbour", out=tmp_path / "new")
    assert (done.rounds, done.redone, done.why_not) == ([], None, "")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("method", ["fedavg", "scaffold", "fedadam", "flex"])
def test_without_a_client_that_never_replied_every_merge_is_the_same(world, tmp_path, method):  # noqa: F811
    """Also of methods whose server keeps moments or control variates."""
    from fedgraft.forgetting.forget import _trained
    from fedgraft.forgetting.redo import redo
    from fedgraft.recipe import load_recipe

    folder = go(world, tmp_path / "run", method={"name": method}, federation={"rounds": 3, **OUT})
    recipe, found = load_recipe(folder / "recipe.yaml"), Record.load(folder)
    made = redo(recipe, _trained(recipe, found), Kept(folder), state(folder), "harbour", Kept(tmp_path / "new"))
    assert made.state.digest() == state(folder).digest()
    again = {path: content for path, content in contents(folder / "replies").items() if not path.startswith("open/")}
    assert contents(tmp_path / "new" / "replies") == again


def test_after_several_rounds_the_mean_changes_of_the_others_add_up(three, tmp_path):
    """The twin: start + sum over rounds of the weighted mean of (reply - what all were sent in that round); rounded to fp32 each round."""
    done = forget(three, "garden", out=tmp_path / "new")
    others, sent = ("bakery", "harbour"), {key: leaf.double() for key, leaf in start(three).items()}
    wanted = dict(sent)
    for number in range(3):
        replies = {name: reply(three, number, name) for name in (*others, "garden")}
        rows = {name: one.facts["examples"] for name, one in replies.items()}
        mean = {
            key: {
                names: sum(rows[name] * replies[name].tree("shared")[key].double() for name in names) / sum(rows[name] for name in names)
                for names in (others, (*others, "garden"))
            }
            for key in sent
        }
        wanted = {key: leaf + mean[key][others] - sent[key] for key, leaf in wanted.items()}
        sent = {key: means[*others, "garden"] for key, means in mean.items()}
    found = state(done.redone).tree("shared")
    assert found.keys() == wanted.keys()
    assert max(float((found[key] - leaf).abs().max()) for key, leaf in wanted.items()) < 1e-6
    assert max(float((found[key] - leaf).abs().max()) for key, leaf in state(three).tree("shared").items()) > 1e-5
    assert any("not training again" in note for note in done.notes)


def test_the_run_is_as_it_was_and_the_new_folder_does_not_know_the_client(three, tmp_path):
    before = contents(three)
    done = forget(three, "garden", out=tmp_path / "new")
    assert {path: content for path, content in contents(three).items() if path != ".lock"} == {
        path: content for path, content in before.items() if path != ".lock"
    }
    texts = {path: content for path, content in contents(done.redone).items() if path not in {NOTE, "recipe.yaml"}}
    assert [path for path, content in texts.items() if b"garden" in content or "garden" in path] == []
    assert json.loads((done.redone / NOTE).read_bytes())["client"] == "garden"
    with pytest.raises(ValueError, match=r"harbor.*did you mean 'harbour'"):
        forget(three, "harbor")


def test_the_new_folder_goes_on_once_the_rows_are_gone(world, tmp_path):  # noqa: F811
    rows = shutil.copytree(world.data, tmp_path / "rows")
    folder = go(world, tmp_path / "run", data={"path": str(rows)}, federation={"rounds": 2})
    done = forget(folder, "garden")
    assert done.redone == tmp_path / "run-without-garden"
    with pytest.raises(ValueError, match="'garden'"):
        resume(done.redone)
    (rows / "garden.jsonl").unlink()
    record = resume(done.redone, rounds=3)
    assert record.finished
    assert [sorted(line["clients"]) for line in record.rounds] == [["bakery", "harbour"]] * 3
    further = forget(record.folder, "harbour")  # its replies were kept as well
    assert further.redone is not None


def test_delete_removes_what_is_known_by_name_and_leaves_the_leaves(copied, tmp_path):
    leaves = state(copied).digest()
    done = forget(copied, "garden", delete=True)
    assert done.redone == tmp_path / "run-without-garden"
    texts = {path: content for path, content in contents(copied).items() if path not in {NOTE, "recipe.yaml"}}
    assert [path for path, content in texts.items() if b"garden" in content or "garden" in path] == []
    assert state(copied).digest() == leaves
    assert any("contributions of 3 rounds" in what for what in done.remains)
    record = Record.load(copied)
    assert sorted(record.results) == ["bakery", "harbour"]
    assert record.further["summary"]["personal"]["loss"]["clients"] == 2
    losses = [facts["loss"] for facts in record.rounds[0]["clients"].values()]
    assert record.rounds[0]["loss"] == sum(losses) / 2
    with pytest.raises(ValueError, match="knows no client 'garden'"):
        forget(copied, "garden")
    assert "do not lead to the state" in forget(copied, "harbour").why_not  # RUN-without-garden can still do it


def test_deleting_later_keeps_the_folder_that_was_made(copied, tmp_path):
    made = forget(copied, "garden").redone
    before = contents(made)
    assert forget(copied, "garden", delete=True).redone == made
    assert contents(made) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").touch()
    with pytest.raises(ValueError, match="never overwritten"):
        forget(copied, "bakery", out=tmp_path / "mine")


def test_a_reply_that_is_missing_or_changed_is_noticed(copied, tmp_path):
    (copied / "replies" / "round-00001" / "0-train" / "bakery.safetensors").unlink()
    done = forget(copied, "garden", out=tmp_path / "new")
    assert (done.redone, "do not lead to the state" in done.why_not) == (None, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"engine": {"keep_replies": False}}, "engine.keep_replies was off"),
        ({"method": {"name": "flexlora"}}, "merges whole factors"),
    ],
)
def test_what_cannot_be_undone_is_said(world, tmp_path, command, sections, why):  # noqa: F811
    engine = {**LEAN["engine"], **sections.get("engine", {})}
    folder = go(world, tmp_path / "run", federation={"rounds": 1}, **{**sections, "engine": engine})
    done = command("forget", folder, "--client", "garden")
    assert (done.code, done.err) == (0, "")
    assert why in done.out
    assert "Still there: its contributions of 1 rounds (1) in the merged leaves" in done.out
    assert "--delete would delete there: clients/garden" in done.out
    assert json.loads(command("forget", folder, "--client", "garden", "--json").out)["redone"] is None


def test_methods_whose_replies_are_no_changes_are_refused_and_no_others():
    """By the papers: these merge the clients' factors or products whole, or hold all rows at one site."""
    refused = set()
    for name in plugins.names("method"):
        try:
            refuse(plugins.load("method", name).build())
        except ValueError:
            refused.add(name)
    assert refused == {"flora", "flexlora", "fedex_lora", "hetlora", "centralised"}


def test_too_few_replies_for_the_merge_are_told(world, tmp_path):  # noqa: F811
    federation = {"rounds": 1, "merge": {"rule": "krum", "faulty": 0}}
    folder = go(world, tmp_path / "run", federation=federation)
    done = forget(folder, "garden")
    assert "too few replies in round 1" in done.notes[0]
    assert state(done.redone).digest() == Bundle.load(folder / "replies" / "open.safetensors").digest()


def test_coded_replies_are_kept_whole_within_the_forecast_and_merged_again(world, tmp_path, monkeypatch):  # noqa: F811
    """They are in float64, twice what they would take without coding."""
    plan, planned = Kept.plan, []

    def planning(kept, *sizes):
        planned.append(kept)
        return plan(kept, *sizes)

    monkeypatch.setattr(Kept, "plan", planning)
    monkeypatch.setattr("fedgraft.kept.HEADER", 4096)
    folder = go(world, tmp_path / "run", compression={"name": "int8"}, federation={"rounds": 1}, lora={"rank": 64})
    sizes = [path.stat().st_size for path in (folder / "replies").glob("round-*/*/*.safetensors")]
    assert len(sizes) == 3
    assert planned[0].most / 2 < sum(sizes) <= planned[0].most
    assert forget(folder, "garden", out=tmp_path / "new").redone is not None

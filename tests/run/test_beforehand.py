"""Experts chosen before a run, one decoder layer of the base in memory at a time, and the run that reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedgraft.beforehand import choose_beforehand
from fedgraft.engine.wire import Frame
from fedgraft.hosting import Host
from fedgraft.report.record import Record, read_document
from fedgraft.runner import run
from fedgraft.selection.streamed import measure_streamed
from tests.run.world import World


@pytest.fixture(scope="module")
def chosen(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Choices for the recipe of `finished`; not to be changed."""
    return choose_beforehand(world.recipe(), out=tmp_path_factory.mktemp("chosen") / "choices.json").path


def with_file(world: World, path: Path, **sections: Any) -> dict[str, Any]:
    recipe = world.recipe(**sections)
    return {**recipe, "selection": {**recipe.get("selection", {}), "file": str(path)}}


def test_a_run_that_reads_them_is_the_run_that_chooses_bit_for_bit(world: World, finished: Record, chosen: Path, tmp_path: Path) -> None:
    record = run(with_file(world, chosen), out=tmp_path / "run")
    assert record.digest == finished.digest
    assert record.selection == finished.selection  # experts, errors, tokens


def test_nothing_is_measured_in_such_a_run(world: World, chosen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the experts were measured")

    monkeypatch.setattr("fedgraft.selection.select.measure", refuse)
    run(with_file(world, chosen, federation={"rounds": 1}), out=tmp_path / "run")


def test_several_grafts_and_mixtures_pass_through_the_file(world: World, tmp_path: Path) -> None:
    for number, graft in enumerate(({"per_layer": 2}, {"mixture": 2, "train": "full"})):
        recipe = world.recipe(graft=graft, federation={"rounds": 1})
        path = choose_beforehand(recipe, out=tmp_path / f"{number}.json").path
        read = run(with_file(world, path, graft=graft, federation={"rounds": 1}), out=tmp_path / f"read-{number}")
        assert read.digest == run(recipe, out=tmp_path / f"own-{number}").digest


def test_generic_text_is_measured_once_for_all_clients(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def counting(layered: Any, clients: Any, *rest: Any, **options: Any) -> Any:
        measured.append(len(clients))
        return measure_streamed(layered, clients, *rest, **options)

    monkeypatch.setattr("fedgraft.beforehand.measure_streamed", counting)
    recipe = world.recipe(selection={"text": "generic", "tokens": 64}, federation={"rounds": 1})
    found = choose_beforehand(recipe, out=tmp_path / "choices.json")
    assert measured == [1]
    assert len(found.choices) > 1
    assert run(with_file(world, found.path, selection=recipe["selection"], federation={"rounds": 1}), out=tmp_path / "read").digest == (
        run(recipe, out=tmp_path / "own").digest
    )


@pytest.mark.parametrize(
    ("sections", "changes", "message"),
    [
        ({"selection": {"criterion": "reap"}}, {}, "was made with selection.criterion reconstruction, the recipe has reap"),
        ({"selection": {"text": "generic"}}, {}, "was made with selection.text own, the recipe has generic"),
        ({"graft": {"per_layer": 2}}, {}, "does not have 2 experts in every layer"),
        ({"graft": {"mixture": 2, "train": "full"}}, {}, "has no mixtures of 2"),
        ({"data": {"train_rows": 5}}, {}, "was made with other training rows of client 'bakery'"),
        ({}, {"base_digest": "0"}, "was made with another base than model.name is"),
        ({}, {"clients": {}}, "has no choice of client 'bakery'"),
        ({}, {"schema": 2}, "no choices that this fedgraft can read"),
        ({}, {"surplus": 1}, "damaged"),
        ({"evaluation": {"unseen": {"clients": 1, "rows": [0, 2]}}}, {}, "unseen clients choose by their first rows"),
    ],
)
def test_a_file_for_something_else_is_refused(
    world: World, chosen: Path, tmp_path: Path, sections: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(json.loads(chosen.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        run(with_file(world, path, **sections), out=tmp_path / "run")


def test_experts_that_the_base_lacks_are_refused(world: World, chosen: Path, tmp_path: Path) -> None:
    content = json.loads(chosen.read_text())
    content["clients"]["bakery"]["experts"][0] = [99]
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="names experts that the base does not have"):
        run(with_file(world, path), out=tmp_path / "run")


def test_no_file_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"selection\.file: .*nowhere\.json: there is no such file; choose again with: fedgraft select"):
        run(with_file(world, tmp_path / "nowhere.json"), out=tmp_path / "run")


def test_a_site_reads_no_file_that_a_coordinator_names(world: World, chosen: Path, tmp_path: Path) -> None:
    request = Frame(kind="join", facts={"run": "r1", "recipe": with_file(world, chosen)}).encode()
    answer = Host(memories=lambda name: tmp_path / name).respond(request)
    assert answer.kind == "refused"
    assert "selection.file: a site reads no file" in str(answer.facts["reason"])


def test_clients_behind_an_engine_never_see_it(world: World, chosen: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"selection\.file: clients behind an engine never see that file"):
        run(with_file(world, chosen, engine={"name": "flower-simulation"}), out=tmp_path / "run")


def test_the_command(world: World, chosen: Path, tmp_path: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = world.write(tmp_path / "recipe.yaml")
    code, out, err = command("select", recipe, "--set", "selection.file=choices.json")  # which is not there yet
    assert code == 0, err
    assert out == (
        "3 clients chose in 2 layers by 256 tokens each: choices.json\na run takes these with --set selection.file=choices.json\n"
    )
    assert "selection  2/2  layer 2 of 2" in err
    assert read_document(tmp_path / "choices.json") == read_document(chosen)
    code, _, err = command("select", recipe)
    assert (code, "choices.json: exists and is never overwritten" in err) == (2, True)
    code, out, _ = command("select", recipe, "--out", "again.json", "--json")
    assert json.loads(out)["clients"].keys() == read_document(chosen)["clients"].keys()
    code, _, err = command("select", recipe, "--out", "more.json", "--set", "method.name=fedavg", "--set", "selection=null")
    assert (code, "grafts no experts" in err) == (2, True)

"""A loaded run predicts as it was evaluated, switches clients by pointer, and refuses what it cannot be."""

from __future__ import annotations

import gc
import shutil
import threading
import warnings
from pathlib import Path

import pytest
import torch
import yaml

import fedgraft
from fedgraft.evaluation.answers import generate
from fedgraft.evaluation.settings import EvaluationSettings
from fedgraft.hosting import Holdings
from fedgraft.recipe import load_recipe
from fedgraft.runner import run
from tests.use.conftest import QUICK, loss_on

METHODS = {
    "flex": {},
    "flex with a shared graft": {"shared_graft": True},
    "fedavg": {},
    "hetlora": {"ranks": [2, 1]},
    "fedex_lora": {},
    "flora": {},
    "apfl": {},
    "fedrep": {"layers": 1},
    "fdlora": {"evaluations": 3, "rows": 2},
    "local": {},
    "centralised": {},
}


@pytest.fixture(scope="module", params=METHODS)
def record(request, trained):
    return trained(request.param.split()[0], method=METHODS[request.param])


def ids_of(loaded):
    return torch.tensor([loaded.prompt("How many boats on day 3?")])


def test_every_model_has_the_loss_that_was_reported(record):
    """Exactly: `shared` and the client's own as `results.json` has them, where it has a `shared`."""
    with fedgraft.load(record.folder) as loaded:
        assert loaded.notes == ()
        assert loaded.models[-3:] == list(record.results)
        for client, models in record.results.items():
            assert loss_on(loaded.use(client), client) == models["personal"]["loss"], client
            assert loss_on(loaded.use("base"), client) == models["base"]["loss"]
            if "shared" in models:
                assert loss_on(loaded.use("shared"), client) == models["shared"]["loss"]


def test_a_client_s_model_is_its_own(trained):
    loaded = fedgraft.load(trained("flex").folder)
    assert len({loss_on(loaded.use(name), "harbour") for name in loaded.models}) == len(loaded.models)


def test_bf16_runs_compute_in_bf16(trained):
    record = trained("fedavg", training={"steps": 1, "batch_size": 2, "precision": "bf16"})
    loaded = fedgraft.load(record.folder, "garden")
    assert loss_on(loaded, "garden") == record.results["garden"]["personal"]["loss"]
    assert loaded.model.generate(ids_of(loaded), max_new_tokens=2).shape[1] > 1


def test_generation_is_that_of_the_evaluation(trained, world):
    """Greedy answers to the client's test rows, stopping at the same token."""
    record = trained("flex")
    holdings = Holdings(load_recipe(record.folder / "recipe.yaml"), record.folder / "clients")
    loaded = fedgraft.load(record.folder, "bakery")
    rows, settings = holdings.clients["bakery"].test, EvaluationSettings(batch_size=1, max_new_tokens=8)
    asked = generate(holdings.open("bakery"), loaded.prediction("bakery"), rows, settings)
    own = []
    for row in rows:
        ids = torch.tensor([loaded.prompt(row.instruction)])
        own.append(loaded.decode(loaded.model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]))
    assert own == asked
    assert any(own)


def test_the_model_stays_a_client_s_when_nobody_holds_the_handle(trained):
    loaded = fedgraft.load(trained("flex").folder, "garden")
    ids = ids_of(loaded)
    with torch.no_grad():
        own, model = loaded.model(input_ids=ids).logits, loaded.model
        del loaded
        gc.collect()
        assert torch.equal(model(input_ids=ids).logits, own)


def test_looking_up_other_leaves_keeps_those_in_use(trained):
    loaded = fedgraft.load(trained("flex").folder, "garden")
    own = loss_on(loaded, "garden")
    loaded.fitted("harbour")
    assert loss_on(loaded, "garden") == own


def test_switching_is_pointer_work(trained, monkeypatch):
    """Once read, leaves are neither looked up nor moved again."""
    loaded = fedgraft.load(trained("flex").folder, "garden")
    own = loss_on(loaded, "garden")
    loaded.use("harbour")
    for name in ("using", "placed", "fitted"):
        monkeypatch.setattr(loaded.grafted, name, None)
    assert loss_on(loaded.use("garden"), "garden") == own


def test_a_run_over_sites_elsewhere_has_no_client_s_leaves_here(trained, tmp_path):
    folder = shutil.copytree(trained("flex").folder, tmp_path / "run")
    shutil.rmtree(folder / "clients")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"engine": {"name": "flower", "clients": 3}}))
    loaded = fedgraft.load(folder, "shared")
    assert loaded.models == ["base", "shared"]
    with pytest.raises(ValueError, match="its own leaves have never left its site"):
        loaded.use("garden")


def test_blocks_nest_and_switch_back(trained):
    loaded = fedgraft.load(trained("flex").folder, "garden")
    own = loss_on(loaded, "garden")
    with loaded.using("base"):
        base = loss_on(loaded, "garden")
        with loaded.using("shared") as model:
            assert model is loaded.model
            assert loss_on(loaded, "garden") not in {base, own}
        assert loaded.client == "base"
        assert loss_on(loaded, "garden") == base
        with pytest.raises(ValueError, match="inside a block"):
            loaded.use("harbour")
    assert (loaded.client, loss_on(loaded, "garden")) == ("garden", own)
    loaded.close()
    loaded.close()
    assert loss_on(loaded, "garden") == base


def test_threads_wait_for_each_other(trained):
    """Without the lock another thread's leaves would be in use in the middle of a block."""
    loaded = fedgraft.load(trained("flex").folder)
    names = loaded.models
    alone = {name: loss_on(loaded.use(name), "garden") for name in names}
    wrong = []

    def work(name):
        for _ in range(3):
            with loaded.using(name):
                if loss_on(loaded, "garden") != alone[name]:
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def test_transformers_pipeline_takes_the_live_model(trained):
    from transformers import pipeline

    loaded = fedgraft.load(trained("flex").folder, "harbour")
    text = pipeline("text-generation", model=loaded.model, tokenizer=loaded.tokenizer)
    found = text([{"role": "user", "content": "How many boats?"}], max_new_tokens=3, do_sample=False)
    assert found[0]["generated_text"][-1]["role"] == "assistant"


def test_unknown_names_are_refused_with_those_there_are(trained):
    folder = trained("flex").folder
    with pytest.raises(ValueError, match=r"no model 'gardn' \(did you mean 'garden'\?\); models: base, shared, bakery, garden, harbour"):
        fedgraft.load(folder, "gardn")
    loaded = fedgraft.load(folder, "garden")
    with pytest.raises(ValueError, match="no model 'nobody'"):
        loaded.use("nobody")
    assert loaded.client == "garden"


def test_what_is_no_model_says_why(trained, tmp_path):
    with pytest.raises(ValueError, match="what method 'local' shares is nothing"):
        fedgraft.load(trained("local").folder, "shared")
    with pytest.raises(ValueError, match="what method 'fedsa_lora' shares is no model by itself"):
        fedgraft.load(trained("fedsa_lora").folder, "shared")
    with pytest.raises(ValueError, match=r"client 'garden' blends two adapters .* 'shared' can"):
        fedgraft.load(trained("feddpa", method={"variant": "T"}).folder, "garden")
    fedgraft.load(trained("feddpa", method={"variant": "T"}).folder, "shared")
    record = trained("fedavg", evaluation={**QUICK, "unseen": {"clients": ["garden"], "rows": [0]}})
    with pytest.raises(ValueError, match=r"an unseen client, evaluation\.unseen"):
        fedgraft.load(record.folder, "garden")
    with pytest.raises(ValueError, match="not a run folder"):
        fedgraft.load(tmp_path)


def test_a_blend_for_all_rows_can_be_used(trained):
    record = trained("feddpa", method={"variant": "T", "share": 0.3})
    loaded = fedgraft.load(record.folder, "garden")
    assert loss_on(loaded, "garden") == record.results["garden"]["personal"]["loss"]


def test_another_base_is_refused_and_a_moved_one_can_be_named(trained, world, tmp_path):
    folder = trained("flex").folder
    shutil.copytree(world.model, tmp_path / "moved")
    loaded = fedgraft.load(folder, overrides=[f"model.name={tmp_path / 'moved'}"])
    assert loaded.grafted.base.name == str(tmp_path / "moved")
    config = tmp_path / "moved" / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(ValueError, match=r"belong to another base than .*moved' is now \(digest \w{12}, here \w{12}\)"):
        fedgraft.load(folder, overrides=[f"model.name={tmp_path / 'moved'}"])
    with pytest.raises(ValueError, match="no such folder"):
        fedgraft.load(folder, overrides=[f"model.name={tmp_path / 'gone'}"])
    with pytest.raises(ValueError, match=r"--set lora\.rank=3: only keys of model"):
        fedgraft.load(folder, overrides=["lora.rank=3"])


def test_an_unfinished_run_says_so_and_a_changed_one_is_noticed(trained, tmp_path):
    folder = shutil.copytree(trained("flex").folder, tmp_path / "run")
    (folder / "results.json").unlink()
    with pytest.warns(UserWarning, match=r"not finished \(round 2 of 2\); its last committed leaves are used"):
        loaded = fedgraft.load(folder)
    with warnings.catch_warnings(action="ignore"):
        fedgraft.resume(folder, rounds=3)
    with pytest.raises(ValueError, match="has gone on since it was loaded"):
        loaded.use("garden")
    (folder / "state" / "state.safetensors").unlink()
    with pytest.raises(ValueError, match="no finished step yet"):
        fedgraft.load(folder)


def test_a_lost_or_changed_memory_is_noticed(trained, tmp_path):
    """Without it the client's model would silently be another one."""
    folder = shutil.copytree(trained("flex").folder, tmp_path / "run")
    shutil.rmtree(folder / "clients" / "garden")
    with pytest.raises(ValueError, match=r"clients.garden: not what the run ended with"):
        fedgraft.load(folder, "garden")


def test_a_client_of_a_taken_name_gets_another(world, tmp_path):
    data = shutil.copytree(world.data, tmp_path / "data")
    for old, new in (("garden", "base"), ("harbour", "shared")):
        (data / f"{old}.jsonl").rename(data / f"{new}.jsonl")
    recipe = world.recipe(
        data={"path": str(data)}, method={"name": "fedavg"}, federation={"rounds": 1}, training={"steps": 1}, evaluation=QUICK
    )
    record = run(recipe, out=tmp_path / "run")
    loaded = fedgraft.load(record.folder)
    assert loaded.models == ["base", "shared", "bakery", "base_", "shared_"]
    assert loss_on(loaded.use("base_"), "base") == record.results["base"]["personal"]["loss"]


def test_prompts_are_those_of_training(trained):
    from fedgraft.data.batches import encode_all
    from fedgraft.data.partition import load_clients

    loaded = fedgraft.load(trained("flex").folder)
    recipe = loaded.source.recipe
    rows = load_clients(recipe.data, recipe.seed)[0].train
    rows = [row for row in rows if not row.context]
    encoded, _ = encode_all(rows, loaded.tokenizer, recipe.data)
    assert [row.ids[: row.start] for row in encoded] == [loaded.prompt(row.instruction) for row in rows]
    turns = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}, {"role": "user", "content": "Three?"}]
    text = loaded.tokenizer.decode(loaded.prompt(turns))
    assert text.index("One?") < text.index("Two.") < text.index("Three?")
    assert "One?" not in loaded.tokenizer.decode(loaded.prompt(turns, longest=40))
    for bad, why in (
        ([], "last message must be the user's"),
        (turns[:2], "last message must be the user's"),
        ([{"role": "tool", "content": "x"}], "role 'tool'"),
        ([{"role": "user", "content": None}], "has no text"),
        (" ", "is empty"),
    ):
        with pytest.raises(ValueError, match=why):
            loaded.prompt(bad)


def test_folder_is_only_read(trained):
    folder: Path = trained("flex").folder
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    fedgraft.load(folder, "garden")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before

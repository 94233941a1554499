"""What every file of the methods folder must do."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections import Counter

import pytest
import torch

from fedgraft import plugins
from fedgraft.address import everything
from fedgraft.aggregation.merges import MEANS
from fedgraft.bundle import Bundle
from fedgraft.methods.method import Method
from fedgraft.report.progress import Quiet
from fedgraft.report.record import Record
from fedgraft.runner import resume
from fedgraft.runner import run as run_recipe
from fedgraft.tree import digest, equal, num_bytes
from tests.methods.harness import ROWS, Run, answers

METHODS = plugins.names("method")
pytestmark = pytest.mark.parametrize("method", METHODS)


class StopAt(Quiet):
    """Ctrl-C when a phase has reported so many steps."""

    def __init__(self, phase: str, step: int) -> None:
        self.left = {phase: step}
        self.phase = ""

    def begin(self, phase: str, total: int) -> None:
        self.phase = phase

    def step(self, note: str = "") -> None:
        if self.phase in self.left:
            self.left[self.phase] -= 1
            if self.left[self.phase] == 0:
                raise KeyboardInterrupt


def whole(start, method):
    """One ordinary run of a method, made once for all tests that only look at it."""
    if method not in RUNS:
        RUNS[method] = start(method, training={"optimizer_state": "kept"}).go()
    return RUNS[method]


RUNS: dict[str, Run] = {}


def by_hand(run, method, clients, round_number):
    """The merged state of one round from the replies on the wire: the mean over the holders of each leaf, weighted by examples."""
    replies = [Bundle.decode(content) for question, name, content in run.up if question == "train" and name in clients]
    replies = replies[round_number * len(clients) : (round_number + 1) * len(clients)]
    mean = {}
    for key in {key for reply in replies for key in reply.tree("shared")}:
        held = [(reply.tree("shared")[key].double(), reply.facts["examples"]) for reply in replies if key in reply.tree("shared")]
        mean[key] = sum(leaf * examples for leaf, examples in held) / sum(examples for _, examples in held)
    return mean


def test_build_returns_a_frozen_method_and_its_docstring_names_every_option(method):
    build = plugins.load("method", method).build
    options = inspect.signature(build).parameters
    assert all(option.default is not inspect.Parameter.empty for option in options.values())
    assert build.__doc__
    assert all(f"{name}:" in build.__doc__ for name in options)
    built = build()
    assert type(built) is Method
    with pytest.raises(dataclasses.FrozenInstanceError):
        built.places = frozenset()
    assert built.places <= {"adapters", "side"}


def test_three_rounds_move_the_leaves_and_state_and_memories_survive_codec_and_disk(start, method):
    run = whole(start, method)
    record = Record.load(run.session.folder)
    assert [line["round"] for line in record.rounds] == [0, 1, 2]
    assert record.finished
    assert set(record.results) == set(ROWS)
    for name, seen in (("bytes_up", run.up), ("bytes_down", run.down)):
        assert sum(line[name] for line in record.rounds) == sum(len(content) for question, _, content in seen if question == "train")
    bundles = {run.session.folder / "state" / "state.safetensors": run.session.server.state}
    bundles |= {run.session.engine.store._path(name, run.session.engine.asked): run.memory(name) for name in run.sites}
    for path, bundle in bundles.items():
        assert Bundle.decode(bundle.encode()).encode() == bundle.encode() == path.read_bytes()
    leaves = run.state or run.memory(run.sites[0]).tree("personal")
    assert leaves
    assert all(leaf.isfinite().all() and leaf.dtype == torch.float32 for leaf in leaves.values())
    assert all(leaf.any() for leaf in leaves.values())  # B has left 0


def test_the_account_before_training_says_what_travels_and_how_often_the_rows_are_seen(start, method):
    """Tensors in every package and reply, and the tokens of FedAvg's rounds, which see the same rows."""
    run = whole(start, method)
    account = run.session.account
    assert {sum(map(num_bytes, bundle.trees.values())) for bundle in trained(run.up)} == {account.bytes_up()}
    assert max(sum(map(num_bytes, bundle.trees.values())) for bundle in trained(run.down)) == account.bytes_down()
    assert (answers(run, "ada")["personal"].shares is not None) == run.session.method.row_wise
    if not account.pooled:
        tokens, once = ([line["tokens"] for line in Record.load(one.session.folder).rounds] for one in (run, whole(start, "fedavg")))
        assert tokens == [account.passes * number for number in once]


def trained(seen):
    """The bundles of all rounds, of one direction."""
    return [Bundle.decode(content) for question, _, content in seen if question == "train"]


@pytest.mark.parametrize(
    ("phase", "step"),
    [("selection", 2), ("training", 1), ("training", 2), ("training", 3), ("evaluation", 1)],
)
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(place, tmp_path, method, phase, step):
    """Two of three clients a round: step 2 is the last reply before a commit, 1 and 3 are the first ones after."""
    recipe = place.recipe(method, federation={"rounds": 3, "clients_per_round": 2}, training={"optimizer_state": "kept"}, seed=1)
    built = plugins.load("method", method).build()
    if phase == "selection" and "side" not in built.places:
        pytest.skip("it selects nothing")
    if (method, "whole") not in DIGESTS:
        DIGESTS[method, "whole"] = files(run_recipe(recipe, out=tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, out=tmp_path / "cut", progress=StopAt(phase, step))
    assert not Record.load(tmp_path / "cut").finished
    assert files(resume(tmp_path / "cut")) == DIGESTS[method, "whole"]


DIGESTS: dict[tuple[str, str], dict[str, object]] = {}


def files(record: Record) -> dict[str, object]:
    """All of a finished run that must not depend on interruptions."""
    assert record.finished
    kept = [{key: line[key] for key in ("round", "lr", "loss", "tokens", "bytes_down")} for line in record.rounds]
    state = Bundle.load(record.folder / "state" / "state.safetensors")
    newest = {site.name: max(site.iterdir()) for site in (record.folder / "clients").iterdir()}
    memories = {name: Bundle.load(path).encode() for name, path in newest.items()}
    return {"digest": record.digest, "results": record.results, "rounds": kept, "state": state.encode(), "memories": memories}


def test_personal_leaves_never_travel(start, method):
    """On the wire, in both directions, and in what the server keeps."""
    run = whole(start, method)
    personal = run.session.method.personal
    bundles = [Bundle.decode(content) for _, _, content in run.up + run.down] + [run.session.server.state]
    assert len(bundles) > 6 * len(run.sites)
    assert not [key for bundle in bundles for tree in bundle.trees.values() for key in tree if personal(key)]
    for name in run.sites:
        secret = {leaf.numpy().tobytes() for key, leaf in run.memory(name).tree("personal").items() if personal(key) and leaf.numel() > 8}
        assert not any(raw in content for raw in secret for _, _, content in run.up + run.down)


@pytest.mark.parametrize("place_in_order", [0, -1])
def test_a_lost_reply_is_survived_and_the_rest_counts(start, method, place_in_order):
    """In round 1 one of three replies does not arrive; the state is that of a mean over the other two."""
    missing: list[str] = []
    run = start(
        method, lost=lambda question, number, client: question == "train" and number == 1 and client in missing, federation={"rounds": 2}
    )
    missing.append(run.sites[place_in_order])
    run.go()
    rest = [name for name in run.sites if name not in missing]
    assert [set(line["clients"]) for line in Record.load(run.session.folder).rounds] == [set(run.sites), set(rest)]
    built = run.session.method
    if built == Method(places=built.places, personal=built.personal):  # the mean is FedAvg's
        for key, leaf in by_hand(run, method, rest, 1).items():
            torch.testing.assert_close(run.state[key].double(), leaf, rtol=0, atol=1e-7)
    assert all(leaf.isfinite().all() for leaf in run.state.values())


def test_a_round_without_any_reply_leaves_the_state(start, method):
    run = start(
        method,
        lost=lambda question, number, client: question == "train" and number == 1,
        federation={"rounds": 2},
        training={"lr_min": 1e-3},
    )
    run.go()
    once = start(method, federation={"rounds": 1}).go()
    assert equal(run.state, once.state)
    assert Record.load(run.session.folder).rounds[1]["loss"] is None


def test_the_seed_decides(start, method):
    again, other = (start(method, training={"optimizer_state": "kept"}, seed=seed).go().digest for seed in (0, 1))
    assert whole(start, method).digest == again != other


def test_rounds_touch_only_who_takes_part(start, method):
    """One of three a round: the others' memories are the same files, and each is asked as often as it was drawn."""
    run = start(method, federation={"rounds": 6, "clients_per_round": 1})
    written = {}

    def see(question, client, content):
        run.up.append((question, client, content))
        now = {name: digest_of(run.session.engine.store, name) for name in run.sites}
        if question == "train":
            assert [name for name in run.sites if now[name] != written[name]] == [client]
        written.update(now)

    run.session.engine.on_send = see
    written.update(dict.fromkeys(run.sites))
    run.go()
    asked = Counter(name for question, name, _ in run.up if question == "train")
    assert sum(asked.values()) == 6
    assert len(asked) > 1 or len(run.sites) == 1
    drawn = []
    for number in range(6):
        run.session.server.round = number
        drawn += run.session.server.sampled()
    assert [name for question, name, _ in run.up if question == "train"] == drawn


def digest_of(store, name):
    """Digest of a client's newest memory, None before the first."""
    versions = store.versions(name)
    return (
        digest({f"{key}/{leaf}": tensor for key, tree in store.load(name, versions[-1]).trees.items() for leaf, tensor in tree.items()})
        if versions
        else None
    )


def test_a_finished_run_can_be_extended(place, tmp_path, method):
    run_recipe(place.recipe(method, federation={"rounds": 1}), out=tmp_path / "run")
    before = Record.load(tmp_path / "run")
    after = resume(tmp_path / "run", rounds=2)
    assert [line["round"] for line in after.rounds] == [0, 1]
    assert after.rounds[0] == before.rounds[0]
    assert after.digest != before.digest
    assert resume(tmp_path / "run").digest == after.digest  # nothing left to do


def test_evaluation_leaves_no_trace(start, method):
    run = whole(start, method)
    before = {name: run.memory(name).encode() for name in run.sites}, run.session.server.state.encode(), run.digest
    run.session._evaluate()
    assert ({name: run.memory(name).encode() for name in run.sites}, run.session.server.state.encode(), run.digest) == before


TROUBLED = {"rounds": 5, "clients_per_round": 2, "dropout": 0.3, "deadline": 4.0, "jitter": 0.5, "join": {"cy": 2}}


def test_missing_late_and_unequal_clients_are_survived_and_recorded_and_resumed(place, start, method, tmp_path):
    """All at once; what a round records is what the seed says, and a run cut in the midst ends as the whole one."""
    recipe = place.recipe(method, federation=TROUBLED, training={"least_steps": 1}, seed=6)
    if plugins.load("method", method).build().pooled:
        with pytest.raises(ValueError, match=r"federation\.dropout: method .* pools the rows"):
            run_recipe(recipe, out=tmp_path / "whole")
        return
    record = run_recipe(recipe, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, out=tmp_path / "cut", progress=StopAt("training", 4))
    assert files(resume(tmp_path / "cut")) == files(record)
    simulated = [line["simulated"] for line in record.rounds]
    assert any(line.get("dropped") for line in simulated)
    assert any(line.get("late") for line in simulated)
    assert len({steps for line in simulated for steps in line.get("steps", {}).values()}) > 1
    for line, said in zip(record.rounds, simulated, strict=True):
        asked = set(said.get("seconds", {}))
        assert set(line["clients"]) == asked - set(said.get("late", []))
        assert all((seconds > 4) == (name in said.get("late", [])) for name, seconds in said.get("seconds", {}).items())
        assert line["round"] >= 2 or "cy" not in asked | set(said.get("dropped", []))


@pytest.mark.parametrize("rule", ["median", "multi_krum"])
def test_another_merge_is_used_or_refused_before_training(start, method, rule):
    sections = {"federation": {"rounds": 1, "merge": {"rule": rule, **({"faulty": 0} if rule == "multi_krum" else {})}}}
    built = plugins.load("method", method).build()
    if built.needs_mean or built.merge not in MEANS or built.personal is everything:
        with pytest.raises(
            ValueError, match=f"federation.merge: '{rule}' can't be used, since method '{method}' (has|shares|corrects|needs)"
        ):
            start(method, **sections)
        return
    run = start(method, **sections).go()
    assert all(leaf.isfinite().all() and leaf.any() for leaf in run.state.values())


def test_others_models_and_unseen_clients_are_evaluated(start, method):
    """Every method's models can be lent, and its shared leaves given to a client that was never asked; neither changes the run."""
    newcomer = {"clients": ["cy"], "rows": [0, 2], "rounds": 2}
    run = start(method, federation={"rounds": 1}, evaluation={"cross": True, "unseen": newcomer, "models": ["base", "personal"]}).go()
    record = Record.load(run.session.folder)
    assert set(record.results) == set(record.further["experts"]) == set(record.further["cross"]) == {"ada", "bo"}
    session = run.session
    client = session.reach.holdings.open("ada")
    client.memory = run.memory("ada")
    package = session.method.pack(session.method, session.server, "ada")
    can_be_lent = session.method.answer(session.method, client, package)["personal"].shares is None
    for name, losses in record.further["cross"].items():
        assert set(losses) == ({"ada", "bo"} if can_be_lent else set())
        if losses:
            assert losses[name] == pytest.approx(record.results[name]["personal"]["loss"], rel=1e-5)
    found = record.further["unseen"]["cy"]
    assert found["0"]["base"]["loss"] == found["2"]["base"]["loss"]
    assert all(math.isfinite(models["personal"]["loss"]) for models in found.values())
    assert {question for question, name, _ in run.up if name == "cy"} == {"evaluate_unseen"}

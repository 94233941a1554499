"""Attackers: what they send, who they are, and that nobody else is touched by them."""

from __future__ import annotations

import pytest
import torch

from fedgraft import files
from fedgraft.bundle import Bundle
from fedgraft.data.example import Example
from fedgraft.data.partition import ClientData
from fedgraft.recipe import load_recipe
from fedgraft.transforms.attack import LabelFlip, NoAttack, Noise, Scale, SignFlip, attackers, attacking, flipped, honest

KEY, OTHER = "layers.0.attention.q.A", "layers.0.attention.q.B"
START = {KEY: torch.tensor([[1.0, 2.0]]), OTHER: torch.tensor([[4.0], [0.0]])}
TRAINED = {KEY: torch.tensor([[1.5, 1.0]]), OTHER: torch.tensor([[4.0], [3.0]])}
NAMES = ["ada", "bo", "cy"]
ROWS = [Example(str(number), "law", f"Q{number}", "", f"A{number}", choices=(f"A{number}", "B")) for number in range(7)]


class Attacked:
    """A client that trains on whatever rows it has and sends `TRAINED`."""

    def __init__(self, name="bo"):
        self.name, self.data, self.seen = name, ClientData(name, ROWS, [], []), []

    def train(self, client, package):
        self.seen = client.data.train
        return Bundle(trees={"shared": TRAINED, "control": {KEY: torch.ones(1)}}, facts={"examples": 3})


def sent(settings, name="bo", round_number=0):
    client = Attacked(name)
    question = attacking(settings, NAMES, 0, client.train)
    return question(client, Bundle(trees={"shared": START}, facts={"round": round_number})), client


@pytest.mark.parametrize(
    ("settings", "times"), [(SignFlip(clients=("bo",)), -1), (SignFlip(clients=("bo",), factor=3), -3), (Scale(clients=("bo",)), 10)]
)
def test_a_change_is_multiplied(settings, times):
    """1.5 - 1 = 0.5 of the first number, and so on; all else is as it was."""
    reply, _ = sent(settings)
    assert reply.tree("shared")[KEY].tolist() == [[1 + 0.5 * times, 2 - 1 * times]]
    assert reply.tree("shared")[OTHER].tolist() == [[4.0], [3.0 * times]]
    assert reply.tree("shared")[KEY].dtype == torch.float32
    assert (reply.facts, reply.tree("control").keys()) == ({"examples": 3}, {KEY})


def test_noise_has_the_size_of_the_change_and_is_drawn_anew_for_client_and_round():
    found = {(name, number): sent(Noise(clients=("ada", "bo"), factor=2), name, number)[0] for name in ("ada", "bo") for number in (0, 1)}
    changes = [reply.tree("shared")[OTHER] - START[OTHER] for reply in found.values()]
    assert [float(change.norm()) for change in changes] == pytest.approx([6.0] * 4)
    assert len({str(change.tolist()) for change in changes}) == 4
    again, _ = sent(Noise(clients=("ada", "bo"), factor=2), "ada", 1)
    assert torch.equal(again.tree("shared")[KEY], found["ada", 1].tree("shared")[KEY])


def test_flipped_labels_are_the_same_responses_at_other_rows():
    _, client = sent(LabelFlip(clients=("bo",)))
    assert [row.instruction for row in client.seen] == [row.instruction for row in ROWS]
    assert sorted(row.response for row in client.seen) == [row.response for row in ROWS]
    assert not any(row.response == own.response or row.choices for row, own in zip(client.seen, ROWS, strict=True))
    assert client.data.train is ROWS  # what it is evaluated with, and asked next, is its own
    assert flipped(ROWS[:1], 0, "bo")[0].response == "A0"
    assert flipped([], 0, "bo") == []


@pytest.mark.parametrize("settings", [NoAttack(), Scale(clients=0), Scale(clients=("ada",)), LabelFlip(clients=("ada",))])
def test_the_honest_are_not_touched(settings):
    reply, client = sent(settings)
    assert reply.tree("shared") is TRAINED
    assert client.seen is ROWS


def test_attackers_are_named_or_drawn():
    many = [f"client-{number}" for number in range(10)]
    drawn = {attackers(Scale(clients=2), many, seed) for seed in range(20)}
    assert all(len(names) == 2 and names <= set(many) for names in drawn)
    assert len(drawn) > 5
    assert attackers(Scale(clients=2), many[::-1], 3) == attackers(SignFlip(clients=2), many, 3)
    assert attackers(Scale(clients=1), many, 3) < attackers(Scale(clients=2), many, 3)
    assert honest(Scale(clients=("bo",)), NAMES, 0) == ["ada", "cy"]
    assert honest(NoAttack(), NAMES, 0) == NAMES
    with pytest.raises(ValueError, match=r"attack\.clients: there is no client 'dee'; there are: ada, bo, cy"):
        attackers(Scale(clients=("dee",)), NAMES, 0)
    with pytest.raises(ValueError, match=r"attack\.clients: of 3 clients none would be honest"):
        attackers(Scale(clients=3), NAMES, 0)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"engine": {"name": "flower", "clients": 3}}, "is for simulations in one process, not for engine 'flower'"),
        ({"engine": {"name": "flower-simulation"}}, "is for simulations in one process, not for engine 'flower-simulation'"),
        ({"method": {"name": "local"}}, "method 'local' merges nothing"),
        ({"method": {"name": "centralised"}}, "method 'centralised' merges nothing"),
        ({"method": {"name": "flora"}}, "method 'flora' merges whole factors; choose label_flip"),
    ],
)
def test_what_makes_no_sense_is_refused(recipe, said):
    with pytest.raises(ValueError, match=said):
        load_recipe({"method": {"name": "fedavg"}, **recipe, "attack": {"name": "scale"}})


@pytest.mark.parametrize(
    "recipe", [{"method": {"name": "flora"}}, {"method": {"name": "local"}}, {"secure_aggregation": {"name": "secagg_plus"}}]
)
def test_a_limit_of_changes_that_nobody_sees_is_refused(recipe):
    with pytest.raises(ValueError, match=r"federation\.norm_limit: with method '\w+', or sums alone, no change is seen; remove it"):
        load_recipe({"method": {"name": "fedavg"}, **recipe, "federation": {"norm_limit": 1.0}})


def test_a_misspelt_key_is_named():
    with pytest.raises(
        ValueError, match=r"unknown key 'attack\.scale\.factr' \(did you mean 'factor'\?\); there are: name, clients, factor"
    ):
        load_recipe({"method": {"name": "fedavg"}, "attack": {"name": "scale", "factr": 3}})


def test_a_run_under_attack(start):
    """Attackers are merged and not evaluated; with a sound merge of three, one client that sends ten times its change moves nothing far."""
    sections = {"federation": {"rounds": 2}, "training": {"steps": 1}}
    attack = {"name": "scale", "clients": ["bo"], "factor": 1e6}
    runs = {
        name: start(
            "fedavg", federation={"rounds": 2, **merge}, training=sections["training"], attack=attack if harm else {"name": "none"}
        ).go()
        for name, harm, merge in (
            ("sound", False, {}),
            ("mean", True, {}),
            ("median", True, {"merge": {"rule": "median"}}),
            ("limited", True, {"norm_limit": 100.0}),
        )
    }
    far = {name: max(float(leaf.abs().max()) for leaf in run.state.values()) for name, run in runs.items()}
    assert far["mean"] > 10
    assert max(far[name] for name in ("sound", "median", "limited")) < 2
    results = {name: files.parse_json((run.session.folder / "results.json").read_bytes())["clients"] for name, run in runs.items()}
    assert sorted(results["sound"]) == NAMES
    assert sorted(results["mean"]) == sorted(results["median"]) == ["ada", "cy"]
    lines = files.read_lines(runs["limited"].session.folder / "rounds.jsonl")
    assert [list(line["failed"]) for line in lines] == [["bo"]] * 2
    assert "its change has the norm" in lines[0]["failed"]["bo"]
    assert "federation.norm_limit is 100" in lines[0]["failed"]["bo"]


def test_a_site_never_attacks(place, tmp_path):
    """A coordinator may send what recipe it likes; only a process that holds all clients, and is asked by itself, makes attackers."""
    from fedgraft.hosting import Holdings

    recipe = load_recipe(place.recipe("fedavg", attack={"name": "scale", "clients": ["ada"]}))
    holdings = Holdings(recipe, tmp_path / "clients")
    away, here = (holdings.site(NAMES, lends=lends).questions["train"] for lends in (False, True))
    package = Bundle(trees={"shared": holdings.model.fresh_adapters(0)}, facts={"round": 0, "lr": 1e-3})
    changes = {}
    for name, question in (("away", away), ("here", here)):
        reply = question(holdings.open("ada"), package)
        changes[name] = {key: leaf.double() - package.tree("shared")[key].double() for key, leaf in reply.tree("shared").items()}
    for key, change in changes["away"].items():
        torch.testing.assert_close(changes["here"][key], 10 * change, rtol=1e-3, atol=1e-6)

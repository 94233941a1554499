"""The guard with a real site behind it: what is refused, what is logged, what the coordinator learns."""

from __future__ import annotations

import ast
import errno
import json
from functools import partial
from pathlib import Path

import pytest
import torch

import fedgraft
from fedgraft import files
from fedgraft.bundle import Bundle
from fedgraft.data.example import Example
from fedgraft.data.partition import ClientData
from fedgraft.deployment.guard import Guard, rows_behind
from fedgraft.deployment.site_settings import load_site
from fedgraft.engine.wire import Frame
from fedgraft.evaluation import gather
from fedgraft.methods.method import questions
from fedgraft.recipe import load_recipe
from fedgraft.transforms import chain
from fedgraft.transforms.secure_aggregation.primitives import key_pair
from fedgraft.transforms.secure_aggregation.settings import KEYS, SHARES, TRAIN
from tests.deployment.sites import NAME, memories, recipe, site

RUN = "run-1"


@pytest.fixture
def opened(world, tmp_path):
    """`opened(**policy)`: the guard of a site with that policy, which a second call opens anew."""

    def open_(**policy):
        settings, place = load_site(site(tmp_path, world, policy=policy))
        return Guard(settings=settings, place=place)

    return open_


@pytest.fixture
def values(world, tmp_path):
    """`values(**sections)`: a complete recipe."""
    return lambda **sections: load_recipe(recipe(world, tmp_path / "rows", **{"method": {"name": "fedavg"}, **sections})).complete()


def request(kind, values, package=None, **facts):
    facts = {"run": RUN, "recipe": values, **facts}
    return Frame(kind=kind, facts=facts, content=b"" if package is None else package.encode()).encode()


def train(values, number=0, shared=None, **facts):
    package = Bundle(trees={"shared": shared or {}}, facts={"round": number, "lr": 1e-3, "heard": None})
    asked = {"clients": [NAME], "question": "train", "client": NAME, "asked": number, "committed": number}
    return request("ask", values, package, **{**asked, **facts})


def answer(guard, content):
    return Frame.decode(guard.handle(content))


def last(guard):
    return files.read_lines(guard.place.log)[-1]


@pytest.fixture
def shared(opened, values):
    """First shared leaves, as a coordinator would send them."""
    guard = opened()
    asked = Frame.decode(train(values()))
    return guard.host.holdings(asked).model.fresh_adapters(7)


def untimed(reply):
    bundle = Bundle.decode(reply.content)
    return bundle.digest(), {name: fact for name, fact in bundle.facts.items() if name != "seconds"}


def test_a_card_and_a_reply_leave_and_are_logged(opened, values, shared):
    guard = opened()
    card = answer(guard, request("join", values()))
    assert card.facts["card"]["name"] == NAME
    assert card.facts["card"]["categories"]
    assert last(guard)["facts"] == sorted(card.facts["card"])
    asked = train(values(), shared=shared)
    raw = guard.handle(asked)
    line = last(guard)
    assert (line["verdict"], line["run"], line["question"], line["round"]) == ("answered", RUN, "train", 0)
    assert (line["bytes"], line["bytes_in"]) == (len(raw), len(asked))
    assert line["trees"]["shared"]["leaves"] == len(shared)
    assert answer(guard, request("leave", {})).kind == "left"
    assert last(guard)["request"] == "leave"


@pytest.mark.parametrize(
    ("policy", "sections", "facts", "key"),
    [
        ({"methods": ["flex"]}, {}, {}, "policy.methods"),
        ({}, {"method": {"name": "centralised"}}, {}, "method"),
        ({"rounds": 2}, {}, {}, "policy.rounds"),
        ({"privacy": {"clip": 1.0}}, {}, {}, "policy.privacy.clip"),
        ({}, {"evaluation": {"lm_eval": ["tasks/own.yaml"]}}, {}, "evaluation.lm_eval"),
        ({"questions": ["evaluate"]}, {}, {}, "policy.questions"),
        ({}, {}, {"question": "rows"}, "policy.questions"),
        ({}, {}, {"client": "harbour"}, "name"),
        ({"min_examples": 15}, {"training": {"batch_size": 30}}, {}, "policy.min_examples"),
        ({"min_examples": 3}, {}, {}, "policy.min_examples"),  # one step of two rows
        ({"min_examples": 2}, {}, {"question": "evaluate"}, "policy.min_examples"),  # of one row
        ({"min_examples": 2}, {"data": {"train_rows": 1}}, {}, "policy.min_examples"),
        ({"bases": ["0" * 64]}, {}, {}, "policy.bases"),
        ({"leaves": ["layers.0"]}, {}, {}, "policy.leaves"),
        ({"leaves": ["layers.*.attention.q"]}, {}, {}, "policy.leaves"),
        ({"trees": []}, {}, {}, "policy.trees"),
        ({"trees": ["shared"]}, {"method": {"name": "scaffold"}}, {}, "policy.trees"),
        ({"facts": ["examples"]}, {}, {}, "policy.facts"),
        ({"reply_bytes": 1000}, {}, {}, "policy.reply_bytes"),
        ({"total_bytes": 1000}, {}, {}, "policy.total_bytes"),
    ],
)
def test_what_is_too_much_is_refused_by_its_key_and_logged(opened, values, shared, policy, sections, facts, key):
    guard = opened(**policy)
    asked = train(values(**sections), shared=shared, **facts)
    refused = answer(guard, asked)
    assert (refused.kind, refused.content, refused.facts.keys()) == ("refused", b"", {"reason"})
    assert refused.facts["reason"].startswith(f"refused by the site's policy: {key}: ")
    line = last(guard)
    assert (line["verdict"], line["key"]) == ("refused", key)
    assert guard.log.spent(RUN).total_bytes == 0


def test_a_method_that_would_send_what_is_personal_is_stopped_at_the_door(opened, values, shared, monkeypatch):
    """A bug in an installed method: the policy lets every leaf pass, the method's own word stops it."""
    values = values(method={"name": "fedper"})

    def careless(method):
        good = questions(method)

        def send_all(client, package):
            reply = good["train"](client, package)
            return Bundle(trees={"shared": reply.trees["shared"] | client.memory.tree("personal")}, facts=reply.facts)

        return good | {"train": send_all}

    first, rest = {key: leaf for key, leaf in shared.items() if key.startswith("layers.0.")}, ["layers"]
    assert answer(opened(leaves=rest), train(values, shared=first)).kind == "reply"
    monkeypatch.setattr(gather, "questions", careless)
    reason = answer(opened(leaves=rest), train(values, shared=first)).facts["reason"]
    assert "method: leaf 'layers.1.attention." in reason
    assert "never leaves" in reason


def test_a_run_cannot_change_into_one_that_calls_personal_leaves_shared(opened, values, shared):
    first = {key: leaf for key, leaf in shared.items() if key.startswith("layers.0.")}
    began = values(method={"name": "fedper"})
    guard = opened()
    assert answer(guard, train(began, shared=first)).kind == "reply"
    for changed in (values(), began | {"lora": {**began["lora"], "targets": ["q"]}}):
        assert "began here with other settings" in answer(opened(), train(changed, number=1, shared=first)).facts["reason"]
    longer = began | {"federation": {**began["federation"], "rounds": 9}}
    assert answer(opened(), train(longer, number=1, shared=first)).kind == "reply"


@pytest.mark.parametrize("committed", [0, 1], ids=["two questions in a round", "a round each"])
def test_asked_twice_it_answers_twice_the_same(opened, values, shared, committed):
    first, second = train(values(), shared=shared), train(values(), number=1, shared=shared, committed=committed)
    guard = opened(rounds=3)
    replies = [untimed(answer(guard, first)), untimed(answer(guard, second))]
    folder = guard.place.memories(RUN) / NAME
    kept = memories(folder)
    assert len(kept) == 2
    assert untimed(answer(guard, second)) == replies[1]  # redelivered
    again = opened(rounds=3)  # the worker was killed, and the coordinator went back to its commit
    assert [untimed(answer(again, first)), untimed(answer(again, second))] == replies
    assert memories(folder) == kept
    assert len(again.log.spent(RUN).rounds) == 2


def test_counters_survive_a_restart(opened, values, shared):
    one = {"federation": {"rounds": 1}}
    raw = opened(rounds=1).handle(train(values(**one), shared=shared))
    limits = {"rounds": 1, "total_bytes": int(2.5 * len(raw))}
    assert "policy.rounds" in answer(opened(**limits), train(values(**one), number=1, shared=shared)).facts["reason"]
    assert answer(opened(**limits), train(values(**one), shared=shared)).kind == "reply"  # the same round, lost on its way
    assert "policy.total_bytes" in answer(opened(**limits), train(values(**one), shared=shared)).facts["reason"]


def test_another_package_for_the_same_question_is_another_round(opened, values, shared):
    one = values(federation={"rounds": 1})
    guard = opened(rounds=1)
    assert answer(guard, train(one, shared=shared)).kind == "reply"
    probing = {key: torch.zeros_like(leaf) for key, leaf in shared.items()}
    assert "policy.rounds" in answer(guard, train(one, shared=probing)).facts["reason"]


def test_the_coordinator_chooses_neither_files_nor_rows(opened, values, shared, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    other = values() | {"model": {"name": str(tmp_path / "elsewhere"), "offload": str(tmp_path / "written")}}
    other["data"] = {**other["data"], "path": "/etc", "dataset": "dolly", "partition": "iid", "categories": ["x"]}
    assert answer(opened(), train(other, shared=shared)).kind == "reply"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "rows", "site.yaml", "state"]


def test_categories_may_stay(opened, values):
    card = answer(opened(categories=False), request("join", values())).facts["card"]
    assert (card["categories"], card["rows"]["train"]) == ({}, 14)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"nothing of the kind", "not written by fedgraft"),
        (Frame(kind="run", facts={"run": RUN, "recipe": {}}).encode(), "none that this fedgraft knows"),
        (request("join", ["flex"]), "none that this fedgraft knows"),
        (request("join", {"model": "demo"}), "none that this fedgraft knows"),
        (request("join", {}, run="../../etc"), "cannot name a folder"),
        (request("join", {}, run=7), "none that this fedgraft knows"),
        (Frame(kind="join", facts={"run": RUN}).encode(), "none that this fedgraft knows"),
        (request("ask", {}, question="train", client=NAME, asked=0, committed=0), "none that this fedgraft knows"),
        (train({}, asked="0"), "none that this fedgraft knows"),
        (train({}, asked=True), "none that this fedgraft knows"),
        (train({}, clients=[1]), "none that this fedgraft knows"),
        (request("ask", {}, question="train", client=NAME, clients=[NAME], asked=0, committed=0), "the coordinator's package: damaged"),
        (request("join", {"method": {"name": "os.path"}}), "unknown method 'os.path'"),
        (request("join", {"method": {"name": "../../evil"}}), "unknown method"),
        (request("join", {"method": {"name": "flex", "code": "print()"}}), "no such option"),
        (request("join", {"code": {}}), "unknown key 'code'"),
        (request("join", {"seed": -1}), "seed: "),
    ],
)
def test_a_request_that_is_none_is_refused_and_logged(opened, content, said):
    guard = opened()
    refused = answer(guard, content)
    assert refused.kind == "refused"
    assert said in refused.facts["reason"]
    assert (last(guard)["verdict"], last(guard)["bytes_in"]) == ("refused", len(content))
    assert [path.name for path in guard.place.state.iterdir()] == ["site.log.jsonl"]


@pytest.mark.parametrize("reasons", [False, True])
def test_why_something_failed_stays_unless_the_site_tells(opened, values, tmp_path, reasons):
    guard = opened(reasons=reasons)
    rows = tmp_path / "rows" / f"{NAME}.jsonl"
    rows.write_text(rows.read_text() + '{"instruction": 7, "output": "secret"}\n', encoding="utf-8")
    reason = answer(guard, request("join", values())).facts["reason"]
    assert "line 21" in last(guard)["reason"]
    assert (last(guard)["reason"] == reason) is reasons
    assert reasons or str(tmp_path) not in reason
    assert "secret" not in reason


MASKED = {"secure_aggregation": {"name": "secagg_plus"}}


def in_stages(guard, values, shared, number=0, question=TRAIN, **changed):
    """The site's response to one of the questions of a round with two further clients, which are played here."""
    pairs = {name: [key_pair(), key_pair()] for name in ("harbour", "bakery")}
    response = answer(guard, train(values, number, question=KEYS))
    if question == KEYS or response.kind != "reply":
        return response
    public = {name: [one[1] for one in pair] for name, pair in pairs.items()}
    public[NAME] = Bundle.decode(response.content).facts["public_keys"]
    facts = {"round": number, "threshold": 2, "public_keys": public}
    asked = {"clients": [NAME], "client": NAME, "asked": 4 * number + 1, "committed": number}
    response = answer(guard, request("ask", values, Bundle(facts=facts), question=SHARES, **asked))
    if question == SHARES:
        return response
    package = Bundle(trees={"shared": shared}, facts={"round": number, "lr": 1e-3, "peers": ["bakery", "harbour"]})
    return answer(guard, request("ask", values, package, question=TRAIN, **asked))


def test_a_site_that_demands_masks_sends_nothing_else(opened, values, shared):
    guard = opened(secure_aggregation="required")
    response = in_stages(guard, values(**MASKED), shared)
    assert response.kind == "reply"
    assert set(Bundle.decode(response.content).trees) == {"masked"}
    line = last(guard)
    assert line["trees"].keys() == {"masked"}
    assert line["trees"]["masked"]["leaves"] == len(shared)
    assert "examples" not in line["facts"]
    plain = answer(guard, train(values(), shared=shared))
    assert "policy.secure_aggregation: this site sends masked leaves alone" in plain.facts["reason"]
    none = values(secure_aggregation={"name": "none"})
    assert "policy.secure_aggregation" in answer(guard, request("join", none)).facts["reason"]


def test_an_unmasked_reply_is_stopped_at_the_door(opened, values, shared, monkeypatch):
    """A bug in the installed fedgraft: the question forgets its masks."""
    monkeypatch.setattr(chain, "masked_questions", lambda settings, asked, *_: asked)
    guard = opened(secure_aggregation="required")
    response = answer(guard, train(values(**MASKED), shared=shared))
    assert "policy.secure_aggregation: the reply holds leaves under 'shared'" in response.facts["reason"]
    assert guard.log.spent(RUN).total_bytes == 0


@pytest.mark.parametrize("question", [KEYS, SHARES, TRAIN])
def test_what_comes_with_training_is_allowed_with_it_alone(opened, values, shared, question):
    assert in_stages(opened(questions=["train"]), values(**MASKED), shared, question=question).kind == "reply"
    refused = answer(opened(questions=["evaluate"]), train(values(**MASKED), question=question, shared=shared))
    assert f"policy.questions: this site does not answer {question!r}" in refused.facts["reason"]


def test_a_masked_round_that_is_begun_again_counts_once(opened, values, shared):
    """Its keys are new, what it trains on is the same."""
    guard = opened(rounds=3)
    first, second = (in_stages(guard, values(**MASKED), shared) for _ in range(2))
    assert (first.kind, second.kind) == ("reply", "reply")
    assert first.content != second.content
    assert len(guard.log.spent(RUN).rounds) == 1


def test_training_that_diverges_is_told(opened, values, shared):
    broken = {key: torch.full_like(leaf, torch.nan) for key, leaf in shared.items()}
    guard = opened()
    failed = answer(guard, train(values(), shared=broken))
    assert failed.kind == "failed"
    assert NAME in failed.facts["reason"]
    assert last(guard)["verdict"] == "failed"


def test_rows_of_somebody_else_are_refused(opened, values, tmp_path):
    guard = opened(reasons=True)
    (tmp_path / "rows" / f"{NAME}.jsonl").rename(tmp_path / "rows" / "harbour.jsonl")
    assert "rename their file or the site" in answer(guard, request("join", values())).facts["reason"]


def test_without_a_line_in_the_log_nothing_leaves(opened, values, shared, monkeypatch):
    guard = opened()
    answer(guard, request("join", values()))

    def full(path, value):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(files, "append_line", full)
    refused = answer(guard, train(values(), shared=shared))
    assert (refused.kind, refused.content) == ("refused", b"")
    assert "No space left" in refused.facts["reason"]
    assert str(guard.place.state) not in refused.facts["reason"]


def test_a_bug_is_logged_and_raised(opened, values, shared, monkeypatch):
    def careless(method):
        return {"train": partial(dict.__getitem__, {})}

    monkeypatch.setattr(gather, "questions", careless)
    guard = opened()
    with pytest.raises(TypeError):
        guard.handle(train(values(), shared=shared))
    assert last(guard)["verdict"] == "failed"


def test_nothing_that_arrives_can_be_run():
    """The modules of the worker start no process, import nothing by a name that arrived, and evaluate nothing."""
    folder = Path(fedgraft.__file__).parent / "deployment"
    for name in ("frames", "door", "worker", "guard", "policy", "site_log", "service", "forward", "place"):
        tree = ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert not calls & {"eval", "exec", "compile", "__import__", "open"}, name
        assert not imported & {"importlib", "subprocess", "runpy", "ctypes", "flwr"}, name


@pytest.mark.parametrize(
    ("question", "sections", "rows"),
    [
        ("", {}, 40),
        ("graft", {}, 40),
        ("train", {"training": {"steps": 5, "batch_size": 4}}, 20),
        ("finish", {"training": {"steps": 5, "batch_size": 4}}, 20),
        ("train", {"training": {"steps": 5, "batch_size": 4, "least_steps": 2}}, 8),
        ("train", {"training": {"steps": 5, "batch_size": 64}}, 40),
        ("evaluate", {"evaluation": {"generate": False}}, 30),
        ("evaluate", {"evaluation": {"generate": False, "rows": 7}}, 7),
        ("evaluate", {"evaluation": {"generate_rows": 5}}, 5),
        ("evaluate", {"evaluation": {"generate": False, "split": "validation"}}, 12),
    ],
)
def test_rows_behind_a_reply(question, sections, rows):
    row = Example(id="", category="", instruction="", context="", response="")
    data = ClientData(NAME, train=[row] * 40, validation=[row] * 12, test=[row] * 30)
    assert rows_behind(question, data, load_recipe(sections)) == rows


def test_the_log_is_lines_of_json(opened, values):
    guard = opened()
    answer(guard, request("join", values()))
    lines = guard.place.log.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["verdict"] for line in lines] == ["loaded", "answered"]


def test_under_client_privacy_a_site_tells_nothing_but_leaves_and_keeps_its_protection(opened, values, shared):
    """Neither rows nor figures, a salted digest; noise of a secret of its own; and a run can't drop the protection it began with."""
    guard, private = opened(), {"name": "client", "clip": 0.01, "where": "clients", "least": 2}
    open_card = answer(opened(), request("join", values(), run="run-0")).facts["card"]
    card = answer(guard, request("join", values(privacy=private))).facts["card"]
    assert (card["rows"], card["categories"]) == ({}, {})
    assert card["data_digest"] != open_card["data_digest"]
    assert answer(guard, request("join", values(privacy=private))).facts["card"]["data_digest"] == card["data_digest"]
    asked = train(values(privacy=private), shared=shared)
    first, again = (Bundle.decode(answer(guard, asked).content) for _ in range(2))
    assert first.facts == {}
    assert first.digest() == again.digest(), "a question that is asked again gets the same answer"
    assert (guard.place.memories(RUN) / NAME / "noise.key").is_file()
    figures = train(values(privacy=private), number=1, shared=shared, question="evaluate")
    assert Bundle.decode(answer(guard, figures).content).facts == {}
    changed = answer(guard, train(values(), number=1, shared=shared))
    assert "the run began here with other settings of privacy" in changed.facts["reason"]


def test_figures_leave_where_the_recipe_asks_for_them(opened, values, shared):
    private = {"name": "client", "clip": 0.01, "figures": True}
    reply = answer(opened(), train(values(privacy=private), shared=shared, question="evaluate"))
    assert "models" in Bundle.decode(reply.content).facts


def test_secret_noise_of_two_sites_of_one_recipe_is_not_the_same(opened, values, shared):
    private = values(privacy={"name": "examples"})
    replies = [Bundle.decode(answer(opened(), train(private, shared=shared, run=run)).content) for run in ("run-1", "run-2")]
    assert replies[0].digest() != replies[1].digest()
    assert [reply.facts.keys() for reply in replies] == [{"examples"}, {"examples"}]


def test_a_run_cannot_take_its_masks_off(opened, values, shared):
    """With noise in shares a single reply has a share of it alone, which masks alone hide."""
    masked = values(secure_aggregation={"name": "secagg_plus"})
    assert answer(opened(), request("join", masked)).kind == "card"
    refused = answer(opened(), train(values(), shared=shared))
    assert "the run began here with other settings of secure_aggregation" in refused.facts["reason"]

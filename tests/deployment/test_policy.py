"""What a policy lets pass and what it refuses, with the key that refused."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from fedgraft import plugins
from fedgraft.address import nothing, within
from fedgraft.bundle import Outline
from fedgraft.deployment.policy import Refusal, Spent, check_bytes, check_question, check_reply, check_run, check_site, covers
from fedgraft.deployment.site_settings import PolicySettings
from fedgraft.methods.method import Method
from fedgraft.transforms.privacy import ClientPrivacy, ExamplePrivacy, NoPrivacy

ATTENTION, SIDE, OWN = "layers.3.attention.q.A", "layers.3.side.0.expert.gate.A", "layers.3.own.attention.q.A"
ANYTHING = ["layers", "head"]


def refusing(key):
    """Passes for no key, else expects a refusal by it, at the start of its text."""
    return nullcontext() if key is None else pytest.raises(Refusal, match=rf"^{key}: ")


def policy(**settings):
    return PolicySettings.model_validate(settings)


@pytest.mark.parametrize(
    ("pattern", "address", "covered"),
    [
        ("layers.*.attention", ATTENTION, True),
        ("layers.*.attention.*", ATTENTION, True),
        ("layers.*.attention.*.A", ATTENTION, True),
        ("layers.*.attention.*.B", ATTENTION, False),
        ("layers.*.attention.[kq].A", ATTENTION, True),
        ("layers.3", ATTENTION, True),
        ("layers.3", "layers.31.attention.q.A", False),
        ("layers.?", "layers.31.attention.q.A", False),
        ("layers.*.attention", OWN, False),
        ("layers.*.own.attention", OWN, True),
        ("layers.*.att*", ATTENTION, True),
        ("layers.*A", ATTENTION, False),
        ("*", "head.A", True),
        ("layers.*.attention.q.A.more", ATTENTION, False),
        ("LAYERS", ATTENTION, False),
        ("layers.*.attention", SIDE, False),
    ],
)
def test_a_pattern_is_a_head_part_by_part(pattern, address, covered):
    assert covers(pattern, address) is covered


@pytest.mark.parametrize(
    ("settings", "name", "rounds", "key"),
    [
        ({}, "flex", 10**6, None),
        ({"methods": ["flex", "fedavg"]}, "flex", 1, None),
        ({"methods": ["fedavg"]}, "flex", 1, "policy.methods"),
        ({"methods": []}, "flex", 1, "policy.methods"),
        ({"rounds": 5}, "flex", 5, None),
        ({"rounds": 5}, "flex", 6, "policy.rounds"),
        ({"privacy": {"clip": 1.0}}, "flex", 1, "policy.privacy.clip"),
        ({"privacy": {"noise": 0.5}}, "flex", 1, "policy.privacy.noise"),
        ({}, "centralised", 1, "method"),
        ({"methods": ["centralised"]}, "centralised", 1, "method"),
    ],
)
def test_runs(settings, name, rounds, key):
    with refusing(key):
        check_run(policy(**settings), name, plugins.load("method", name).build(), rounds)


@pytest.mark.parametrize(
    ("demanded", "privacy", "key"),
    [
        ({"clip": 1.0, "noise": 0.5}, ClientPrivacy(clip=1.0, noise_multiplier=0.5), None),
        ({}, ClientPrivacy(clip=None, noise_multiplier=0), None),
        ({"clip": 0.9}, ClientPrivacy(clip=1.0), "policy.privacy.clip"),
        ({"clip": 0.9}, ClientPrivacy(clip=None, noise_multiplier=0), "policy.privacy.clip"),
        ({"clip": 1.0}, ClientPrivacy(clip=0.1, quantile=0.5), "policy.privacy.clip"),
        ({"noise": 0.5}, ClientPrivacy(clip=0.1, quantile=0.5), None),
        ({"noise": 1.1}, ClientPrivacy(noise_multiplier=1.0), "policy.privacy.noise"),
        ({"noise": 1.0}, ExamplePrivacy(noise_multiplier=2.0), "policy.privacy.noise"),
        ({"noise": 1.0, "name": "examples"}, ExamplePrivacy(noise_multiplier=2.0), None),
        ({"clip": 1.0, "name": "examples"}, ClientPrivacy(clip=1.0), "policy.privacy.clip"),
        ({"noise": 1.0}, NoPrivacy(), "policy.privacy.noise"),
    ],
)
def test_demanded_privacy(demanded, privacy, key):
    with refusing(key):
        check_run(policy(privacy=demanded), "flex", plugins.load("method", "flex").build(), 1, privacy)


@pytest.mark.parametrize(
    ("settings", "examples", "key"),
    [
        ({}, 1, None),
        ({}, 0, "policy.min_examples"),
        ({"min_examples": 20}, 20, None),
        ({"min_examples": 20}, 19, "policy.min_examples"),
        ({"bases": ["abc", "def"]}, 1, None),
        ({"bases": ["def"]}, 1, "policy.bases"),
        ({"bases": []}, 1, "policy.bases"),
    ],
)
def test_base_and_rows(settings, examples, key):
    with refusing(key) as refused:
        check_site(policy(**settings), "abc", examples)
    assert key != "policy.min_examples" or settings == {} or "19" not in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "question", "rounds", "key"),
    [
        ({}, "train", {"a", "b"}, None),
        ({}, "graft", (), None),
        ({}, "read_rows", (), "policy.questions"),
        ({"questions": ["train"]}, "evaluate", (), "policy.questions"),
        ({"rounds": 2}, "train", {"a"}, None),
        ({"rounds": 2}, "train", {"a", "now"}, None),  # asked again
        ({"rounds": 2}, "train", {"a", "b"}, "policy.rounds"),
        ({"rounds": 2}, "evaluate", {"a", "b"}, None),
    ],
)
def test_questions(settings, question, rounds, key):
    with refusing(key):
        check_question(policy(**settings), question, "now", Spent(rounds=frozenset(rounds)))


@pytest.mark.parametrize(
    ("settings", "trees", "facts", "personal", "key"),
    [
        ({}, {"shared": [ATTENTION]}, {"examples", "loss"}, nothing, None),
        ({}, {"shared": [ATTENTION], "control": [ATTENTION]}, set(), nothing, None),
        ({}, {}, {"models"}, nothing, None),
        ({}, {"personal": []}, set(), nothing, None),
        ({}, {"personal": [ATTENTION]}, set(), nothing, "policy.trees"),
        ({}, {"moments.exp_avg": [ATTENTION]}, set(), nothing, "policy.trees"),
        ({"trees": ["shared"]}, {"shared": [ATTENTION], "control": [ATTENTION]}, set(), nothing, "policy.trees"),
        ({}, {"shared": [ATTENTION, SIDE]}, set(), nothing, "policy.leaves"),
        ({}, {"shared": [OWN]}, set(), nothing, "policy.leaves"),
        ({"leaves": []}, {"shared": [ATTENTION]}, set(), nothing, "policy.leaves"),
        ({"leaves": ANYTHING}, {"shared": [ATTENTION, SIDE, OWN]}, set(), nothing, None),
        ({"leaves": ANYTHING}, {"shared": [ATTENTION, SIDE]}, set(), within("side"), "method"),
        ({"leaves": ANYTHING}, {"control": [SIDE]}, set(), within("side"), "method"),
        ({}, {"shared": [ATTENTION]}, set(), within("attention"), "method"),
        ({}, {}, {"loss", "first_row"}, nothing, "policy.facts"),
        ({"facts": ["examples"]}, {}, {"examples", "loss"}, nothing, "policy.facts"),
        ({"facts": []}, {}, set(), nothing, None),
    ],
)
def test_replies(settings, trees, facts, personal, key):
    content = Outline(trees={name: dict.fromkeys(leaves, 4) for name, leaves in trees.items()}, facts=dict.fromkeys(facts, 1))
    with refusing(key):
        check_reply(policy(**settings), content, personal)


@pytest.mark.parametrize(
    ("settings", "length", "key"),
    [
        ({}, 10**12, None),
        ({"reply_bytes": 100}, 100, None),
        ({"reply_bytes": 100}, 101, "policy.reply_bytes"),
        ({"total_bytes": 100}, 60, None),
        ({"total_bytes": 100}, 61, "policy.total_bytes"),
    ],
)
def test_bytes(settings, length, key):
    with refusing(key):
        check_bytes(policy(**settings), length, Spent(total_bytes=40))


def test_every_shipped_method_but_the_pooled_one_passes_the_default():
    refused = []
    for name in plugins.names("method"):
        method = plugins.load("method", name).build()
        assert isinstance(method, Method)
        try:
            check_run(policy(), name, method, 1)
        except Refusal:
            refused.append(name)
    assert refused == ["centralised"]

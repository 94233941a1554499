"""A reply that is not what was due is lost by name, and the next one is heard."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from fedgraft.aggregation.replies import Due, any_leaves, as_packed, usable
from fedgraft.aggregation.server import Reply
from fedgraft.bundle import Bundle

A, B = "layers.0.attention.q.A", "layers.0.attention.q.B"
PACKED = Bundle(trees={"shared": {A: torch.zeros(2, 3), B: torch.zeros(3, 2), "layers.0.attention.q.residual": torch.zeros(3, 3)}})
TRAINED = Due(leaves=as_packed, facts=("examples",))
FACTS: dict[str, Any] = {"examples": 3, "loss": 0.5}


def reply(facts: Any = FACTS, control: Any = None, **changed: Any) -> Bundle:
    """A sound reply to `PACKED`; None takes a leaf out."""
    leaves = {A: torch.ones(2, 3), B: torch.ones(3, 2)} | {key.replace("_", "."): leaf for key, leaf in changed.items()}
    trees = {"shared": {key: leaf for key, leaf in leaves.items() if leaf is not None}}
    return Bundle(trees=trees | ({"control": control} if control else {}), facts=facts)


def heard(bundle: Bundle, due: Due = TRAINED, sound: Bundle = reply()) -> str:  # noqa: B008 - both are frozen
    """Why the reply is lost, "" if it is not; the one after it is never lost."""
    reasons: list[str] = []
    replies = [Reply(client="ada", bundle=bundle), Reply(client="bo", bundle=sound)]
    kept = usable(iter(replies), {"ada": PACKED, "bo": PACKED}, due, {}, lambda client, why: reasons.append(f"{client}: {why}"))
    assert [one.client for one in kept] == (["bo"] if reasons else ["ada", "bo"])
    return "".join(reasons)


BEGIN = "ada: the reply of client 'ada' can't be used: "
WRONG = {
    "lacks": (reply(layers_0_attention_q_B=None), f"leaf '{B}' of 'shared' is missing"),
    "more": (reply(layers_0_attention_v_A=torch.ones(2, 3)), "leaf 'layers.0.attention.v.A' of 'shared' is there and was not asked for"),
    "residual": (reply(layers_0_attention_q_residual=torch.ones(3, 3)), "'layers.0.attention.q.residual' of 'shared' is there and was not"),
    "tree": (reply(control={A: torch.ones(2, 3)}), f"leaf '{A}' of 'control' is there and was not asked for"),
    "shape": (reply(layers_0_attention_q_A=torch.ones(3, 2)), f"leaf '{A}' of 'shared' has shape (3, 2) in place of (2, 3)"),
    "NaN": (reply(layers_0_attention_q_A=torch.full((2, 3), math.nan)), f"leaf '{A}' of 'shared' holds numbers that are not finite"),
    "infinite": (reply(layers_0_attention_q_A=torch.full((2, 3), -math.inf)), f"leaf '{A}' of 'shared' holds numbers that are not finite"),
    "kind": (reply(layers_0_attention_q_A=torch.ones(2, 3, dtype=torch.long)), f"leaf '{A}' of 'shared' holds numbers that are not finite"),
    "eight bits": (
        reply(layers_0_attention_q_A=torch.ones(2, 3, dtype=torch.float8_e4m3fn)),
        f"leaf '{A}' of 'shared' holds numbers that are not finite",
    ),
    "experts": (reply(facts={"examples": 3, "experts": [[1], ["x"]]}), "its 'experts' is not what it should be ((1, 0): "),
    "no choice": (reply(facts={"examples": 3, "experts": [[]]}), "its 'experts' is not what it should be ((0,): "),
    "errors": (reply(facts={"examples": 3, "errors": "many"}), "its 'errors' is not what it should be ((): "),
    "figures": (
        reply(facts={"examples": 3, "models": {"personal": {"loss": "3"}}}),
        "its 'models' is not what it should be (('personal', 'loss'",
    ),
    "interval": (reply(facts={"examples": 3, "models": {"x": {"interval": {"loss": [1.0]}}}}), "its 'models' is not what it should be ("),
    "unseen": (reply(facts={"examples": 3, "unseen": {"10": [1]}}), "its 'unseen' is not what it should be (('10',): "),
    "no examples": (reply(facts={"loss": 0.5}), "it does not tell 'examples'"),
    "none": (reply(facts={"examples": 0}), "its 'examples' is 0"),
    "text": (reply(facts={"examples": "many"}), "its 'examples' is 'many'"),
    "truth": (reply(facts={"examples": True}), "its 'examples' is True"),
    "endless": (reply(facts={"examples": 10**400}), "its 'examples' is 1000"),
    "NaN loss": (reply(facts=json.loads('{"examples": 3, "loss": NaN}')), "its 'loss' is nan"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_said(wrong):
    bundle, reason = WRONG[wrong]
    assert heard(bundle).startswith(BEGIN)
    assert reason in heard(bundle)


def test_what_is_right_passes():
    assert heard(reply()) == ""
    assert heard(reply(facts={"examples": 1, "loss": -2.5})) == ""
    assert heard(reply(control={A: torch.ones(1)}), Due(leaves=any_leaves)) == ""
    assert "'models'" in heard(Bundle(), Due(facts=("models",)), sound=Bundle(facts={"models": {}}))


def test_a_change_beyond_the_limit_is_lost_with_its_norm():
    """Six ones in A and six in B: the norm of the change is the square root of 12 = 3.464."""
    assert heard(reply(), Due(leaves=as_packed, facts=("examples",), longest=3.465)) == ""
    said = heard(
        reply(),
        Due(leaves=as_packed, facts=("examples",), longest=3.464),
        reply(**{key.replace(".", "_"): PACKED.tree("shared")[key] for key in (A, B)}),
    )
    assert said == f"{BEGIN}its change has the norm 3.464, federation.norm_limit is 3.464"


def test_a_change_beyond_any_number_is_no_bug():
    enormous = torch.full((2, 3), torch.finfo(torch.float32).max)
    assert "its change has the norm 8.335e+38" in heard(reply(layers_0_attention_q_A=enormous), Due(leaves=as_packed, longest=10.0))

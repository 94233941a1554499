"""What single rows give: kept beside the figures, and what the intervals are made of."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedgraft import seeds
from fedgraft.bundle import Bundle
from fedgraft.data.batches import Row, encode
from fedgraft.data.datasets import dolly
from fedgraft.evaluation import answers, personal
from fedgraft.evaluation.answers import answer_scores, choice_scores
from fedgraft.evaluation.personal import evaluate_client, kept_in, measure
from fedgraft.evaluation.settings import EvaluationSettings
from fedgraft.intervals import bootstrap
from fedgraft.methods import fedavg
from fedgraft.methods.method import Prediction
from tests.evaluation.conftest import examples

BASE = Prediction(tree={}, experts=[])
SETTINGS = EvaluationSettings(batch_size=3, generate=False, knowledge_tokens=0, experts=False, resamples=200)


@pytest.fixture
def models(prediction):
    return {"base": BASE, "personal": prediction}


def test_every_row_is_kept_with_what_the_figures_are_made_of(client, models):
    rows = client.data.test
    figures, lines = measure(client, models, rows, SETTINGS)
    for name in models:
        own = [line for line in lines if line["model"] == name]
        assert [line["row"] for line in own] == [row.id for row in rows]
        assert [line["tokens"] for line in own] == [len(row.response) + 1 for row in rows]  # a byte a token, and the end
        tokens = sum(line["tokens"] for line in own)
        assert sum(line["nats"] for line in own) / tokens == pytest.approx(figures[name]["loss"], rel=1e-12)
        assert sum(line["right"] for line in own) / tokens == figures[name]["token_accuracy"]
        alone = [measure(client, {name: models[name]}, [row], SETTINGS)[1][0]["nats"] for row in rows]
        assert [line["nats"] for line in own] == pytest.approx(alone, rel=1e-5)


def test_gain_is_what_the_loss_is_below_that_of_the_base_and_its_interval_pairs_the_rows(client, models):
    figures, lines = measure(client, models, client.data.test, SETTINGS)
    base, own = figures["base"], figures["personal"]
    assert own["gain"] == pytest.approx(base["loss"] - own["loss"], rel=1e-12)
    assert "gain" not in base
    nats = {name: np.array([line["nats"] for line in lines if line["model"] == name]) for name in models}
    tokens = np.array([line["tokens"] for line in lines if line["model"] == "base"])
    parts = {"loss": nats["personal"], "gain": nats["base"] - nats["personal"]}
    for figure, above in parts.items():
        wanted = bootstrap(above, tokens, seeds.numpy_rng(client.seed, "bootstrap", client.name, figure), 200)
        assert own["interval"][figure] == wanted
        assert wanted[0] <= own[figure] <= wanted[1]


def test_few_rows_or_no_resamples_give_no_interval(client, models):
    assert measure(client, models, client.data.test[:4], SETTINGS)[0]["personal"]["interval"] == {}
    assert measure(client, models, client.data.test, SETTINGS.model_copy(update={"resamples": 0}))[0]["base"]["interval"] == {}


def test_rows_are_written_where_the_client_is_and_never_travel(client, tmp_path, monkeypatch):
    monkeypatch.setattr(personal, "MOST_LINES", 9)
    reply = evaluate_client(fedavg.build(), client, Bundle(), SETTINGS, kept_in(tmp_path))
    kept = [json.loads(line) for line in (tmp_path / "ada.jsonl").read_text().splitlines()]
    assert len(kept) == 9  # of 14: seven rows, two models
    assert {"row", "model", "tokens", "nats", "right"} == kept[0].keys()
    assert reply.facts.keys() == {"models"}
    assert "nats" not in json.dumps(reply.facts)


def by_hand(client, model, example):
    """Log-likelihood of every choice after the prompt, without an end token, in float64 and one row at a time."""
    base, found = client.model.base, []
    for choice in example.choices:
        row, _ = encode(replace(example, response=choice), base.tokenizer, "chat", 96)
        ids = row.ids[:-1]
        with torch.no_grad(), client.model.using(model.tree, model.experts):
            scores = base.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        found.append(sum(float(scores[at - 1, ids[at]]) for at in range(row.start, len(ids))))
    return found


def test_the_likeliest_choice_counts(client, prediction):
    """Two answers for every row: one of them is right whichever is likelier, so that both outcomes are seen."""
    rows = []
    for number, example in enumerate(examples(6)):
        choices = ("heath and islet", "dune", "amber birch cedar")
        rows.append(replace(example, choices=choices, response=choices[number % 3]))
    rows[2] = replace(rows[2], choices=())
    scores = choice_scores(client, prediction, rows, 4)
    for at, example in enumerate(rows):
        if not example.choices:
            assert scores["choice_accuracy"][at] is scores["choice_accuracy_norm"][at] is None
            continue
        likelihood = by_hand(client, prediction, example)
        by_length = [value / len(choice) for value, choice in zip(likelihood, example.choices, strict=True)]
        right = example.choices.index(example.response)
        assert scores["choice_accuracy"][at] == float(np.argmax(likelihood) == right)
        assert scores["choice_accuracy_norm"][at] == float(np.argmax(by_length) == right)
    assert {0.0, 1.0} <= {*scores["choice_accuracy"], *scores["choice_accuracy_norm"]}
    figures, lines = measure(client, {"personal": prediction}, rows, SETTINGS)
    judged = [score for score in scores["choice_accuracy"] if score is not None]
    assert figures["personal"]["choice_accuracy"] == sum(judged) / 5
    assert "choice_accuracy" not in lines[2]


def test_all_choices_of_a_row_follow_the_same_prompt(client):
    """Also where the longest one leaves no room for the context."""
    example = replace(examples(6)[5], choices=("a", "b" * 30), response="a")
    first, second = answers._choice_rows(client, example)
    assert isinstance(first, Row)
    assert first.ids[: first.start] == second.ids[: second.start]
    assert (len(first.ids) - first.start, len(second.ids) - second.start) == (1, 30)


def test_exact_matches_are_counted_where_row_or_dataset_asks_for_them(client, monkeypatch):
    rows = [replace(row, exact=number != 1) for number, row in enumerate(client.data.test[:3])]
    monkeypatch.setattr(answers, "generate", lambda *_: [f"{rows[0].response.upper()}.", rows[1].response, "something else"])
    assert answer_scores(client, BASE, rows, SETTINGS)["exact_match"] == [1.0, None, 0.0]
    monkeypatch.setattr(dolly, "METRIC", "exact_match")
    assert answer_scores(client, BASE, rows, SETTINGS)["exact_match"] == [1.0, 1.0, 0.0]

"""Figures of a client's models against a twin that knows neither batches nor padding."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from fedgraft import seeds
from fedgraft.address import MIX
from fedgraft.bundle import Bundle
from fedgraft.data.batches import encode, prompt_ids
from fedgraft.evaluation import answers
from fedgraft.evaluation.answers import answer_scores, generate
from fedgraft.evaluation.knowledge import WINDOW, windows
from fedgraft.evaluation.personal import evaluate_client, measure
from fedgraft.evaluation.response import response_figures
from fedgraft.evaluation.settings import EvaluationSettings
from fedgraft.grafts.graft import GraftedModel
from fedgraft.grafts.lora import LoraSettings
from fedgraft.grafts.side_expert import GraftSettings
from fedgraft.methods import fedavg, flex
from fedgraft.methods.method import Prediction
from fedgraft.training.settings import TrainingSettings
from tests.evaluation.conftest import examples

BASE = Prediction(tree={}, experts=[])


def twin(client, model, rows):
    """Loss, perplexity, accuracy and tokens, one row and one token at a time, by the definition."""
    nll, right, tokens = 0.0, 0, 0
    for example in rows:
        row, _ = encode(example, client.model.base.tokenizer, client.data_settings.template, client.data_settings.max_length)
        with torch.no_grad(), client.model.using(model.tree, model.experts):
            logits = client.model.base.model(torch.tensor([row.ids])).logits[0].double()
        for position in range(row.start, len(row.ids)):
            log_probabilities = logits[position - 1].log_softmax(-1)
            nll -= float(log_probabilities[row.ids[position]])
            right += int(log_probabilities.argmax()) == row.ids[position]
            tokens += 1
    return {"loss": nll / tokens, "perplexity": math.exp(nll / tokens), "token_accuracy": right / tokens, "response_tokens": tokens}


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("kind", ["base", "personal"])
def test_response_figures_are_those_of_single_rows(client, prediction, batch_size, kind):
    model = prediction if kind == "personal" else BASE
    figures = response_figures(client, model, client.data.test, batch_size)
    wanted = twin(client, model, client.data.test)
    assert figures["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert figures["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-4)
    assert figures["token_accuracy"] == wanted["token_accuracy"]
    assert figures["response_tokens"] == wanted["response_tokens"] == sum(len(row.response) + 1 for row in client.data.test)
    assert (figures["rows"], figures["truncated"]) == (7, 1)


def alone(client, model, example):
    """The model as this row blends it."""
    ids = prompt_ids(example, client.model.base.tokenizer, client.data_settings.template, client.data_settings.max_length)
    return Prediction(tree=model.tree | {MIX: model.shares([ids])[0]}, experts=[])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_rows_are_predicted_with_blends_of_their_own(client, blend, batch_size):
    """Loss and answers in batches, against each row alone with its own share."""
    rows = [example for example in client.data.test if not example.context]  # a cut row has another prompt in generation
    figures = response_figures(client, blend, rows, batch_size)
    singles = [(alone(client, blend, row), row) for row in rows]
    parts = [twin(client, model, [row]) for model, row in singles]
    tokens = sum(part["response_tokens"] for part in parts)
    assert figures["loss"] == pytest.approx(sum(part["loss"] * part["response_tokens"] for part in parts) / tokens, rel=1e-5)
    same = replace(blend, shares=lambda prompts: torch.full((len(prompts),), 0.4))
    assert figures["loss"] != pytest.approx(response_figures(client, same, rows, batch_size)["loss"], rel=1e-4)
    settings = EvaluationSettings(batch_size=batch_size, max_new_tokens=6)
    found = generate(client, blend, rows, settings)
    assert found == [generate(client, model, [row], settings)[0] for model, row in singles]
    assert found != generate(client, same, rows, settings)


def test_windows_of_general_text_are_blended_one_by_one(client, blend):
    blend = replace(blend, shares=lambda rows: torch.tensor([ids[0] % 5 / 5 for ids in rows]))
    settings = SETTINGS.model_copy(update={"generate": False, "knowledge_models": ("personal",), "knowledge_tokens": 3 * WINDOW})
    method = replace(fedavg.build(), answer=lambda *_: {"personal": blend})
    base, losses = client.model.base, []
    for window in windows(base.tokenizer, 3 * WINDOW):
        with client.model.using(blend.tree | {MIX: blend.shares([window.tolist()])[0]}, []), torch.no_grad():
            logits = base.model(window[None]).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, window[1:]).item())
    found = evaluate_client(method, client, Bundle(), settings).facts["models"]["personal"]["general_loss"]
    assert found == pytest.approx(sum(losses) / 3, rel=1e-5)


def gates_by_hand(client, model, rows):
    """Mean of 1 / (1 + exp(-(g.x + b))) per layer and graft, one row at a time, from the inputs that the experts modules are given."""
    base, inputs, sums, tokens = client.model.base, {}, {}, 0
    handles = [
        site.experts.register_forward_pre_hook(lambda module, args, layer=site.layer: inputs.update({layer: args[0]}))
        for site in base.sites
    ]
    for example in rows:
        row, _ = encode(example, base.tokenizer, client.data_settings.template, client.data_settings.max_length)
        with torch.no_grad(), client.model.using(model.tree, model.experts):
            base.model(torch.tensor([row.ids]))
        tokens += len(row.ids)
        for site, chosen in zip(base.sites, model.experts, strict=True):
            for number in range(len(chosen)):
                head = f"layers.{site.layer}.side.{number}.mix."
                score = inputs[site.layer].double() @ model.tree[head + "weight"].double() + model.tree.get(head + "bias", 0.0)
                sums[site.layer, number] = sums.get((site.layer, number), 0.0) + float((1 / (1 + torch.exp(-score))).sum())
    for handle in handles:
        handle.remove()
    return [[sums[site.layer, number] / tokens for number in range(len(model.experts[0]))] for site in base.sites]


@pytest.mark.parametrize("per_layer", [1, 2])
def test_gate_means_are_over_real_tokens(client, tiny_base, per_layer):
    """Rows of different lengths in one batch, so that a padded token would move the mean; two grafts have a mean each."""
    model = GraftedModel(tiny_base("qwen2_moe"), LoraSettings(rank=2), GraftSettings(per_layer=per_layer, gate_start="low"))
    experts = [[3, 1][:per_layer], [5, 2][:per_layer]]
    with seeds.torch_default(1):
        tree = {key: leaf + 0.2 * torch.randn_like(leaf) for key, leaf in model.fresh_side(experts, 0).items()}
    grafted, prediction = replace(client, model=model), Prediction(tree=tree, experts=experts)
    wanted = gates_by_hand(grafted, prediction, client.data.test)
    found = response_figures(grafted, prediction, client.data.test, 4)["gate_mean"]
    assert len({round(mean, 4) for layer in wanted for mean in layer}) == 2 * per_layer
    assert [len(layer) for layer in found] == [per_layer] * 2
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-5, atol=1e-6)


def test_gates_are_measured_only_where_there_are_some(client, prediction):
    assert "gate_mean" not in response_figures(client, BASE, client.data.test, 4)
    attention = Prediction(tree={key: leaf for key, leaf in prediction.tree.items() if ".attention." in key}, experts=[])
    assert "gate_mean" not in response_figures(client, attention, client.data.test, 4)
    assert client.model._side._see_gate is None


def test_right_tokens_are_counted(client, prediction, monkeypatch):
    """A model that always says what the tokens say is right everywhere, one that says the next id nowhere."""
    base, head = client.model.base, torch.nn.Identity()

    def always(shift):
        def forward(input_ids, **_):
            logits = torch.zeros(*input_ids.shape, 264)
            following = (input_ids.roll(-1, 1) + shift) % 264
            return type("Output", (), {"logits": head(logits.scatter_(-1, following[..., None], 9.0))})

        return forward

    monkeypatch.setattr(base.model, "get_output_embeddings", lambda: head)
    for shift, accuracy in ((0, 1.0), (1, 0.0)):
        monkeypatch.setattr(base.model, "forward", always(shift))
        assert response_figures(client, BASE, client.data.test, 4)["token_accuracy"] == accuracy


def test_nothing_is_left_in_the_model(client, prediction):
    before = response_figures(client, BASE, client.data.test, 4)
    changed = response_figures(client, prediction, client.data.test, 4)
    assert changed["loss"] != before["loss"]
    assert response_figures(client, BASE, client.data.test, 4) == before


@pytest.mark.parametrize("kind", ["base", "personal"])
def test_batched_answers_are_those_given_one_by_one(client, prediction, kind):
    """Greedy, token by token, without cache and without padding."""
    model = prediction if kind == "personal" else BASE
    settings = EvaluationSettings(batch_size=4, max_new_tokens=6)
    base = client.model.base
    rows = client.data.test
    assert len({len(prompt_ids(row, base.tokenizer, "chat", 96)) for row in rows}) > 3, "the prompts should need padding"
    wanted = []
    for example in rows:
        ids = prompt_ids(example, base.tokenizer, "chat", 96)
        start = len(ids)
        while len(ids) < start + settings.max_new_tokens:
            with torch.no_grad(), client.model.using(model.tree, model.experts):
                ids = [*ids, int(base.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
            if ids[-1] == base.tokenizer.eos_token_id:
                break
        wanted.append(base.tokenizer.decode(ids[start:], skip_special_tokens=True).strip())
    answers = generate(client, model, rows, settings)
    assert answers == wanted
    assert answers == generate(client, model, rows, settings.model_copy(update={"batch_size": 1}))
    assert len(set(answers)) > 1


def test_an_answer_ends_at_the_end_token(client, monkeypatch):
    """A head that prefers the end token gives empty answers at once."""
    head = client.model.base.model.get_output_embeddings()
    favour = torch.zeros(264)
    favour[client.model.base.tokenizer.eos_token_id] = 1e4
    handle = head.register_forward_hook(lambda module, args, output: output + favour)
    try:
        assert generate(client, BASE, client.data.test, EvaluationSettings(max_new_tokens=5)) == [""] * 7
    finally:
        handle.remove()


def test_rouge_is_rouge_score_of_the_answers(client, prediction, monkeypatch):
    rows = client.data.test[:3]
    given = ["Birches, ember", "nothing of it", rows[2].response]
    monkeypatch.setattr(answers, "generate", lambda *_: given)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    wanted = [scorer.score(row.response, answer)["rougeL"].fmeasure for row, answer in zip(rows, given, strict=True)]
    assert wanted[2] == 1.0
    scores = answer_scores(client, prediction, rows, EvaluationSettings())
    assert scores["rougeL"] == pytest.approx([100 * score for score in wanted], rel=1e-12)
    assert scores["exact_match"] == [None] * 3, "no row asks for it, nor does its dataset"
    figures, lines = measure(client, {"base": BASE}, rows, EvaluationSettings(batch_size=2, knowledge_tokens=0))
    assert figures["base"]["rougeL"] == pytest.approx(100 * sum(wanted) / 3, rel=1e-12)
    assert [line["rougeL"] for line in lines] == scores["rougeL"]


@dataclass(frozen=True)
class Sealed:
    """A client's rows whose test split must not be looked at."""

    name: str = "ada"
    train: list = field(default_factory=lambda: examples(4))
    validation: list = field(default_factory=lambda: examples(3, 10))

    @property
    def test(self):
        raise AssertionError("the test rows were read")


SETTINGS = EvaluationSettings(split="validation", batch_size=2, generate_rows=2, max_new_tokens=2, knowledge_tokens=64)


def test_validation_never_reads_test_rows(client):
    sealed = replace(client, data=Sealed())
    figures = evaluate_client(fedavg.build(), sealed, Bundle(), SETTINGS).facts["models"]
    assert figures["base"]["rows"] == 3
    with pytest.raises(AssertionError, match="test rows were read"):
        evaluate_client(fedavg.build(), sealed, Bundle(), SETTINGS.model_copy(update={"split": "test"}))


def test_models_and_figures_are_those_wanted(client, prediction):
    """Every switch of the section does what it says."""
    shared = {key: leaf for key, leaf in prediction.tree.items() if ".attention." in key}
    side = {key: leaf for key, leaf in prediction.tree.items() if ".side." in key}
    before = {key: 2 * leaf for key, leaf in shared.items()}
    client.memory = Bundle(trees={"personal": side, "trained": before}, facts={"experts": prediction.experts})
    package = Bundle(trees={"shared": shared})

    def measured(**changes):
        return evaluate_client(flex.build(), client, package, SETTINGS.model_copy(update=changes)).facts["models"]

    everything = measured()
    assert list(everything) == ["base", "shared", "trained", "personal"]
    assert {name for name, figures in everything.items() if "rougeL" in figures} == {"base", "personal"}
    assert {name for name, figures in everything.items() if "general_loss" in figures} == {"base", "personal"}
    rows = client.data.validation
    trees = {"base": {}, "shared": shared, "trained": before | side, "personal": shared | side}
    for name, tree in trees.items():
        model = Prediction(tree=tree, experts=prediction.experts if name in {"trained", "personal"} else [])
        assert everything[name]["loss"] == pytest.approx(twin(client, model, rows)["loss"], rel=1e-5), name
    assert len({figures["loss"] for figures in everything.values()}) == 4
    assert everything["base"]["general_loss"] != everything["personal"]["general_loss"]
    assert list(measured(models=("personal",))) == ["personal"]
    assert measured(rows=2)["base"]["rows"] == 2
    plain = measured(generate=False, knowledge_tokens=0)
    assert not any({"rougeL", "general_loss"} & figures.keys() for figures in plain.values())
    assert "rougeL" in measured(generate_models=("shared",))["shared"]


def test_bf16_is_near_fp32(client, prediction):
    exact = response_figures(client, prediction, client.data.test, 4)["loss"]
    rough = replace(client, training=TrainingSettings(precision="bf16"))
    loss = response_figures(rough, prediction, client.data.test, 4)["loss"]
    assert loss != exact
    assert loss == pytest.approx(exact, rel=0.02)

"""Multiple choice: the same answers as lm-eval on the same rows, whatever is batched with what."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import pytest
import torch

from fedgraft.address import MIX
from fedgraft.evaluation import harness
from fedgraft.evaluation.choices import Judged, accuracy, judge
from fedgraft.evaluation.knowledge import check_tasks, task_figures
from fedgraft.evaluation.response import predicting
from fedgraft.evaluation.settings import EvaluationSettings
from fedgraft.evaluation.tasks import Question, Task, load_task, load_tasks, shipped_tasks
from fedgraft.moe.load import load_base
from fedgraft.moe.settings import ModelSettings
from tests.evaluation import reference_lm_eval as reference

KINDS = list(reference.KINDS)
needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval: pip install 'fedgraft[eval]'")
NOISE = "ignore"  # lm-eval and what it imports warn of much that is not ours


@pytest.fixture(scope="module")
def embedded():
    return load_base(ModelSettings(threads=1))


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def row(**fields):
    return {"question": "Two and two?", "choices": ["four", "five"], "answer": 0, **fields}


@pytest.mark.parametrize("kind", KINDS)
def test_the_kept_answers_of_lm_eval_are_ours(embedded, tmp_path, kind):
    kept = json.loads(reference.FILE.read_text(encoding="utf-8"))[kind]
    task = load_task(str(reference.write(tmp_path, kind)[0]), "test")
    judged = judge(embedded, task, batch_size=5, precision="fp32")
    assert [list(one.likelihoods) for one in judged] == [pytest.approx(likelihoods, abs=2e-3) for likelihoods in kept["likelihoods"]]
    assert [one.choice for one in judged] == [max(range(4), key=likelihoods.__getitem__) for likelihoods in kept["likelihoods"]]
    assert accuracy(judged, task.lettered) == kept["metrics"]


def test_questions_are_asked_with_blends_of_their_own(client, blend, tmp_path):
    """In batches, against each question alone with its share; lm-eval, which hands over no prompts, is refused before training."""
    base = client.model.base
    rows = [row(question=question) for question in ("One?", "One and one?", "Three and one and one?")]
    task = load_task(write(tmp_path / "own.jsonl", *rows), "test")
    together = judge(base, task, 6, "fp32", partial(predicting, client, blend))
    for one, found in zip(task.questions, together, strict=True):
        share = blend.shares([base.tokenizer(one.prompt)["input_ids"]])[0]
        with client.model.using(blend.tree | {MIX: share}, []):
            (alone,) = judge(base, replace(task, questions=(one,)), 6, "fp32")
        assert found.likelihoods == pytest.approx(alone.likelihoods, rel=1e-4)
    assert len({float(share) for share in blend.shares([base.tokenizer(one.prompt)["input_ids"] for one in task.questions])}) > 1
    with pytest.raises(ValueError, match=r"evaluation.lm_eval: this method blends every row by its prompt"):
        check_tasks(EvaluationSettings(lm_eval=("mmlu",)), row_wise=True)
    check_tasks(EvaluationSettings(), row_wise=True)


@needs_lm_eval
@pytest.mark.slow
@pytest.mark.filterwarnings(NOISE)
@pytest.mark.parametrize("kind", KINDS)
def test_lm_eval_gives_the_same_on_a_grafted_model(client, prediction, tmp_path, monkeypatch, kind):
    monkeypatch.setitem(os.environ, "HF_HOME", str(tmp_path))
    base = client.model.base
    rows, task = reference.write(tmp_path, kind)
    plain, _ = reference.answers(base, task)
    with client.model.using(prediction.tree, prediction.experts):
        theirs, metrics = reference.answers(base, task)
        ours = judge(base, load_task(str(rows), "test"), 3, "fp32")
        figures = harness.harness_figures(base, [str(task)], 2, None, "fp32")
        few = harness.harness_figures(base, [str(task)], 2, 3, "fp32")
    assert theirs != plain  # so it is the grafted model that answers
    assert [list(one.likelihoods) for one in ours] == [pytest.approx(likelihoods, abs=1e-4) for likelihoods in theirs]
    assert [one.choice for one in ours] == [max(range(4), key=likelihoods.__getitem__) for likelihoods in theirs]
    assert accuracy(ours, kind == "mmlu") == metrics == {key.removeprefix(f"{kind}/"): value for key, value in figures.items()}
    assert few[f"{kind}/acc"] == sum(one.choice == one.question.answer for one in ours[:3]) / 3


@needs_lm_eval
@pytest.mark.filterwarnings(NOISE)
def test_tasks_that_lm_eval_does_not_have_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"evaluation.lm_eval: .*nowhere.yaml.*no such file"):
        harness.check([str(tmp_path / "nowhere.yaml")])


def test_a_task_that_both_ways_have_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "check", lambda sources: {"own", "other"})
    with pytest.raises(ValueError, match="tasks and lm_eval both have a task 'own'"):
        check_tasks(EvaluationSettings(tasks=(write(tmp_path / "own.jsonl", row()),), lm_eval=("own",)))


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    harness.check([])
    with pytest.raises(ValueError, match=r"lm-eval is not installed; pip install 'fedgraft\[eval\]'"):
        check_tasks(EvaluationSettings(lm_eval=("mmlu",)))


def test_batches_and_shared_prompts_change_nothing(tiny_base):
    """A row on its own, every option in a forward of its own, is the plain definition."""
    base = tiny_base("olmoe")
    options = ("a", "b", "both of them", "none, or so it seems")
    task = Task(name="t", lettered=False, questions=[Question(f"Question: {'why ' * at}?\nAnswer:", options, 0) for at in range(5)])
    judged = judge(base, task, 4, "fp32")
    for one in judged:
        for option, likelihood in zip(options, one.likelihoods, strict=True):
            before, ids = (base.tokenizer(text)["input_ids"] for text in (one.question.prompt, f"{one.question.prompt} {option}"))
            with torch.no_grad():
                logs = base.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            wanted = sum(float(logs[at - 1, ids[at]]) for at in range(len(before), len(ids)))
            assert likelihood == pytest.approx(wanted, abs=1e-4)


def test_a_prompt_too_long_for_the_model_loses_its_beginning(tiny_base):
    base = tiny_base("olmoe", max_position_embeddings=64)
    end = "x" * 70 + "\nAnswer:"
    tasks = [Task(name="t", lettered=False, questions=[Question(start + end, ("yes", "no"), 0)]) for start in ("", "long ago " * 30)]
    short, long = (judge(base, task, 2, "fp32")[0].likelihoods for task in tasks)
    assert long == pytest.approx(short, abs=1e-4)


def test_choices_and_accuracies():
    question = Question("p", ("ab", "abcdefgh", "abc"), 1)
    judged = [Judged(question, (-4.0, -6.0, -5.0)), Judged(question, (-6.0, -6.0, -7.0))]
    assert [one.choice for one in judged] == [0, 0]  # of equals the first, as numpy's argmax
    assert [one.choice_by_length for one in judged] == [1, 1]  # -4/2, -6/8, -5/3
    assert accuracy(judged, lettered=False) == {"acc": 0.0, "acc_norm": 1.0}
    assert accuracy(judged, lettered=True) == {"acc": 0.0}


def test_the_shipped_task_is_whole():
    assert shipped_tasks() == ["arc_easy_sample"]
    task = load_task("arc_easy_sample", "validation")  # rows without a split count for every one
    assert (task.name, task.lettered, len(task.questions)) == ("arc_easy_sample", False, 100)
    assert {len(question.options) for question in task.questions} == {4}
    assert len(load_task("arc_easy_sample", "test", 7).questions) == 7


def test_rows_of_other_splits_are_left_out(tmp_path):
    path = write(tmp_path / "own.jsonl", row(split="test"), row(split="dev"), row(split="validation"), row(split="test"))
    assert [len(load_task(path, split).questions) for split in ("test", "validation")] == [2, 1]
    with pytest.raises(ValueError, match=r"own.jsonl: no row of the split 'train'"):
        load_task(path, "train")


BAD = {
    "field 'question' must be text": {"question": 3},
    "field 'choices' must be a list of texts": {"choices": ["four", ""]},
    "1 choices; there must be 2 to 26": {"choices": ["four"]},
    "field 'answer' must be the index of the right choice, 0 to 1, got 2": {"answer": 2},
    "field 'answer' must be the index of the right choice, 0 to 1, got True": {"answer": True},
    "either every row has a 'subject'": {"subject": "sums"},
}


@pytest.mark.parametrize(("message", "fields"), BAD.items(), ids=list(BAD))
def test_a_row_that_is_no_question_is_named(tmp_path, message, fields):
    with pytest.raises(ValueError, match=f"own.jsonl, line 2: .*{message}"):
        load_task(write(tmp_path / "own.jsonl", row(), row(**fields)), "test")


def test_unknown_and_double_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"arc_easy_sampel: no such file \(did you mean 'arc_easy_sample'\?\)"):
        load_task("arc_easy_sampel", "test")
    own = write(tmp_path / "arc_easy_sample.jsonl", row())
    with pytest.raises(ValueError, match="two tasks are called 'arc_easy_sample'"):
        load_tasks(["arc_easy_sample", own], "test")


def test_the_untouched_base_is_asked_once(tiny_base, tmp_path, monkeypatch):
    base, asked = tiny_base("olmoe"), []
    settings = EvaluationSettings(tasks=(write(tmp_path / "own.jsonl", row()),), batch_size=2)
    monkeypatch.setattr("fedgraft.evaluation.knowledge.judge", lambda *words: asked.append(words[0]) or judge(*words))
    first = [task_figures(base, settings, "fp32", untouched=True) for _ in range(2)]
    assert first[0] == first[1]
    assert first[0].keys() == {"own/acc", "own/acc_norm"}
    assert len(asked) == 1
    task_figures(base, settings, "fp32")
    task_figures(tiny_base("olmoe", seed=1), settings, "fp32", untouched=True)
    assert len(asked) == 3

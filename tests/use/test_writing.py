"""Answers to many prompts, as they come, and in a conversation; files of prompts."""

from __future__ import annotations

import json

import pytest
import torch

import fedgraft
from fedgraft.data.example import Example
from fedgraft.use.prompts import example_of, read_prompts
from fedgraft.use.writing import Conversation, Sampling, stream_answer, write_answers, write_file

PROMPTS = [example_of(text) for text in ("How many loafs on day 3?", "Boats?", "How many beans are there on day 12, in the garden?")]
GREEDY = Sampling(max_new_tokens=7)


@pytest.fixture(scope="module")
def loaded(trained):
    return fedgraft.load(trained("flex").folder)


def alone(loaded, client, prompt):
    """Greedy tokens from transformers, one prompt at a time."""
    ids = torch.tensor([loaded.prompt(prompt)])
    with loaded.using(client) as model:
        return loaded.decode(model.generate(ids, max_new_tokens=7, do_sample=False)[0, ids.shape[1] :].tolist())


def test_batched_answers_are_those_of_one_prompt_at_a_time(loaded):
    for client in ("base", "garden", "harbour"):
        expected = [alone(loaded, client, prompt) for prompt in PROMPTS]
        for size in (1, 2, 8):
            assert write_answers(loaded, client, PROMPTS, GREEDY, size) == expected
    assert loaded.client == "base"


def test_drawn_answers_follow_the_seed(loaded):
    def drawn(seed, top_p=1.0):
        return write_answers(loaded, "garden", PROMPTS, Sampling(max_new_tokens=7, temperature=1.0, seed=seed, top_p=top_p), 2)

    torch.manual_seed(1)
    first = drawn(3)
    torch.manual_seed(2)
    assert drawn(3) == first
    assert drawn(4) != first
    assert drawn(3, top_p=1e-6) == write_answers(loaded, "garden", PROMPTS, GREEDY, 2)  # the likeliest token alone is left


def test_a_streamed_answer_is_the_whole_one_in_pieces(loaded):
    prompt, pieces = loaded.prompt(PROMPTS[0]), []
    stream_answer(loaded, "garden", prompt, GREEDY, pieces.append)
    assert "".join(pieces).strip() == write_answers(loaded, "garden", PROMPTS[:1], GREEDY, 1)[0]
    assert all(pieces)


def test_the_file_says_whose_answer_it_is(loaded):
    done = []
    lines = [json.loads(line) for line in write_file(loaded, ["base", "garden"], PROMPTS, GREEDY, 2, lambda: done.append(1)).splitlines()]
    assert [(line["model"], line["row"]) for line in lines] == [(name, row) for name in ("base", "garden") for row in (1, 2, 3)]
    assert len(done) == 6
    assert lines[4] == {"model": "garden", "row": 2, "prompt": "Boats?", "answer": write_answers(loaded, "garden", PROMPTS, GREEDY, 2)[1]}


def test_a_conversation_remembers_and_forgets(loaded):
    talk = Conversation(loaded, "garden", system="Be short.")
    first = talk.say("How many?", GREEDY)
    assert talk.messages == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": first},
    ]
    second = talk.say("And now?", GREEDY)
    with loaded.using("garden") as model:
        ids = torch.tensor([loaded.prompt([*talk.messages[:-1]])])
        assert loaded.decode(model.generate(ids, max_new_tokens=7, do_sample=False)[0, ids.shape[1] :].tolist()) == second
    talk.forget()
    assert talk.messages == [{"role": "system", "content": "Be short."}]
    assert talk.say("How many?", GREEDY) == first


def test_an_answer_that_is_stopped_is_remembered_as_far_as_it_was_heard(loaded):
    talk, heard = Conversation(loaded, "garden"), []

    def stop(piece):
        heard.append(piece)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.say("How many?", Sampling(max_new_tokens=40), stop)
    assert talk.messages[-1] == {"role": "assistant", "content": heard[0].strip()}
    assert loaded.client == "base"


def test_old_turns_make_room(loaded):
    talk = Conversation(loaded, "garden")
    for number in range(40):
        talk.messages += [{"role": "user", "content": f"Question {number}, with some words."}, {"role": "assistant", "content": "Yes."}]
    talk.say("The last one?", GREEDY)
    assert len(talk.messages) == 82
    with pytest.raises(ValueError, match=r"1020 new tokens leave no room for a prompt: .* holds 1024; ask for at most 1008"):
        talk.say("Now?", Sampling(max_new_tokens=1020))


def test_prompts_are_read_from_text_and_rows(tmp_path):
    text = tmp_path / "p.txt"
    text.write_text("One?\n\n  Two?  \n")
    assert [(row.instruction, row.id) for row in read_prompts(text)] == [("One?", f"{text}, line 1"), ("Two?", f"{text}, line 3")]
    rows = tmp_path / "p.jsonl"
    messages = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, {"role": "user", "content": "C"}]
    lines = [
        {"prompt": "One?"},
        {"instruction": "Two?", "input": "A text.", "output": "An answer that is not shown."},
        {"messages": messages},
        {"messages": [*messages, {"role": "assistant", "content": "an answer"}]},
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_prompts(rows)
    assert [(row.instruction, row.context, row.response) for row in found[:2]] == [("One?", "", ""), ("Two?", "A text.", "")]
    assert [(row.instruction, row.turns) for row in found[2:]] == [("C", (("user", "A"), ("assistant", "B")))] * 2
    assert isinstance(found[0], Example)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("none.txt", None, "no such file"),
        ("empty.txt", "\n\n", "holds no prompts"),
        ("bad.jsonl", '{"prompt": 3}\n', r"bad\.jsonl, line 1: field 'prompt' must be text"),
        ("bad.jsonl", '{"text": "x"}\n', r"line 1: no prompt in it; .* \(it has text\)"),
        ("bad.jsonl", '{"prompt": "x"}\n{"messages": []}\n', "line 2: the last message must be the user's"),
        ("bad.jsonl", '{"messages": ["x"]}\n', "line 1: field 'messages' must be a list of objects"),
        ("bad.jsonl", "not json\n", "line 1: broken JSON"),
    ],
)
def test_what_is_no_prompt_is_named(tmp_path, name, content, why):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=why):
        read_prompts(path)

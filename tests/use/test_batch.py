"""Answers written in one batch, against transformers' `generate` for each alone."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

import fedgraft
from fedgraft.use.answer import Answer, Wish, next_tokens
from fedgraft.use.batch import Batch
from tests.families.twins import twin

QUESTIONS = ["How many boats on day 3?", "Beans?", "How many loafs are there on day 12, and why are they there?", "Why?", "What is it?"]


def write(batch, answers, joins=(2, 1)):
    """All answers, joining a few at a time with a step in between where the batch lets them; returns the widths of its steps."""
    left, widths, sizes = list(answers), [], list(joins)
    while left or batch.answers:
        room = min(batch.room, sizes.pop(0) if sizes else batch.room)
        if left and room:
            batch.join(left[:room])
            left = left[room:]
        else:
            batch.step()
        widths.append(len(batch.answers))
        batch.leave([answer for answer in batch.answers if answer.reason])
    return widths


def generated(loaded, wish):
    """The same by transformers."""
    ids = torch.tensor([wish.prompt])
    with loaded.using(wish.client) as model:
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=wish.most, do_sample=False)[
            0, ids.shape[1] :
        ].tolist()


def test_mixed_answers_are_each_model_s_own_whenever_they_join_and_leave(trained):
    loaded = fedgraft.load(trained("flex").folder)
    names = ["garden", "base", "harbour", "bakery", "shared"]
    wishes = [
        Wish(client=name, prompt=loaded.prompt(question), most=most)
        for name, question, most in zip(names, QUESTIONS, (24, 9, 16, 30, 4), strict=True)
    ]
    answers = [Answer(wish) for wish in wishes]
    widths = write(Batch(loaded), answers)
    assert max(widths) > 2
    for answer in answers:
        assert answer.written == generated(loaded, answer.wish), answer.wish.client
        assert answer.text == loaded.decode(answer.written)
        assert answer.reason == ("stop" if answer.written[-1] == loaded.end_id else "length")
    assert loaded.client == "base"


KINDS = {"qwen3_moe": 5, "deepseek_v3": 5, "mixtral": 3, "gpt_oss": 3, "jamba": 3, "nemotron_h": 3, "minimax": 1, "deepseek_v32": 1}
"""Families by what their caches allow: rows that join and leave; rows that only leave; one row at a time. How many run at once below."""


@pytest.mark.parametrize("family", KINDS)
def test_every_kind_of_cache_is_used_as_it_allows(family):
    model = twin(family, None)
    model.generation_config.update(eos_token_id=2, pad_token_id=0)

    @contextmanager
    def alone(clients):
        yield model

    base = SimpleNamespace(pad_id=0, device=torch.device("cpu"))
    tokenizer = SimpleNamespace(decode=lambda ids, **_: " ".join(map(str, ids)))
    loaded = SimpleNamespace(
        model=model, grafted=SimpleNamespace(base=base), end_id=2, tokenizer=tokenizer, rows=alone, using=lambda name: alone([name])
    )
    rng = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 60, (size,), generator=rng).tolist() for size in (5, 11, 8, 3, 14)]
    answers = [Answer(Wish(client="x", prompt=prompt, most=5)) for prompt in prompts]
    widths = write(Batch(loaded), answers, joins=(3,))
    assert max(widths) == KINDS[family]
    for answer in answers:
        assert answer.written == generated(loaded, answer.wish)


def test_drawing_depends_on_the_seed_and_not_on_company(trained):
    loaded = fedgraft.load(trained("flex").folder)
    prompt = loaded.prompt(QUESTIONS[0])

    def drawn(seed, **other):
        return Answer(Wish(client="garden", prompt=prompt, most=12, seed=seed, **({"temperature": 1.0} | other)))

    alone, company = [drawn(1)], [drawn(1), drawn(2), drawn(3, temperature=0.0), drawn(-4, top_p=0.5), drawn(None)]
    write(Batch(loaded), alone)
    write(Batch(loaded), company, joins=(5,))
    assert alone[0].written == company[0].written
    assert len({tuple(answer.written) for answer in company}) == 5
    assert company[2].written == generated(loaded, company[2].wish)


def test_drawn_tokens_have_the_model_s_odds():
    """4,000 draws of odds 0.5, 0.3, 0.2: within four standard deviations; top_p 0.6 leaves the two likeliest at 5 : 3."""
    logits = torch.tensor([0.3, 0.5, 0.2]).log()[None] * 2  # at temperature 2
    for top_p, odds in ((1.0, {1: 0.5, 0: 0.3, 2: 0.2}), (0.6, {1: 0.625, 0: 0.375}), (0.01, {1: 1.0})):
        answer = Answer(Wish(client="x", prompt=[1], most=1, temperature=2.0, top_p=top_p, seed=5))
        counts = Counter(next_tokens(logits, [answer])[0] for _ in range(4000))
        assert counts.keys() == odds.keys()
        for token, share in odds.items():
            assert abs(counts[token] - 4000 * share) <= 4 * (4000 * share * (1 - share)) ** 0.5


def told(loaded, text, **wish):
    """The pieces that are told while this text is written, and the answer."""
    ids = loaded.tokenizer(text)["input_ids"]
    answer, pieces = Answer(Wish(client="base", prompt=[1], most=len(ids), **wish)), []
    for token in ids:
        answer.take(token, loaded)
        pieces.append(answer.news(loaded))
        if answer.reason:
            break
    return pieces, answer


def test_text_is_told_once_it_is_certain(trained):
    """A token is a byte here, so a letter of two bytes is told with its second; white space around the answer is no part of it."""
    loaded = fedgraft.load(trained("flex").folder)
    assert told(loaded, " aé b ")[0] == ["", "a", "", "é", "", " b", ""]
    assert told(loaded, " aé b ", verbatim=True)[0] == [" ", "a", "", "é", " ", "b", " "]
    pieces, answer = told(loaded, "one, two. three", stop=("two. t", "!"))
    assert ("".join(pieces), answer.text, answer.reason) == ("one,", "one,", "stop")
    assert pieces[5:11] == ["", "", "", "", "", ""]
    pieces, answer = told(loaded, "one, two", stop=("two. t",))
    assert ("".join(pieces), answer.reason) == ("one, two", "length")
    pieces, answer = told(loaded, "one<|im_end|>two")
    assert ("".join(pieces), answer.text, answer.reason) == ("one", "one", "stop")

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgraft.data.batches import Row, batches_alike, batches_in_order, collate, encode, encode_all, first_tokens, prompt_ids, round_rows
from fedgraft.data.example import Example
from fedgraft.data.settings import DataSettings


def example(instruction="Name it.", context="", response="Blue.", turns=()):
    return Example("7", "colours", instruction, context, response, turns)


def text(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False)


def parts(tokenizer, row):
    return text(tokenizer, row.ids[: row.start]), text(tokenizer, row.ids[row.start :])


HISTORY = (("system", "Be brief."), ("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2"))


@pytest.mark.parametrize("turns", [(), HISTORY])
def test_chat_row_is_the_template_s_text_up_to_the_end_of_the_turn(tokenizer, turns):
    row, cut = encode(example(context="It is the sky.", turns=turns), tokenizer, "chat", 4096)
    messages = [*turns, ("user", "Name it.\n\nIt is the sky."), ("assistant", "Blue.")]
    whole = tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in messages], tokenize=False)
    assert text(tokenizer, row.ids) + "\n" == whole
    assert parts(tokenizer, row)[1] == "Blue.<|im_end|>"
    assert not cut


def test_labels_are_the_template_s_own_assistant_mask(tokenizer):
    """Twin: transformers' mask of the {% generation %} blocks."""
    row, _ = encode(example(context="It is the sky."), tokenizer, "chat", 4096)
    labels = collate([row], 0).labels[0]
    messages = [{"role": "user", "content": "Name it.\n\nIt is the sky."}, {"role": "assistant", "content": "Blue."}]
    twin = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    mask = torch.tensor(twin["assistant_masks"][:-1])  # the template's last line break is not trained
    assert torch.equal((labels != -100).long(), mask)
    assert torch.equal(labels[mask.bool()], torch.tensor(twin["input_ids"][:-1])[mask.bool()])


@pytest.mark.parametrize("template", ["chat", "alpaca"])
@pytest.mark.parametrize("response", ["Blue.", "\n\nBlue.", "  Blue.", "ü", "xqresponseqx"])
def test_generation_prompt_is_the_training_prompt(tokenizer, template, response):
    given_example = example(context="xqresponseqx It is the sky.", response=response)
    row, _ = encode(given_example, tokenizer, template, 4096)
    assert row.ids[: row.start] == prompt_ids(given_example, tokenizer, template, 4096)
    lead = " " if template == "alpaca" else ""
    assert parts(tokenizer, row)[1] == lead + response + "<|im_end|>"


def test_chat_prompt_is_the_usual_generation_prompt(tokenizer):
    usual = tokenizer.apply_chat_template([{"role": "user", "content": "Name it."}], add_generation_prompt=True, tokenize=False)
    assert text(tokenizer, prompt_ids(example(), tokenizer, "chat", 4096)) == usual


def test_alpaca_wording(tokenizer):
    row, _ = encode(example(context="It is {the} sky."), tokenizer, "alpaca", 4096)
    assert text(tokenizer, row.ids) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName it.\n\nIt is {the} sky.\n\n### Response: Blue.<|im_end|>"
    )


def test_context_is_cut_from_its_end_and_the_response_stays(tokenizer):
    for limit in range(36, 115):  # 33 tokens without a context, 115 with all of it
        row, cut = encode(example(context="0123456789" * 8), tokenizer, "chat", limit)
        prompt, response = parts(tokenizer, row)
        kept = prompt.split("\n\n")[1].split("<|im_end|>")[0]
        assert cut
        assert response == "Blue.<|im_end|>"
        assert len(row.ids) == limit  # one token a character: nothing is wasted
        assert ("0123456789" * 8).startswith(kept)
        assert kept


def test_response_is_cut_only_when_the_bare_prompt_leaves_no_room(tokenizer):
    bare = len(prompt_ids(example(), tokenizer, "chat", 4096))
    long = example(context="some context", response="r" * 40)
    whole, cut = encode(long, tokenizer, "chat", bare + 41)
    assert cut
    assert parts(tokenizer, whole)[1] == "r" * 40 + "<|im_end|>"
    short, cut = encode(long, tokenizer, "chat", bare + 30)
    assert cut
    assert parts(tokenizer, short)[1] == "r" * 30
    assert len(short.ids) == bare + 30


def test_a_long_instruction_leaves_a_quarter_to_the_response(tokenizer):
    row, cut = encode(example(instruction="i" * 500, response="r" * 500), tokenizer, "chat", 200)
    assert cut
    prompt, response = parts(tokenizer, row)
    assert response == "r" * 50
    assert prompt.startswith("<|im_start|>user\niii")
    assert prompt.endswith("i<|im_end|>\n<|im_start|>assistant\n")


def test_oldest_turns_go_before_the_response_is_cut(tokenizer):
    whole, _ = encode(example(turns=HISTORY), tokenizer, "chat", 4096)
    row, cut = encode(example(turns=HISTORY), tokenizer, "chat", len(whole.ids) - 1)
    prompt, response = parts(tokenizer, row)
    assert cut
    assert response == "Blue.<|im_end|>"
    assert "One?" not in prompt
    assert "Two?" in prompt
    assert "Be brief." in prompt


@settings(max_examples=60, deadline=None)
@given(
    instruction=st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=80).filter(str.strip),
    context=st.text(st.characters(codec="utf-8"), max_size=120),
    response=st.text(st.characters(codec="utf-8"), min_size=1, max_size=80).filter(str.strip),
    limit=st.integers(90, 300),
)
def test_any_row_fits_and_is_never_empty(tokenizer, instruction, context, response, limit):
    subject = example(instruction, context, response)
    row, cut = encode(subject, tokenizer, "chat", limit)
    assert 0 < row.start < len(row.ids) <= limit
    assert 0 < len(prompt_ids(subject, tokenizer, "chat", limit)) <= limit
    bare = len(prompt_ids(example(instruction), tokenizer, "chat", 10_000))
    if bare + len(response.encode()) + 1 <= limit:
        assert row.ids[row.start :] == [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    if not cut:
        assert row.ids[: row.start] == prompt_ids(subject, tokenizer, "chat", limit)


def test_encode_all_counts_what_was_cut(tokenizer):
    rows, cut = encode_all([example(), example(context="c" * 500), example()], tokenizer, DataSettings(max_length=100))
    assert cut == 1
    assert [len(row.ids) <= 100 for row in rows] == [True] * 3


def test_no_room_beside_the_template(tokenizer):
    with pytest.raises(ValueError, match=r"row '7': max_length 16 leaves no room beside the template's own words; raise data.max_length"):
        encode(example(), tokenizer, "chat", 16)


def test_collate_pads_right_and_counts():
    batch = collate([Row([5, 6, 7, 8], 2), Row([9, 4], 1)], pad_id=0)
    assert batch.ids.tolist() == [[5, 6, 7, 8], [9, 4, 0, 0]]
    assert batch.mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.labels.tolist() == [[-100, -100, 7, 8], [-100, 4, -100, -100]]
    assert (batch.tokens, batch.response_tokens) == (6, 3)
    assert {batch.ids.dtype, batch.mask.dtype, batch.labels.dtype} == {torch.int64}
    assert batch.to("cpu").ids.tolist() == batch.ids.tolist()


def test_a_pad_token_inside_a_row_is_still_a_token():
    batch = collate([Row([5, 0, 0], 1)], pad_id=0)
    assert (batch.tokens, batch.response_tokens) == (3, 2)


@given(count=st.integers(1, 40), per_round=st.integers(1, 50), rounds=st.integers(1, 8), seed=st.integers(0, 2**32))
def test_every_epoch_is_a_permutation(count, per_round, rounds, seed):
    stream = [index for round in range(rounds) for index in round_rows(count, per_round, round, seed, "a")]
    assert len(stream) == rounds * per_round
    for first in range(0, len(stream) - count + 1, count):
        assert sorted(stream[first : first + count]) == list(range(count))


@given(count=st.integers(1, 40), per_round=st.integers(1, 20), round=st.integers(0, 6), seed=st.integers(0, 100))
def test_a_round_is_a_window_of_one_stream(count, per_round, round, seed):
    """Stateless: the rounds cut one stream, whatever their size."""
    long = round_rows(count, (round + 1) * per_round, 0, seed, "a")
    assert round_rows(count, per_round, round, seed, "a") == long[round * per_round :]


def test_clients_seeds_and_epochs_differ():
    orders = [round_rows(30, 30, *rest) for rest in ((0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"))]
    assert len({tuple(order) for order in orders}) == 4


def test_no_rows_to_train_on():
    with pytest.raises(ValueError, match="client 'a' has no training rows"):
        round_rows(0, 4, 0, 0, "a")


@given(lengths=st.lists(st.integers(2, 9), min_size=1, max_size=20), batch_size=st.integers(1, 6))
def test_batches_in_order_cover_every_row_once_with_its_index(lengths, batch_size):
    rows = [Row([index + 1] * length, 1) for index, length in enumerate(lengths)]
    batches = list(batches_in_order(rows, batch_size, 0))
    assert sorted(index for indices, _ in batches for index in indices) == list(range(len(rows)))
    for indices, batch in batches:
        assert batch.ids[:, 0].tolist() == [index + 1 for index in indices]
        assert batch.mask.sum(1).tolist() == [lengths[index] for index in indices]
    assert all(left.ids.shape[1] >= right.ids.shape[1] for (_, left), (_, right) in pairwise(batches))


@given(st.lists(st.integers(1, 9), max_size=8), st.integers(1, 40))
def test_first_tokens_are_the_beginning_of_all(lengths, count):
    """Twin: all ids one after another, cut."""
    rows = [Row([10 * number + at for at in range(length)], start=length // 2) for number, length in enumerate(lengths)]
    drawn = []
    chosen = list(first_tokens((drawn.append(row) or row for row in rows), count))
    assert [token for row in chosen for token in row.ids] == [token for row in rows for token in row.ids][:count]
    assert len(chosen) == len(drawn)
    assert all(len(row.ids) > 0 and row.start <= len(row.ids) for row in chosen)


@given(st.lists(st.integers(1, 900), max_size=30), st.sampled_from([900, 2000, 5000]))
def test_batches_alike_hold_every_row_once_within_bounds(lengths, most):
    rows = [Row([number + 1] * length, start=0) for number, length in enumerate(lengths)]
    batches = list(batches_alike(rows, most, 0))
    assert sorted(int(row[0]) for batch in batches for row in batch.ids) == list(range(1, len(rows) + 1))
    for batch in batches:
        assert len(batch.ids) == 1 or batch.ids.numel() <= most
        own = batch.mask.sum(1).tolist()
        assert own == sorted(own, reverse=True)
        assert all(length >= 0.75 * own[0] for length in own[-(-1024 // own[0]) :])  # rows beyond the first 1,024 tokens are alike

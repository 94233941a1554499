import pytest

from fedgraft.data.batches import encode, prompt_ids
from fedgraft.data.example import Example
from fedgraft.data.templates import end_id

EXAMPLE = Example("7", "colours", "Name it.", "", "Blue.")
TURNS = Example("7", "colours", "Name it.", "", "Blue.", (("system", "Be brief."),))
BRACKETS = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + '<|endoftext|>' }}"
    "{% else %}{{ raise_exception('no system role') }}{% endif %}{% endfor %}"
)


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False)


def test_end_of_turn_is_the_template_s_even_where_eos_is_another(make_tokenizer):
    tokenizer = make_tokenizer(BRACKETS)
    assert tokenizer.eos_token == "<|im_end|>"
    row, _ = encode(EXAMPLE, tokenizer, "chat", 100)
    assert decoded(tokenizer, row.ids[: row.start]) == "[INST] Name it. [/INST]"
    assert decoded(tokenizer, row.ids[row.start :]) == " Blue.<|endoftext|>"
    assert end_id(tokenizer, "chat") == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert end_id(tokenizer, "alpaca") == tokenizer.eos_token_id


def test_template_without_an_end_marker_ends_with_eos(make_tokenizer):
    tokenizer = make_tokenizer("{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}")
    row, _ = encode(EXAMPLE, tokenizer, "chat", 100)
    assert decoded(tokenizer, row.ids) == "user: Name it.\nassistant: Blue.<|im_end|>"


def test_empty_thinking_block_belongs_to_the_prompt(make_tokenizer):
    chatml = make_tokenizer().chat_template
    words = "{{ message['content'] + '<|im_end|>' }}{% endgen"
    assert words in chatml
    tokenizer = make_tokenizer(chatml.replace(words, words.replace("{{ ", "{{ '<think>\n\n</think>\n\n' + ")))
    row, _ = encode(EXAMPLE, tokenizer, "chat", 100)
    assert decoded(tokenizer, row.ids[: row.start]).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert decoded(tokenizer, row.ids[row.start :]) == "Blue.<|im_end|>"
    assert prompt_ids(EXAMPLE, tokenizer, "chat", 100) == row.ids[: row.start]


def test_tokenizer_that_writes_a_start_token_gets_it_once_in_alpaca(make_tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    start = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)])
    assert tokenizer("x")["input_ids"][0] == start
    assert prompt_ids(EXAMPLE, tokenizer, "alpaca", 500).count(start) == 1
    assert prompt_ids(EXAMPLE, tokenizer, "chat", 500).count(start) == 2  # user and assistant


def test_response_is_tokenised_in_its_place(make_tokenizer):
    """A tokenizer that marks the start of every text must not mark the start of the response."""
    from tokenizers import pre_tokenizers

    tokenizer = make_tokenizer()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="first"), byte_level])
    alone = tokenizer("Blue.", add_special_tokens=False)["input_ids"]
    row, _ = encode(EXAMPLE, tokenizer, "chat", 200)
    assert row.ids[row.start : -1] == alone[-5:]
    assert len(alone) > 5


def test_tokenizer_without_a_chat_template(make_tokenizer):
    with pytest.raises(ValueError, match=r"the tokenizer has no chat template; set data.template: alpaca"):
        encode(EXAMPLE, make_tokenizer(None), "chat", 100)


def test_template_that_refuses_a_role(make_tokenizer):
    with pytest.raises(ValueError, match=r"row '7': the chat template refuses it \(no system role\)"):
        encode(TURNS, make_tokenizer(BRACKETS), "chat", 100)


def test_template_that_drops_the_response(make_tokenizer):
    with pytest.raises(ValueError, match="does not write the assistant's words"):
        encode(EXAMPLE, make_tokenizer("{{ messages[0]['content'] }}"), "chat", 100)


def test_alpaca_cannot_hold_turns(tokenizer):
    with pytest.raises(ValueError, match=r"row '7' has earlier chat turns, which the alpaca template cannot hold; set data.template: chat"):
        encode(TURNS, tokenizer, "alpaca", 500)


def test_no_end_token_at_all(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        end_id(tokenizer, "alpaca")

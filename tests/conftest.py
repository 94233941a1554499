"""Tiny random models of the proven families and a stand-in tokenizer, for every test."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from fedgraft import seeds
from fedgraft.moe.load import Base, prepare

signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the suite runs in the background of a shell, which turns Ctrl-C off

END, TURN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCABULARY = 264  # 256 bytes, three markers, rounded up to a multiple of 8
EXPERTS, TOP_K, LAYERS, HIDDEN, WIDTH = 8, 2, 2, 32, 16
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 1024,
    "initializer_range": HIDDEN**-0.5,  # keeps every projection's output at the scale of its input, router logits included
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_moe": {
        "num_experts": EXPERTS,
        "moe_intermediate_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "shared_expert_intermediate_size": 2 * WIDTH,
        "decoder_sparse_step": 1,
    },
    "olmoe": {"num_experts": EXPERTS, "intermediate_size": WIDTH},
    "mixtral": {"num_local_experts": EXPERTS, "intermediate_size": WIDTH},
}

PROVEN = tuple(CONFIGS)
"""The families that the detailed tests run on; `tests/families` proves all others."""


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_draws() -> Iterator[None]:
    with seeds.torch_default(0):
        yield


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, the chat markers of the embedded base, ids below `VOCABULARY`."""
    symbols = [END, TURN, TURN_END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END, TURN, TURN_END])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture
def tiny_base(tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., Base]:
    """`tiny_base(family, seed=0, dtype=torch.float32, **config)`: a fresh model to do with as one likes; equal arguments, equal weights.

    H 32, 2 layers, 8 experts of width 16, top-2, vocabulary 264; the norms' weights and every projection are random at unit scale.
    """

    def build(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Base:
        options = COMMON | CONFIGS.get(family, {}) | config
        experts = "eager" if dtype == torch.float64 else "grouped_mm"  # grouped_mm knows no float64
        with seeds.torch_default(seed):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options), experts_implementation=experts)
            for name, parameter in model.named_parameters():
                fan_in = parameter.shape[-1] if parameter.ndim > 1 else 0
                scale, shift = (fan_in**-0.5, 0.0) if fan_in else (0.1, 1.0 if name.endswith("norm.weight") else 0.0)
                parameter.data.normal_(shift, scale)
        return prepare(f"tiny-{family}", model.to(dtype), tiny_tokenizer, f"tiny-{family}-{seed}")

    return build

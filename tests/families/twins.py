"""A tiny random twin of every MoE causal language model that transformers knows.

Sizes are shrunk by name, wherever a configuration has them; what else an architecture needs to stay consistent stands in `SPECIAL`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fedgraft import seeds

H, WIDTH, E, K = 32, 16, 8, 2
SIZES: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": H,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "sliding_window": 16,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), E),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), K),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_experts_intermediate_size"), WIDTH),
    **dict.fromkeys(
        ("intermediate_size", "ffn_hidden_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 2 * WIDTH
    ),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim", "qk_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 4),
    **dict.fromkeys(("first_k_dense_replace", "topk_group"), 1),
    **dict.fromkeys(("n_group", "num_expert_group", "zero_expert_num", "index_n_heads"), 2),
    "index_topk": 8,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_dt_rank": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
LATENT = {"num_key_value_heads": 4, "head_dim": 4}  # multi-head latent attention
DENSE_FIRST = {"mlp_layer_types": ["dense", "sparse"]}
LINEAR_FIRST = {"layer_types": ["linear_attention", "full_attention"]}
KIMI = {"linear_head_dim": 8, "linear_num_heads": 4, **LATENT}
INKLING = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "d_rel": 4,
    "rel_extent": 64,
    "unpadded_vocab_size": 264,
    "layer_types": ["hybrid", "hybrid_sliding"],
}
QWEN4 = {
    "layer_types": ["linear_attention", "indexed_attention"],
    "hc_count": 2,
    "hc_lowrank": 4,
    "ple_embed_dim": 16,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ngram_vocab_size_base": 97,
    "heads_per_ngram": 2,
}
DOTS3 = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "layer_types": ["indexed_attention", "indexed_attention"],
    "per_layer_config": None,
    **DENSE_FIRST,
}
GEMMA4 = {
    "enable_moe_block": True,
    "num_experts": E,
    "top_k_experts": K,
    "moe_intermediate_size": WIDTH,
    "vocab_size_per_layer_input": 264,
    "hidden_size_per_layer_input": 0,
}
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa"), LATENT),
    "longcat_flash": {**LATENT, "num_layers": 2},
    "deepseek_v2": {"num_key_value_heads": 4},
    "bailing_hybrid": {
        **KIMI,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "beam": DENSE_FIRST,
    "cohere2_moe": {"num_shared_experts": 1},
    "dbrx": {"ffn_config": {"ffn_hidden_size": WIDTH, "moe_num_experts": E, "moe_top_k": K, "hidden_size": H}, "d_model": H, "n_heads": 4}
    | {"n_layers": 2, "max_seq_len": 128, "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}},
    "deepseek_v4": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "num_key_value_heads": 1,
        "head_dim": 16,
        "o_groups": 2,
        "o_lora_rank": 8,
        "hc_mult": 2,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    "doge": {"is_moe": True, "num_experts": 16},
    "dots1": {"n_routed_experts": E, "num_experts_per_tok": K, "n_shared_experts": 1},
    **dict.fromkeys(("dots3_note", "dots3_note_text"), DOTS3),
    "flint": {"mlp_only_layers": [0], "layer_types": ["full_attention", "sliding_attention"]},
    **dict.fromkeys(("gemma4", "gemma4_text"), GEMMA4),
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "shared_intermediate_size": WIDTH, "mamba_chunk_size": 8, **LINEAR_FIRST},
    "granitemoeshared": {"shared_intermediate_size": WIDTH},
    "hy_v4": {**LATENT, **DENSE_FIRST, "layer_types": ["indexed_attention"] * 2, "indexer_types": ["full", "shared"], "hc_mult": 2},
    "inkling_text": {**INKLING, **DENSE_FIRST},
    "inkling2_text": INKLING,
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "jetmoe": {"kv_channels": 8},
    "kimi_linear": {**KIMI, **LINEAR_FIRST, **DENSE_FIRST, "num_expert_group": 1},
    "laguna": {"num_attention_heads_per_layer": [4, 4], "layer_types": ["full_attention", "sliding_attention"], **DENSE_FIRST},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "llama4": {"intermediate_size_mlp": 2 * WIDTH, "num_experts_per_tok": 1, "moe_layers": [0, 1]},
    "llama4_text": {"intermediate_size_mlp": 2 * WIDTH, "num_experts_per_tok": 1, "moe_layers": [1]},
    "minimax": {**LINEAR_FIRST, "block_size": 8},
    "minimax_m3_vl_text": {"rotary_dim": 4, "shared_intermediate_size": WIDTH, "dense_intermediate_size": 2 * WIDTH, "index_block_size": 4}
    | {"index_topk_blocks": 2, **DENSE_FIRST},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 8,
        "use_mamba_kernels": False,
        "n_group": 1,
    },
    **dict.fromkeys(("qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next"), LINEAR_FIRST),
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), QWEN4),
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16, "layer_types": ["hybrid", "hybrid"]},
}

AROUND: dict[str, dict[str, Any]] = {
    "dots3_note": {part: {"adapter_out_dim": H} for part in ("vision_config", "audio_config")},
}
"""What a wrapper's configuration needs beside its text model's."""


def config_of(model_type: str) -> Any:
    """The tiny configuration."""
    default = AutoConfig.for_model(model_type).to_dict()
    if isinstance(default.get("text_config"), dict):
        text = {name: value for name, value in SIZES.items() if name in default["text_config"]}
        return AutoConfig.for_model(model_type, text_config=text | SPECIAL.get(model_type, {}), **AROUND.get(model_type, {}))
    sizes = {name: value for name, value in SIZES.items() if name in default}
    return AutoConfig.for_model(model_type, **(sizes | SPECIAL.get(model_type, {})))


def twin(model_type: str, experts: str | None = None) -> Any:
    """A twin with random weights: every projection at unit scale, norms near 1, the same in every call."""
    options = {} if experts is None else {"experts_implementation": experts}
    with seeds.torch_default(0):
        model = AutoModelForCausalLM.from_config(config_of(model_type), **options)
        for name, parameter in model.named_parameters():
            scale, shift = (
                (parameter.shape[-1] ** -0.5, 0.0) if parameter.ndim > 1 else (0.05, 1.0 if "norm" in name or "scale" in name else 0.0)
            )
            parameter.data.normal_(shift, scale)
    return model.eval().requires_grad_(False)


@cache
def shared_twin(model_type: str) -> Any:
    """One twin for the tests that leave it as it is."""
    return twin(model_type)


def ids(rows: int = 2, tokens: int = 10) -> torch.Tensor:
    """Token ids [rows, tokens]."""
    return torch.randint(3, 259, (rows, tokens), generator=torch.Generator().manual_seed(5))

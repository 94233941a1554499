"""A Mixtral with one graft per layer as a Qwen2-MoE: its sigmoid-gated shared expert *is* the graft.

Attention, norms, rotary embedding and experts of the two are the same, but that Qwen2-MoE has biases on q, k and v (zero here) and its
routers' top-k weights are normalised where `norm_topk_prob` says so, as Mixtral's always are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from fedgraft.moe.load import Base
from fedgraft.use.export.weights import Gated, folded

SAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
    "num_experts_per_tok",
    "router_aux_loss_coef",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
"""Settings of the same name and meaning."""


def why_not(base: Base, grafts: Mapping[int, list[Gated]]) -> str:
    """Why the model can't be a Qwen2-MoE; empty where it can."""
    config = base.model.config
    if config.model_type != "mixtral":
        return f"only Mixtral's attention, norms and router are like Qwen2-MoE's, the base is a {config.model_type}"
    if config.sliding_window is not None:
        return f"its attention has a window of {config.sliding_window} tokens in every layer, which tools read differently in a Qwen2-MoE"
    whole = [folded(layer) for layer in grafts.values()]
    if any(one is None for one in whole):
        return "its grafts have gates of their own, a Qwen2-MoE has one shared expert"
    if any(one is not None and one.mix_bias is not None for one in whole):
        return "the gate of its graft has a bias (graft.gate_start: low), the shared expert's of a Qwen2-MoE has none"
    return ""


def as_qwen2_moe(base: Base, grafts: Mapping[int, list[Gated]]) -> Any:
    """The model, which shares its weights with the base's; `why_not` has been asked.

    A graft without a gate has weight 1 = 2 sigmoid(0), so its output is doubled behind a gate of zeros.
    """
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    model = base.model
    config, state = model.config, dict(model.state_dict())
    shared = {layer: _gated(folded(parts)) for layer, parts in grafts.items()}
    like = next(iter(shared.values()))
    nothing, width = replace(like, down=torch.zeros_like(like.down)), like.up.shape[0]
    settings = {name: getattr(config, name) for name in SAME}
    if getattr(config, "head_dim", None) is not None:
        settings["head_dim"] = config.head_dim
    wanted = Qwen2MoeConfig(
        **settings,
        num_experts=config.num_local_experts,
        moe_intermediate_size=config.intermediate_size,
        intermediate_size=config.intermediate_size,
        shared_expert_intermediate_size=width,
        norm_topk_prob=True,
        qkv_bias=True,
        use_sliding_window=False,
        max_window_layers=config.num_hidden_layers,
        dtype=model.dtype,
    )
    for layer in range(config.num_hidden_layers):
        head = f"model.layers.{layer}"
        for name in "qkv":
            path = f"{head}.self_attn.{name}_proj"
            state[f"{path}.bias"] = torch.zeros(state[f"{path}.weight"].shape[0])
        graft = shared.get(layer, nothing)
        assert graft.gate is not None
        assert graft.mix is not None
        own = {"shared_expert.gate_proj": graft.gate, "shared_expert.up_proj": graft.up, "shared_expert.down_proj": graft.down}
        own |= {"shared_expert_gate": graft.mix[None]}
        state |= {f"{head}.mlp.{name}.weight": leaf.clone() for name, leaf in own.items()}
    with torch.device("meta"):
        made: Any = Qwen2MoeForCausalLM(wanted)
    made.load_state_dict({key: leaf.to(model.device, model.dtype).contiguous() for key, leaf in state.items()}, assign=True)
    made.tie_weights()
    made.generation_config = model.generation_config
    return made


def _gated(graft: Gated | None) -> Gated:
    """Behind a gate, with the same output."""
    assert graft is not None
    if graft.mix is not None:
        return graft
    return replace(graft, mix=torch.zeros(graft.up.shape[1]), down=2 * graft.down)

"""Which configurations describe a base that can be grafted on, and as which class it is loaded."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from fedgraft.moe.architecture import read_architecture, stray_text_weights
from fedgraft.moe.load import load_base
from fedgraft.moe.settings import ModelSettings
from tests.moe.conftest import rewrite

COMMON: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TEXT: dict[str, dict[str, Any]] = {
    "gemma4": {"enable_moe_block": True, "top_k_experts": 2, "global_head_dim": 8, "hidden_size_per_layer_input": 0},
    "llama4": {"num_local_experts": 4, "intermediate_size_mlp": 32, "interleave_moe_layer_step": 1},
}
VISION: dict[str, dict[str, Any]] = {
    "gemma4": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8},
    "llama4": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vision_output_dim": 16,
        "projector_input_dim": 16,
        "projector_output_dim": 16,
        "image_size": 28,
        "patch_size": 14,
    },
}


def refusal(folder, **changes: Any) -> str:
    rewrite(folder, **changes)
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        read_architecture("here", folder)
    return str(refused.value)


def test_a_skeleton_has_the_models_names_and_shapes_and_no_memory(saved):
    folder, model = saved("olmoe")
    found = read_architecture("here", folder).skeleton(torch.bfloat16)
    skeleton, sites = found.model, found.sites
    assert {name: part.shape for name, part in skeleton.named_parameters()} == {name: part.shape for name, part in model.named_parameters()}
    assert {(part.device.type, part.dtype) for part in skeleton.parameters()} == {("meta", torch.bfloat16)}
    assert [site.path for site in sites] == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]


@pytest.mark.parametrize("family", ["switch_transformers", "nllb-moe"])
def test_an_encoder_decoder_is_refused(broken, family):
    words = refusal(broken, model_type=family, architectures=None)
    assert words.startswith(f"model.name 'here': {family} is an encoder-decoder; experts are grafted on decoder-only language models")


def test_a_dense_model_is_refused_before_its_weights_are_read(broken):
    rewrite(broken, model_type="qwen2", architectures=None)
    with pytest.raises(ValueError, match="Qwen2ForCausalLM has no MoE layers: found no module with fused"):
        read_architecture("here", broken).skeleton()


def test_a_model_without_a_language_head_is_refused(broken):
    words = refusal(broken, model_type="vit", architectures=None)
    assert "vit is an architecture that has no causal language model of its own" in words


def test_remote_code_is_refused_without_asking(broken):
    words = refusal(broken, model_type="deepseek_moe_2026", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    assert "brings its own code (auto_map), which is never run, and its architecture 'deepseek_moe_2026' is not one of" in words


def test_code_beside_a_known_architecture_is_left_alone(broken):
    rewrite(broken, auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    assert read_architecture("here", broken).config.model_type == "olmoe"


def test_an_unknown_or_broken_configuration_is_refused(broken):
    assert "its architecture None is not one of the installed transformers" in refusal(broken, model_type=None)
    assert "config.json is no valid configuration of olmoe (Validation error for field 'hidden_size'" in refusal(
        broken, model_type="olmoe", hidden_size="wide"
    )
    (broken / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        read_architecture("here", broken)


def test_a_wrapper_whose_text_part_has_no_class_of_its_own_is_refused(broken):
    words = refusal(broken, model_type="qwen3_vl_moe", architectures=None)
    assert "qwen3_vl_moe is a wrapper whose text part (qwen3_vl_moe_text) has no causal language model of its own" in words


@pytest.mark.parametrize("family", TEXT)
def test_a_wrappers_text_model_computes_what_the_wrapper_computes_on_text(tmp_path, tiny_tokenizer, family):
    """llama4: transformers maps the names; gemma4: it does not, and would silently draw every weight at random."""
    wrapper = AutoModelForImageTextToText.from_config(
        CONFIG_MAPPING[family](text_config=COMMON | TEXT[family], vision_config=VISION[family])
    ).eval()
    wrapper.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    base = load_base(ModelSettings(name=str(tmp_path), device="cpu"))
    assert base.model.config.model_type == f"{family}_text"
    assert base.notes == (f"{family}: its text model alone is loaded",)
    ids = torch.randint(3, 200, (1, 6))
    with torch.no_grad():
        torch.testing.assert_close(base.model(input_ids=ids).logits, wrapper(input_ids=ids).logits, rtol=1e-5, atol=1e-6)


def test_a_wrappers_superfluous_text_layers_are_not_overlooked(broken):
    config = json.loads((broken / "config.json").read_text())
    assert config["model_type"] == "olmoe"
    plain = read_architecture("here", broken)
    assert stray_text_weights(plain, {"vision.x", "model.norm.weight"}) == ["model.norm.weight", "vision.x"]
    wrapped = type(plain)(config=plain.config, quantisation=None, wrapper="gemma4")
    keys = {"model.vision_tower.encoder.layers.0.w", "model.language_model.layers.9.w", "vision_model.layers.0.w", "lm_head.weight"}
    assert stray_text_weights(wrapped, keys) == ["lm_head.weight", "model.language_model.layers.9.w"]

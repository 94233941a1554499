"""Loading for real: complete or refused with one message, and nothing is fetched unless a hub name asks for it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fedgraft.moe.load import Base, load_base
from fedgraft.moe.memory import Room, weights_needed
from fedgraft.moe.plan import examine
from fedgraft.moe.settings import ModelSettings
from tests.families.twins import twin
from tests.moe.conftest import merged, rewrite, store

IDS = torch.randint(3, 259, (2, 9), generator=torch.Generator().manual_seed(3))


def load(folder: Path | str, **options: Any) -> Base:
    return load_base(ModelSettings(name=str(folder), device=options.pop("device", "cpu"), **options))


def refusal(folder: Path | str, **options: Any) -> str:
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        load(folder, **options)
    assert f"model.name '{folder}'" in str(refused.value) or str(folder) in str(refused.value)
    return str(refused.value)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=IDS).logits
    return result


@pytest.mark.usefixtures("no_network")
def test_the_embedded_base_and_a_folder_open_no_connection(olmoe_folder):
    assert load_base(ModelSettings(device="cpu")).sites
    assert load(olmoe_folder).sites


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "mixtral"])
def test_a_sharded_folder_is_the_model_that_was_saved(saved, family):
    folder, model = saved(family)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    base = load(folder)
    assert torch.equal(logits(base.model), logits(model))
    assert base.device == torch.device("cpu")
    assert base.notes == ()


def test_bfloat16_halves_the_memory_and_says_what_is_rounded(saved):
    folder, model = saved("olmoe")
    base = load(folder, dtype="bfloat16")
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.bfloat16}
    assert all(torch.equal(part, model.get_parameter(name).bfloat16()) for name, part in base.model.named_parameters())
    assert base.notes == ("weights stored as float32 are rounded to bfloat16",)


def test_a_16_bit_checkpoint_in_fp32_loses_nothing(saved):
    folder, model = saved("olmoe", dtype=torch.bfloat16)
    base = load(folder)
    assert base.notes == ()
    assert all(torch.equal(part, model.get_parameter(name).float()) for name, part in base.model.named_parameters())


def test_attention_and_dispatch_reach_the_model(olmoe_folder):
    base = load(olmoe_folder, attention="eager", experts="eager")
    assert (base.model.config._attn_implementation, base.model.config._experts_implementation) == ("eager", "eager")
    assert load(olmoe_folder).model.config._attn_implementation == "sdpa"


def test_a_missing_weight_is_not_drawn_at_random(broken):
    store(broken, {name: tensor for name, tensor in merged(broken).items() if name != "model.norm.weight"})
    assert refusal(broken).endswith("the checkpoint lacks model.norm.weight; it is incomplete, copy it again")


def test_a_whole_expert_that_is_missing_is_not_drawn_at_random(broken):
    """Seven experts of each layer where config.json says eight."""
    store(broken, {name: tensor for name, tensor in merged(broken).items() if ".experts.7." not in name})
    assert "is [7, 32, 16] in the checkpoint and [8, 32, 16] by config.json; they are of two models" in refusal(broken)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 64}, "in the checkpoint and [264, 64] by config.json; they are of two models"),
        ({"num_hidden_layers": 1}, "config.json has no place for model.layers.1."),
        ({"num_hidden_layers": 3}, "the checkpoint lacks model.layers.2."),
        ({"vocab_size": 100}, "its tokenizer has 259 tokens, the model 100; the files are of two models"),
        ({"model_type": "qwen2", "architectures": None}, "Qwen2ForCausalLM has no MoE layers"),
    ],
)
def test_a_configuration_of_another_model_is_refused(broken, changes, words):
    rewrite(broken, **changes)
    assert words in refusal(broken)


def test_a_damaged_tokenizer_is_refused(broken):
    (broken / "tokenizer.json").write_text("{}")
    assert "its tokenizer cannot be read" in refusal(broken)


def test_too_large_a_model_is_refused_before_its_weights_are_read(olmoe_folder, monkeypatch):
    monkeypatch.setattr("fedgraft.moe.plan.room_for", lambda _: Room(free={"cpu": 1000}))
    monkeypatch.setattr("fedgraft.moe.load._model", None)
    assert "its weights need" in refusal(olmoe_folder)
    plan = examine(ModelSettings(name=str(olmoe_folder), device="cpu"))
    assert plan.needed.weights > plan.room.total == 1000


def test_examining_reads_no_weight(olmoe_folder, monkeypatch):
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)
    plan = examine(ModelSettings(name=str(olmoe_folder), device="cpu"))
    assert [site.num_experts for site in plan.skeleton.sites] == [8, 8]


@pytest.mark.parametrize("projection", ["up_proj", "down_proj"])
def test_the_last_expert_of_a_projection_is_not_drawn_at_random(broken, projection):
    name = f"model.layers.0.mlp.experts.7.{projection}.weight"
    store(broken, {key: tensor for key, tensor in merged(broken).items() if key != name})
    assert re.search(r"one may be missing or of another shape|model\.layers\.0\.mlp\.experts\.down_proj is \[7", refusal(broken))


@pytest.mark.parametrize(
    "family", ["dbrx", "deepseek_v3", "gemma4_text", "gpt_oss", "jetmoe", "llama4_text", "longcat_flash", "nemotron_h"]
)
def test_architectures_of_other_kinds_load_whole_and_take_what_was_announced(tmp_path, tiny_tokenizer, family):
    model = twin(family)
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    base = load(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(logits(base.model), logits(model), rtol=1e-4, atol=1e-4)
    size = sum(part.numel() * part.element_size() for part in base.model.parameters())
    assert weights_needed(tmp_path).weights == size


def test_one_changed_weight_is_another_base(broken):
    before = load(broken).digest
    tensors = merged(broken)
    store(broken, tensors)
    whole = load(broken).digest
    tensors["model.layers.0.mlp.experts.3.down_proj.weight"][0, 0] += 1e-3
    store(broken, tensors)
    assert len({before, whole, load(broken).digest}) == 3


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "a/b/c"])
def test_a_path_that_is_not_there_is_no_hub_name(name):
    with pytest.raises(ValueError, match="no such folder"):
        load(name)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
def test_too_little_memory_while_loading_is_not_taken_for_a_damaged_checkpoint(monkeypatch, error):
    """The runner knows what to lower; it must see the error itself."""
    from transformers import AutoModelForCausalLM

    def failing(*_, **__):
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", failing)
    with pytest.raises(RuntimeError) as raised:
        load_base(ModelSettings())
    assert raised.value is error

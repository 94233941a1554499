"""Memory a base needs, known before loading."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from fedgraft.moe import memory
from fedgraft.moe.memory import Needed, Room, check_room, gib, room_for, weights_needed
from fedgraft.moe.settings import ModelSettings

QWEN3_30B = {
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_needed_is_what_the_loaded_weights_take(saved, dtype, size):
    folder, model = saved("qwen2_moe", tie_word_embeddings=True)
    needed = weights_needed(folder, str(dtype).removeprefix("torch."))
    assert needed.parameters == sum(part.numel() for part in model.parameters())
    assert needed.weights == size * needed.parameters
    assert needed.experts == size * sum(part.numel() for name, part in model.named_parameters() if ".experts." in name)


def test_a_large_model_by_its_configuration():
    """Qwen3-30B-A3B: per layer 128 experts of 3 x 2048 x 768; int8 adds a scale per row: 2 x 768 + 2048 rows an expert."""
    config = AutoConfig.for_model("qwen3_moe", **QWEN3_30B)
    needed, small = weights_needed(config, "bfloat16"), weights_needed(config, "bfloat16", "int8")
    experts = 48 * 128 * 3 * 2048 * 768
    assert needed.experts == 2 * experts
    assert needed.parameters == pytest.approx(30.53e9, rel=1e-3)
    assert small.experts == experts + 2 * 48 * 128 * (2 * 768 + 2048)
    assert small.weights - small.experts == needed.weights - needed.experts


def test_a_base_that_does_not_fit_is_refused_with_both_figures():
    needed, room = Needed(parameters=30_532_122_624, weights=57 << 30, experts=54 << 30), Room(free={"cpu": 20 << 30})
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        check_room("big", needed, room, ModelSettings(device="cpu"))
    assert str(refused.value) == (
        "model.name 'big': its weights need 57.00 GiB (30.5 billion parameters, float32), and 20.00 GiB is free (cpu 20.00 GiB); under "
        "model set one of: dtype: bfloat16 (half); quantise: int8 with experts: eager; a smaller model"
    )
    with pytest.raises(ValueError, match=r"under model set one of: quantise: int8 with experts: eager; offload: <folder> \(slow\); a"):
        check_room("big", needed, room, ModelSettings(dtype="bfloat16", device_map="auto"))
    check_room("big", needed, Room(free={"cpu": 57 << 30}), ModelSettings())
    check_room("big", needed, Room(free={"cpu": 0}, unlimited=True), ModelSettings())


def test_room_of_one_device_and_of_all(monkeypatch):
    monkeypatch.setattr(memory, "_free", lambda device: {"cpu": 64, "cuda": 16 + (device.index or 0)}[device.type])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert room_for(ModelSettings(device="cuda:1")).free == {"cuda:1": 17}
    assert room_for(ModelSettings(device="cpu")).free == {"cpu": 64}
    everything = room_for(ModelSettings(device_map="auto"))
    assert (everything.free, everything.total, everything.unlimited) == ({"cuda:0": 16, "cuda:1": 17, "cpu": 64}, 97, False)
    limited = room_for(ModelSettings(device_map="auto", max_memory={0: "0.00001KB", "cpu": "1KB"}, offload="there"))
    assert limited.free == {"cuda:0": 0, "cpu": 64}
    assert limited.unlimited


def test_free_memory_is_measured():
    assert 1 << 20 < room_for(ModelSettings(device="cpu")).total < 1 << 50


def test_a_decoder_layer_is_never_split_over_devices():
    """What accelerate makes of two pretended GPUs of 40 GiB: whole layers, so that a block, its router and its grafts stay together."""
    from accelerate import infer_auto_device_map
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **QWEN3_30B), dtype=torch.bfloat16)
    places = infer_auto_device_map(model, {0: "40GiB", 1: "40GiB"}, no_split_module_classes=list(model._no_split_modules))
    homes = {name: device for name, device in places.items() if name.startswith("model.layers.")}
    assert sorted(homes) == sorted(f"model.layers.{number}" for number in range(48))
    assert set(homes.values()) == {0, 1}


def test_sizes_for_people():
    assert (gib(3 << 30), gib(5 << 20), gib((1 << 30) // 50)) == ("3.00 GiB", "5.00 MiB", "0.02 GiB")

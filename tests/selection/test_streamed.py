"""A base read one decoder layer at a time against the same base in memory."""

from __future__ import annotations

import json
import weakref
from dataclasses import fields

import psutil
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from fedgraft.moe.layer_weights import OUTSIDE
from fedgraft.moe.layered import open_layered
from fedgraft.moe.load import load_base
from fedgraft.moe.memory import layered_bytes, needed_by
from fedgraft.moe.settings import ModelSettings
from fedgraft.selection import streamed
from fedgraft.selection.profile import Profile, measure
from fedgraft.selection.streamed import measure_streamed
from tests.families.twins import twin
from tests.moe.conftest import merged, rewrite, store
from tests.selection.brute import rows

DENSE_FIRST = "deepseek_v2"
"""The family among these whose first layer is no MoE layer."""
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", DENSE_FIRST, "gpt_oss")


@pytest.fixture
def kept(tmp_path, tiny_tokenizer):
    """`kept(family)`: the folder of a twin in several shards, as its checkpoints are stored."""

    def build(family):
        twin(family).save_pretrained(tmp_path / family, max_shard_size="60KB")
        tiny_tokenizer.save_pretrained(tmp_path / family)
        return tmp_path / family

    return build


def settings(folder, **options):
    return ModelSettings(name=str(folder), device="cpu", **options)


def clients():
    """Rows with padding; the second client reaches the budget of 30 within a batch, the first has less."""
    return {"first": [rows(9, 14), rows(3, 2, seed=3)], "second": [rows(12, 11, seed=5), rows(4, 9, 2, seed=6)]}


def same(left: Profile, right: Profile) -> bool:
    pairs = ((getattr(left, field.name), getattr(right, field.name)) for field in fields(Profile))
    return all(torch.equal(one, other) if isinstance(one, Tensor) else one == other for one, other in pairs)


def in_memory(folder, tokens=30, gram=False, **options):
    base = load_base(settings(folder, **options))
    return base, {name: measure(base, batches, tokens, gram) for name, batches in clients().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_sum_is_that_of_the_base_in_memory_bit_for_bit(kept, family):
    folder = kept(family)
    names = [name for shard in folder.glob("*.safetensors") for name in safe_open(shard, "pt").keys()]  # noqa: SIM118
    assert any(".experts.3." in name for name in names) or family == "gpt_oss"  # stored one by one, but for gpt_oss
    base, expected = in_memory(folder)
    layered, done = open_layered(settings(folder)), []
    found = measure_streamed(layered, clients(), 30, progress=lambda *passed: done.append(passed))
    assert found.keys() == expected.keys()
    assert all(same(found[name], expected[name]) for name in expected)
    assert layered.base.digest == base.digest
    assert done == [(0, 2), (1, 2), (2, 2)]


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"experts": "eager"}, {"attention": "eager"}])
def test_settings_of_the_model_count(kept, options):
    folder = kept("qwen3_moe")
    _, expected = in_memory(folder, **options)
    found = measure_streamed(open_layered(settings(folder, **options)), clients(), 30)
    assert all(same(found[name], expected[name]) for name in expected)


def test_what_choosing_several_jointly_needs(kept):
    folder = kept("olmoe")
    _, expected = in_memory(folder, gram=True)
    found = measure_streamed(open_layered(settings(folder)), clients(), 30, gram=True)
    assert all(same(found[name], expected[name]) for name in expected)


def test_one_layer_is_in_memory_at_a_time_and_each_tensor_is_read_once(kept, monkeypatch):
    layered = open_layered(settings(kept("mixtral")))
    weights, there, held = layered.weights, [], []
    put = weights.put

    def watched(number):
        put(number)
        there.append([any(part.device.type != "meta" for part in layer.parameters()) for layer in weights.layers])
        held.append(weakref.ref(weights.layers[number].mlp.experts.gate_up_proj))

    monkeypatch.setattr(weights, "put", watched)
    measure_streamed(layered, clients(), 30)
    assert there == [[True, False], [False, True]]
    assert [one() for one in held] == [None, None]
    assert all(part.device.type == "meta" for layer in weights.layers for part in layer.parameters())
    assert layered.base.model.lm_head.weight.device.type == "meta"
    counted = sum(weights.bytes_of(number) for number in (OUTSIDE, 0, 1))
    head = layered.base.model.lm_head.weight
    assert counted == needed_by(layered.base, "none").weights - head.numel() * head.element_size()


def test_a_model_can_be_measured_again(kept):
    layered = open_layered(settings(kept("olmoe")))
    first, second = (measure_streamed(layered, clients(), 30) for _ in range(2))
    assert all(same(first[name], second[name]) for name in first)


def test_hidden_states_on_disk_are_the_same(kept, tmp_path, monkeypatch):
    folder = kept("qwen2_moe")
    _, expected = in_memory(folder)
    scratch, used = tmp_path / "scratch", []
    scratch.mkdir()
    monkeypatch.setattr(streamed.psutil, "virtual_memory", lambda: psutil._ntuples.svmem(*[1000] * 11))
    found = measure_streamed(
        open_layered_anyway(folder, monkeypatch), clients(), 30, progress=lambda *_: used.extend(scratch.iterdir()), scratch=scratch
    )
    assert all(same(found[name], expected[name]) for name in expected)
    assert len(set(used)) == 1
    assert list(scratch.iterdir()) == []


def open_layered_anyway(folder, monkeypatch):
    monkeypatch.setattr("fedgraft.moe.layered.check_layered_room", lambda *_: None)
    return open_layered(settings(folder))


def test_what_it_needs_is_embeddings_and_a_layer_while_it_is_joined(kept):
    layered = open_layered(settings(kept("mixtral")))
    model = layered.base.model.model
    layer = 4 * sum(part.numel() for part in model.layers[1].parameters())
    around = 4 * (model.embed_tokens.weight.numel() + model.norm.weight.numel())
    assert layered_bytes(layered.base) == around + 3 * layer


def test_a_machine_without_room_for_a_layer_is_refused(kept, monkeypatch):
    monkeypatch.setattr("fedgraft.moe.memory._free", lambda device: 1000)
    with pytest.raises(ValueError, match=r"even layer by layer it needs .* MiB, and 0\.00 MiB is free; take a larger machine"):
        open_layered(settings(kept("mixtral")))


def test_a_missing_weight_is_named(kept):
    folder = kept("qwen2_moe")
    tensors = merged(folder)
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    store(folder, tensors)
    with pytest.raises(ValueError, match=r"the checkpoint lacks model\.layers\.1\.self_attn\.q_proj\.weight"):
        measure_streamed(open_layered(settings(folder)), clients(), 30)


def test_a_weight_of_another_shape_is_named(kept):
    folder = kept("qwen2_moe")
    tensors = merged(folder)
    name = "model.layers.0.self_attn.q_proj.weight"
    store(folder, tensors | {name: tensors[name][:4].clone()})
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj\.weight is \[4, 32\] in the checkpoint and \[32, 32\] by config"):
        measure_streamed(open_layered(settings(folder)), clients(), 30)


def test_weights_of_another_model_are_refused(kept):
    folder = kept("qwen2_moe")
    store(folder, merged(folder) | {"model.layers.7.self_attn.q_proj.weight": torch.ones(2)})
    with pytest.raises(ValueError, match=r"config\.json has no place for model\.layers\.7"):
        open_layered(settings(folder))


def test_packed_weights_are_refused(kept):
    folder = kept("gpt_oss")
    rewrite(folder, quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(ValueError, match="its weights are packed, and unpacking takes the whole model"):
        open_layered(settings(folder))


def test_layers_that_do_not_follow_each_other_are_refused(kept):
    layered = open_layered(settings(kept("mixtral")))
    decoder = layered.base.model.model
    decoder.layers = torch.nn.ModuleList([decoder.layers[1], decoder.layers[0]])  # the order in which it calls them
    with pytest.raises(ValueError, match=r"model\.layers\.0: mixtral does not run its decoder layers once each, one after another"):
        measure_streamed(layered, clients(), 30)


def test_grams_of_all_clients_together_are_bounded(kept, monkeypatch):
    layered = open_layered(settings(kept("olmoe")))
    monkeypatch.setattr(streamed, "GRAM_BYTES", 2 * 4 * 64 * 50)  # 2 layers, 8 experts, 50 tokens
    with pytest.raises(ValueError, match=r"for 2 clients at once .*set selection\.tokens to 25 or less"):
        measure_streamed(layered, clients(), 30, gram=True)


def test_a_client_without_text_is_named(kept):
    with pytest.raises(ValueError, match="client 'empty': calibration saw no real token"):
        measure_streamed(open_layered(settings(kept("mixtral"))), {"full": [rows(4)], "empty": []}, 10)


def test_values_that_are_not_finite_name_layer_and_client(kept):
    folder = kept("mixtral")
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    tensors = merged(folder)
    assert name in tensors, json.dumps(sorted(tensors))
    store(folder, tensors | {name: torch.full_like(tensors[name], torch.inf)})
    with pytest.raises(ValueError, match=r"client 'first': model\.layers\.1\..*not finite"):
        measure_streamed(open_layered(settings(folder)), clients(), 30)

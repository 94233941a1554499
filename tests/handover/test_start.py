"""What is taken over computes what it computed where it was trained; what can't be is refused with the remedy."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import fedgraft
from fedgraft.bundle import Bundle
from fedgraft.grafts.graft import GraftedModel
from fedgraft.grafts.lora import LoraSettings
from fedgraft.grafts.side_expert import GraftSettings
from fedgraft.handover.found import read
from fedgraft.handover.start import start_of, targets_of
from fedgraft.moe.load import load_base
from fedgraft.moe.settings import ModelSettings
from fedgraft.tree import equal
from fedgraft.use.export.export import export
from tests.grafts.twins import logits, random_leaves

PLAIN = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
ADAPTERS = {
    # name: (PEFT's settings, the recipe's)
    "plain": (PLAIN, {"alpha": 6}),
    "rank-stabilised": (PLAIN | {"use_rslora": True}, {"alpha": 6}),
    "another scale in the recipe": (PLAIN, {"alpha": 3}),
    "a scale of its own for v": (PLAIN | {"alpha_pattern": {"v_proj": 20}}, {"alpha": 6}),
    "a lower rank for v": (PLAIN | {"rank_pattern": {"v_proj": 2}}, {"alpha": 6}),
}


@pytest.fixture
def adapter(tiny_base, tmp_path):
    """`adapter(**settings of PEFT)`: (folder, logits of PEFT's own model) of an adapter that is far from zero."""

    def make(**settings):
        from peft import LoraConfig, get_peft_model

        base = tiny_base("qwen2_moe")
        with warnings.catch_warnings():  # PEFT 0.21 reads names that transformers 5.23 deprecates
            warnings.simplefilter("ignore", FutureWarning)
            model = get_peft_model(base.model, LoraConfig(task_type="CAUSAL_LM", **settings))
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.data.normal_(0, 0.3)
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", logits(replace(base, model=model.eval()))

    return make


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_gives_the_logits_of_peft(tiny_base, adapter, case):
    theirs, ours = ADAPTERS[case]
    folder, expected = adapter(**theirs)
    base, lora = tiny_base("qwen2_moe"), LoraSettings(rank=4, targets=("q", "v"), init=str(folder), **ours)
    model = GraftedModel(base, lora, GraftSettings(), lambda: start_of(lora, base, base.digest, 0))
    tree = model.fresh_adapters(0)
    assert {leaf.shape[0 if key.endswith("A") else 1] for key, leaf in tree.items()} == {4}
    with model.using(tree, []):
        torch.testing.assert_close(logits(base), expected, rtol=1e-5, atol=1e-5)
    assert (logits(base) - expected).abs().max() > 0.05
    if case == "plain":
        weights = load_file(folder / "adapter_model.safetensors")
        assert torch.equal(tree["layers.1.attention.v.B"], weights["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"])


def test_what_fills_a_lower_rank_up_can_be_trained(tiny_base, adapter):
    """Rows of zeros in A beside columns of zeros in B would never move."""
    folder, _ = adapter(**ADAPTERS["a lower rank for v"][0])
    base = tiny_base("qwen2_moe")
    tree = start_of(LoraSettings(rank=4, targets=("q", "v"), init=str(folder)), base, "", 0)
    assert tree["layers.0.attention.v.A"][2:].abs().min() > 0
    assert not tree["layers.0.attention.v.B"][:, 2:].any()


def test_a_run_its_export_and_its_adapter_are_one_start(trained, tmp_path):
    record = trained("flex")
    recipe = record.recipe
    base = load_base(ModelSettings.model_validate(recipe["model"]))
    shared = Bundle.load(record.folder / "state" / "state.safetensors").tree("shared")
    for kind in ("peft", "fedgraft"):
        export(record.folder, "shared", kind, tmp_path / kind)
    for folder in (record.folder, tmp_path / "peft", tmp_path / "fedgraft"):
        lora = LoraSettings.model_validate({**recipe["lora"], "init": str(folder)})
        assert equal(start_of(lora, base, base.digest, 0), shared)
        assert targets_of(read(folder, base), base) == ["q", "k", "v"]


def test_router_rows_come_along(trained):
    record = trained("fedavg", lora={"targets": ["q", "router"]})
    base = load_base(ModelSettings.model_validate(record.recipe["model"]))
    lora = LoraSettings.model_validate({**record.recipe["lora"], "init": str(record.folder)})
    assert equal(start_of(lora, base, base.digest, 0), Bundle.load(record.folder / "state" / "state.safetensors").tree("shared"))
    assert targets_of(read(record.folder, base), base) == ["q", "router"]


SETTINGS = {
    "peft_type": ("LOHA", "only LORA can be taken over"),
    "use_dora": (True, "use_dora: that is no plain LoRA"),
    "bias": ("all", "biases are never trained here"),
    "modules_to_save": (["lm_head"], "whole modules are never trained here"),
    "init_lora_weights": ("pissa", "it was trained on a changed base"),
    "target_parameters": (["mlp.experts.gate_up_proj"], "in one fused pair"),
}


@pytest.mark.parametrize("key", SETTINGS)
def test_other_adapters_are_refused_by_their_setting(tiny_base, adapter, key):
    folder, _ = adapter(**PLAIN)
    value, why = SETTINGS[key]
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=f"adapter_config.json: .*{why}"):
        start_of(LoraSettings(rank=4, targets=("q", "v"), init=str(folder)), tiny_base("qwen2_moe"), "", 0)


def test_a_recipe_that_does_not_fit_is_told_what_would(tiny_base, adapter):
    folder, _ = adapter(**PLAIN)
    base = tiny_base("qwen2_moe")

    def start(**settings):
        return start_of(LoraSettings(**{"rank": 4, "targets": ("q", "v"), "init": str(folder), **settings}), base, "", 0)

    with pytest.raises(ValueError, match=r"its pairs have rank 4, the recipe 32; set lora.rank to 4"):
        start(rank=32)
    with pytest.raises(ValueError, match=r"there is no leaf 'layers.0.attention.k.A', .*; set lora.targets to \[q, v\]"):
        start(targets=("q", "k", "v"))
    with pytest.raises(ValueError, match=r"leaf 'layers.0.attention.v.A' is not among lora.targets; set lora.targets to \[q, v\]"):
        start(targets=("q",))
    with pytest.raises(ValueError, match="no such folder; name a PEFT adapter"):
        start(init=str(folder / "elsewhere"))
    with pytest.raises(ValueError, match="nothing there to start from"):
        start(init=str(folder.parent))


def test_damaged_and_foreign_weights_are_named(tiny_base, adapter):
    folder, _ = adapter(**PLAIN)
    base, file = tiny_base("qwen2_moe"), folder / "adapter_model.safetensors"
    lora = LoraSettings(rank=4, targets=("q", "v"), init=str(folder))
    whole = load_file(file)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

    def refused(weights, why):
        save_file(weights, file)
        with pytest.raises(ValueError, match=rf"adapter_model.safetensors: .*{why}"):
            start_of(lora, base, "", 0)

    refused({key: leaf for key, leaf in whole.items() if key != name}, "without its other factor")
    refused({**whole, name: whole[name][:, :8].contiguous()}, r"'layers.0.attention.q.A' is \[4, 8\] where the base asks for \[4, 32\]")
    refused({**whole, name: whole[name] * float("nan")}, "not finite")
    refused({**whole, name.replace("q_proj", "z_proj"): whole[name].clone()}, "z_proj.lora_A.weight: the base has no such linear layer")
    refused({**whole, "base_model.model.lm_head.weight": whole[name].clone()}, "lm_head.weight: that is no factor of a LoRA pair")
    file.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="damaged"):
        start_of(lora, base, "", 0)
    file.rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="is a pickle, which can run code and is never read"):
        start_of(lora, base, "", 0)


def test_leaves_of_another_base_are_refused(trained, tiny_base):
    record = trained("flex")
    lora = LoraSettings.model_validate({**record.recipe["lora"], "init": str(record.folder)})
    with pytest.raises(ValueError, match=r"its leaves belong to another base than model.name is .*set model.name to that base"):
        start_of(lora, tiny_base("qwen2_moe"), "0" * 64, 0)


@pytest.mark.parametrize(
    ("method", "options", "why"),
    [
        ("local", {}, "shares nothing"),
        ("fedex_lora", {}, "is no adapter that a run begins with; write it into the weights"),
        ("flex", {"method": {"shared_graft": True}}, "'layers.0.side.0.* is no adapter that a run begins with$"),
        ("fedrep", {"method": {"layers": 1}}, "there is no leaf 'layers.1.attention"),
    ],
)
def test_runs_that_share_no_whole_adapter_are_refused(trained, method, options, why):
    record = trained(method, **options)
    base = load_base(ModelSettings.model_validate(record.recipe["model"]))
    lora = LoraSettings.model_validate({**record.recipe["lora"], "init": str(record.folder)})
    with pytest.raises(ValueError, match=why):
        start_of(lora, base, base.digest, 0)


def test_an_export_of_a_graft_is_refused(trained, tiny_base, tmp_path):
    export(trained("flex").folder, "garden", "fedgraft", tmp_path / "garden")
    with pytest.raises(ValueError, match=r"grafted experts, which are a client's own.*--client shared"):
        start_of(LoraSettings(rank=2, init=str(tmp_path / "garden")), tiny_base("qwen2_moe"), "", 0)


def test_nothing_is_taken_without_a_source(tiny_base):
    assert start_of(LoraSettings(), tiny_base("qwen2_moe"), "", 0) == {}


def test_an_export_names_no_folder_of_its_start(trained, world, tmp_path):
    first = trained("fedavg")
    from fedgraft.runner import run

    again = run(world.recipe(method={"name": "fedavg"}, lora={"init": str(first.folder)}, federation={"rounds": 1}), out=tmp_path / "again")
    export(again.folder, "shared", "fedgraft", tmp_path / "out")
    assert "init" not in json.loads((tmp_path / "out" / "fedgraft.json").read_text())["recipe"]["lora"]
    shutil.rmtree(tmp_path / "again")
    with fedgraft.load(tmp_path / "out") as loaded:
        assert loaded.models == ["base", "shared"]


def test_random_leaves_survive_being_written_for_peft_and_read(tiny_base, tmp_path):
    """The map of names there and back, on every linear layer that PEFT takes by its name."""
    from fedgraft.use.export.peft_adapter import adapter_of

    base, lora = tiny_base("olmoe"), LoraSettings(rank=3, targets=("q", "k", "v", "o"))
    model = GraftedModel(base, lora, GraftSettings())
    tree = random_leaves(model.fresh_adapters(0))
    settings, weights = adapter_of(base, model.fitted(tree, []), lora)
    save_file(weights, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    assert equal(start_of(lora.model_copy(update={"init": str(tmp_path)}), base, "", 0), tree)

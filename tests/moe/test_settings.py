"""The recipe section `model`: combinations that cannot work are refused before anything is read."""

from __future__ import annotations

import pytest
import torch

from fedgraft.moe.settings import ModelSettings


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float16"}, "model.dtype float16: many times slower than float32 on a CPU; use bfloat16"),
        ({"experts": "batched_mm"}, "model.experts batched_mm: copies the chosen experts for every token"),
        ({"attention": "flash_attention_2", "dtype": "bfloat16"}, "needs a CUDA GPU, the base goes to cpu; use sdpa"),
        ({"quantise": "int8"}, "model.quantise int8: grouped_mm cannot dispatch quantised experts; set model.experts: eager"),
        (
            {"quantise": "int8", "experts": "eager", "device_map": "auto", "offload": "x", "device": "auto"},
            "quantise int8: weights quantised while loading cannot go to disk; remove model.offload",
        ),
        ({"device_map": "auto"}, "model.device_map auto: chooses the devices itself; set model.device: auto"),
        ({"max_memory": {"cpu": "1GiB"}}, "model.max_memory: limits what model.device_map may fill; set model.device_map: auto"),
        ({"offload": "folder"}, "model.offload: takes what model.device_map finds no place for"),
        ({"revision": "main"}, "model.revision: belongs to hub names, and 'demo' is not one; remove it"),
        ({"device": "gpu"}, "model.device 'gpu': not a device; use auto, cpu, cuda, cuda:<number> or mps"),
        ({"device": "auto", "device_map": "auto", "max_memory": {"gpu": "1GiB"}}, "model.max_memory: 'gpu' is no device"),
        (
            {"device": "auto", "device_map": "auto", "max_memory": {0: "lots"}},
            "model.max_memory.0: 'lots' is no size; write 20GiB or 500MiB",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_remedy(monkeypatch, options, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        ModelSettings(**{"device": "cpu"} | options).check(local=True)
    assert words in str(refused.value)


def test_flash_attention_wants_16_bits_and_its_package(monkeypatch):
    """On a GPU; without the package transformers would fetch a kernel from the hub."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("transformers.utils.import_utils.is_flash_attn_2_available", lambda: False)
    settings = {"attention": "flash_attention_2", "device": "cuda"}
    with pytest.raises(ValueError, match=r"computes in 16 bits only; set model\.dtype: bfloat16"):
        ModelSettings(**settings).check(local=True)
    with pytest.raises(ValueError, match="the package flash-attn is not installed"):
        ModelSettings(**settings, dtype="bfloat16").check(local=True)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert ModelSettings(device="cuda:1").target() == torch.device("cuda:1")
    with pytest.raises(ValueError, match=r"model\.device 'cuda:2': torch sees 2 GPUs here"):
        ModelSettings(device="cuda:2").target()


def test_automatic_device(monkeypatch):
    for seen, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda seen=seen: seen)
        monkeypatch.setattr(torch.cuda, "device_count", lambda seen=seen: int(seen))
        assert ModelSettings().target().type == kind


def test_limits_in_bytes_survive_a_recipe_file():
    settings = ModelSettings(device_map="auto", max_memory={0: "2GiB", "cpu": "500MB"})
    again = ModelSettings.model_validate(settings.model_dump(mode="json"))
    assert settings.limits() == again.limits() == {0: 2 << 30, "cpu": 500_000_000}
    assert again.options()["max_memory"] == settings.limits()


def test_options_of_one_device_and_of_several():
    one = ModelSettings(device="cpu", dtype="bfloat16", attention="eager", experts="eager").options()
    assert one == {
        "dtype": torch.bfloat16,
        "experts_implementation": "eager",
        "attn_implementation": "eager",
        "device_map": {"": torch.device("cpu")},
    }
    several = ModelSettings(device_map="balanced", offload="there").options()
    assert several["device_map"] == "balanced"
    assert several["max_memory"] is None
    assert several["offload_folder"] == "there"

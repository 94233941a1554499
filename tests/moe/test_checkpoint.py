"""What the files of a checkpoint folder say before any weight is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedgraft.moe.checkpoint import inspect_folder
from tests.moe.conftest import INDEX, merged, store


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        inspect_folder(folder)
    return str(refused.value)


def test_a_whole_checkpoint_is_described_by_its_headers(olmoe_folder):
    found, tensors = inspect_folder(olmoe_folder), merged(olmoe_folder)
    assert len(found.shards) == len(shards(olmoe_folder)) > 2
    assert found.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert set(found.dtypes.values()) == {"F32"}
    assert (found.stored(), found.packed(), found.ignored) == ({"float32"}, {}, ())


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("config.json", "not a model folder, it has no config.json"),
        ("tokenizer.json", "no tokenizer files (tokenizer.json or tokenizer.model); copy them"),
        (INDEX, f"but no {INDEX}; copy that file too"),
    ],
)
def test_a_missing_file_is_named(broken, gone, words):
    (broken / gone).unlink()
    assert str(broken) in refusal(broken)
    assert words in refusal(broken)


def test_a_missing_shard_is_named(broken):
    lost, count = shards(broken)[1], len(shards(broken))
    lost.unlink()
    assert refusal(broken) == f"{broken}: missing {lost.name} of {count} shards named in {INDEX}; copy it into the folder"


@pytest.mark.parametrize("name", ["model-00009-of-00009.safetensors", "model.safetensors"])
def test_a_shard_of_another_model_is_refused(broken, name):
    shutil.copy(shards(broken)[0], broken / name)
    assert f"{name} is not in {INDEX}, so it is from another model; remove it" in refusal(broken)


def test_weights_under_other_names_are_left_alone_and_named(broken):
    shutil.copy(shards(broken)[0], broken / "consolidated.safetensors")
    assert inspect_folder(broken).ignored == ("consolidated.safetensors",)


def test_a_truncated_shard_is_named(broken):
    path = shards(broken)[0]
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path}: not a complete safetensors file ({path.stat().st_size:,} bytes;" in refusal(broken)


@pytest.mark.parametrize("content", [b"", b"<html>", b"\xff" * 64])
def test_what_is_no_safetensors_file_is_named(broken, content):
    shards(broken)[0].write_bytes(content)
    assert "not a complete safetensors file" in refusal(broken)


def test_a_git_lfs_pointer_is_recognised(broken):
    shards(broken)[0].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")
    assert refusal(broken).endswith("a git-lfs pointer, not the weights; run: git lfs pull")


def test_a_tensor_that_its_shard_lacks_is_named(broken):
    index = json.loads((broken / INDEX).read_text())
    index["weight_map"]["model.norm.bias"] = shards(broken)[0].name
    (broken / INDEX).write_text(json.dumps(index))
    assert refusal(broken) == f"{shards(broken)[0]}: lacks model.norm.bias, which {INDEX} expects there; copy the shard again"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_broken_index_is_named(broken, content):
    (broken / INDEX).write_text(content)
    assert refusal(broken) == f"{broken / INDEX}: not a safetensors index; copy it again"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth"])
def test_pickles_are_never_read(broken, name):
    for path in (*shards(broken), broken / INDEX):
        path.unlink()
    (broken / name).write_bytes(b"not opened")
    assert f"only pickled weights ({name}), which can run code when opened and are never read" in refusal(broken)


@pytest.mark.parametrize(
    ("name", "words"), [("model.gguf", "only GGUF weights"), ("notes.txt", "no weights: neither model.safetensors nor")]
)
def test_no_weights(broken, name, words):
    for path in (*shards(broken), broken / INDEX):
        path.unlink()
    (broken / name).touch()
    assert words in refusal(broken)


def test_an_adapter_is_no_base(broken):
    (broken / "adapter_config.json").write_text("{}")
    assert "holds a PEFT adapter; merge it into its base" in refusal(broken)


def test_a_missing_expert_is_named(broken):
    """transformers would only report that stacking the experts failed."""
    store(broken, {name: tensor for name, tensor in merged(broken).items() if name != "model.layers.1.mlp.experts.5.up_proj.weight"})
    assert "the weights lack model.layers.1.mlp.experts.5.up_proj.weight; the checkpoint is incomplete" in refusal(broken)


def test_packed_matrices_are_told_from_plain_ones_and_from_counters(broken):
    packed = {"w": torch.zeros(2, 2, dtype=torch.uint8), "f8": torch.zeros(2, 2, dtype=torch.float8_e4m3fn)}
    plain = {"half": torch.zeros(2, 2, dtype=torch.bfloat16), "counter": torch.zeros(1, dtype=torch.int32)}
    store(broken, {})
    save_file(packed | plain, broken / "model.safetensors")
    found = inspect_folder(broken)
    assert found.packed() == {"w": "U8", "f8": "F8_E4M3"}
    assert found.stored() == {"bfloat16"}

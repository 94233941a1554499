from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedgraft.moe.load import load_base
from fedgraft.moe.settings import ModelSettings
from fedgraft.moe.skeleton import is_local, skeleton


def test_a_skeleton_has_the_anatomy_of_the_model_and_no_memory() -> None:
    bare, base = skeleton(ModelSettings()), load_base(ModelSettings(threads=1))
    assert {part.device.type for part in bare.model.parameters()} == {"meta"}
    assert bare.projections == base.projections
    assert [(site.path, site.num_experts, site.width) for site in bare.sites] == [
        (site.path, site.num_experts, site.width) for site in base.sites
    ]
    shapes = {name: part.shape for name, part in base.model.named_parameters()}
    assert {name: part.shape for name, part in bare.model.named_parameters()} == shapes


def test_configurations_that_make_no_model(tmp_path: Path) -> None:
    def config(**values: object) -> ModelSettings:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(values))
        return ModelSettings(name=str(path))

    with pytest.raises(ValueError, match="is not one of the installed transformers"):
        skeleton(config(model_type="no_such_model"))
    with pytest.raises(ValueError, match="has no MoE layers"):
        skeleton(config(model_type="llama", num_hidden_layers=1, hidden_size=32, intermediate_size=32, vocab_size=64))
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        skeleton(config(model_type="t5"))
    with pytest.raises(ValueError, match="no such folder"):
        skeleton(ModelSettings(name=str(tmp_path / "absent")))


def test_a_configuration_is_local_and_a_hub_name_is_not(tmp_path: Path) -> None:
    (tmp_path / "any.json").write_text("{}")
    names = {"demo": True, str(tmp_path / "any.json"): True, str(tmp_path): True, "owner/model": False}
    assert {name: is_local(ModelSettings(name=name)) for name in names} == names

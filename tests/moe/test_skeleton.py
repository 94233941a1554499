from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedgraft.moe.load import ModelSettings, load_base
from fedgraft.moe.skeleton import skeleton, tokenizer_of


def test_a_skeleton_has_the_anatomy_of_the_model_and_no_memory() -> None:
    bare, base = skeleton("demo"), load_base(ModelSettings(threads=1))
    assert {part.device.type for part in bare.model.parameters()} == {"meta"}
    assert bare.projections == base.projections
    assert [(site.path, site.num_experts, site.width) for site in bare.sites] == [
        (site.path, site.num_experts, site.width) for site in base.sites
    ]
    shapes = {name: part.shape for name, part in base.model.named_parameters()}
    assert {name: part.shape for name, part in bare.model.named_parameters()} == shapes


def test_configurations_that_make_no_model(tmp_path: Path) -> None:
    def config(**values: object) -> str:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(values))
        return str(path)

    with pytest.raises(ValueError, match="not the configuration of a model that transformers knows"):
        skeleton(config(model_type="no_such_model"))
    with pytest.raises(ValueError, match="has no MoE layers"):
        skeleton(config(model_type="llama", num_hidden_layers=1, hidden_size=32, intermediate_size=32, vocab_size=64))
    with pytest.raises(ValueError, match="does not make a causal language model"):
        skeleton(config(model_type="t5"))
    with pytest.raises(ValueError, match="no such folder"):
        skeleton(str(tmp_path / "absent"))


def test_a_configuration_alone_has_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert tokenizer_of(str(tmp_path / "config.json")) is None
    with pytest.raises(ValueError, match="tokenizer cannot be read"):
        tokenizer_of(str(tmp_path))

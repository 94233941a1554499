"""A grafted model as one ordinary transformers checkpoint."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor

from fedgraft import files
from fedgraft.grafts.graft import Fitted, GraftedModel
from fedgraft.moe.family import Family
from fedgraft.moe.load import Base
from fedgraft.moe.site import contract_inputs
from fedgraft.use.export.qwen2_moe import as_qwen2_moe, why_not
from fedgraft.use.export.weights import Gated, grafts_of, merge

CODE = "modeling_grafted.py"
PROJECTIONS = ("gate", "up", "down")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What was written."""

    kind: str
    """In words."""
    code: str = ""
    """Why a modelling file stands beside it; empty where none does."""
    note: str = ""
    """What tools must heed to compute this model; empty where nothing is unusual."""


def write_checkpoint(grafted: GraftedModel, fitted: Fitted, folder: Path) -> Checkpoint:
    """Write everything into the base's weights, which are others then, and save them.

    Without grafts, or with grafts in place, it has the base's architecture; else it is a Qwen2-MoE where that is exact, and else the base's
    architecture with a modelling file beside it.

    Raises:
        ValueError: a family that no modelling file can be written for.
    """
    base, settings = grafted.base, grafted.graft_settings
    grafts = grafts_of(base, fitted, grafted.lora_settings, settings)
    other = why_not(base, grafts) if grafts else ""
    if other:
        _check_contract(base)
    merge(base, fitted, grafted.lora_settings, settings)
    architecture = base.model.config.model_type
    if not grafts:
        base.model.save_pretrained(folder)
        return Checkpoint(kind=f"plain {architecture} checkpoint")
    if not other:
        as_qwen2_moe(base, grafts).save_pretrained(folder)
        note = "Top-k weights are normalised (norm_topk_prob: true); a tool that ignores this, as llama.cpp does, computes another model."
        return Checkpoint(kind="plain qwen2_moe checkpoint, whose shared expert is the graft", note=note)
    _write_custom(base, grafts, folder)
    return Checkpoint(kind=f"{architecture} checkpoint with a modelling file ({CODE})", code=other)


def read_checkpoint(folder: Path, written: Checkpoint) -> Any:
    """The model again, from its files alone."""
    from transformers import AutoModelForCausalLM

    reader: Any = _custom_class(folder) if written.code else AutoModelForCausalLM
    model, found = reader.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"], found["missing_keys"]
    assert not found["unexpected_keys"], found["unexpected_keys"]
    return model.eval()


def _check_contract(base: Base) -> None:
    """A modelling file can be written: grafts hang on experts modules that follow transformers' contract."""
    own = base.family.expert is not Family.expert
    for site in base.sites:
        if own or site.hooked is not site.experts or site.inputs is not contract_inputs:
            raise ValueError(
                f"--as merged: the experts of {base.model.config.model_type} are called in a way of their own, for which no modelling "
                "file is written; export it --as fedgraft"
            )


def _write_custom(base: Base, grafts: Mapping[int, list[Gated]], folder: Path) -> None:
    """Weights by their names in the model (no renaming on load), `config.json` of an architecture of its own, and the modelling file."""
    from huggingface_hub import save_torch_state_dict

    model, config, first = base.model, base.model.config, next(iter(grafts.values()))[0]
    paths = {site.layer: site.path for site in base.sites}
    layers = sorted(grafts)
    state = dict(model.state_dict())
    for number, layer in enumerate(layers):
        for at, graft in enumerate(grafts[layer]):
            leaves = {key: leaf.to(model.dtype, copy=True).contiguous() for key, leaf in _leaves(graft).items()}  # no views
            state |= {f"grafts.{number}.{at}.{key}": leaf for key, leaf in leaves.items()}
    save_torch_state_dict(state, folder, shared_tensors_to_discard=list(model._tied_weights_keys or {}))
    shape = {
        "paths": [paths[layer] for layer in layers],
        "counts": [len(grafts[layer]) for layer in layers],
        "width": first.up.shape[0],
        "inputs": first.up.shape[1],
        "gated": first.gate is not None,
        "biases": [name for name in PROJECTIONS if getattr(first, f"{name}_bias") is not None],
        "mix": first.mix is not None,
        "mix_bias": first.mix_bias is not None,
    }
    kind = f"grafted_{config.model_type}"
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    written = files.parse_json(files.read_text(folder / "config.json"))
    written |= {"model_type": kind, "architectures": ["GraftedForCausalLM"], "grafts": shape, "dtype": str(model.dtype).partition(".")[2]}
    name = CODE.removesuffix(".py")
    written["auto_map"] = {"AutoConfig": f"{name}.GraftedConfig", "AutoModelForCausalLM": f"{name}.GraftedForCausalLM"}
    files.write_json(folder / "config.json", written)
    text = files.read_text(Path(str(resources.files("fedgraft"))) / "assets" / "export" / f"{CODE}.txt")
    for mark, word in {"<MODEL>": type(model).__name__, "<CONFIG>": type(config).__name__, "<TYPE>": kind}.items():
        text = text.replace(mark, word)
    files.write_text(folder / CODE, text)


def _leaves(graft: Gated) -> dict[str, Tensor]:
    parts = {f"{name}.weight": getattr(graft, name) for name in PROJECTIONS}
    parts |= {f"{name}.bias": getattr(graft, f"{name}_bias") for name in PROJECTIONS}
    parts |= {"mix.weight": None if graft.mix is None else graft.mix[None]}
    parts |= {"mix.bias": None if graft.mix_bias is None else graft.mix_bias.reshape(1)}
    return {key: leaf for key, leaf in parts.items() if leaf is not None}


def _custom_class(folder: Path) -> Any:
    """The class of the modelling file, from the file itself."""
    spec = importlib.util.spec_from_file_location("fedgraft_exported", folder / CODE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.GraftedForCausalLM

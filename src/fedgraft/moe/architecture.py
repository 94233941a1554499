"""From a configuration alone: is it a decoder-only MoE language model, and what does it look like before its weights are there?"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fedgraft.moe.family import Site, family_of
from fedgraft.moe.settings import ModelSettings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TEXT_KEYS = {r"^language_model\.lm_head": "lm_head", r"^(?:model\.)?language_model\.(?:model\.)?": "model."}
"""Names of a wrapper's text weights -> those of its text model alone."""
TEXT_PART = re.compile(r"^(lm_head|(language_model\.|model\.)*(layers|embed_tokens|norm)\.)")
HUB_TROUBLE = {
    "GatedRepoError": "is gated: accept its terms on huggingface.co and log in with `hf auth login`",
    "RepositoryNotFoundError": "is neither a folder here nor a model on the hub (or it is private: `hf auth login`); check the spelling",
    "RevisionNotFoundError": "has no such model.revision",
    "EntryNotFoundError": "has no config.json on the hub, so it is not a transformers model",
    "RemoteEntryNotFoundError": "has no config.json on the hub, so it is not a transformers model",
}
UNREACHABLE = (
    "is no folder here and not in the local hub cache, and the hub was not reached (or model.offline forbids it); download it where there "
    "is a network (`hf download {name}`) and give the folder, or check the spelling of the path"
)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The text model a checkpoint is loaded as."""

    config: PreTrainedConfig
    quantisation: dict[str, Any] | None
    """How the checkpoint's weights are packed, as its config.json says."""
    wrapper: str | None = None
    """model_type of the vision-language model whose text part this is."""
    key_mapping: dict[str, str] = field(default_factory=dict)
    """Checkpoint names -> names of the text model, where transformers does not map them itself."""

    def skeleton(self, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[Site]]:
        """The model without memory (meta device), and its MoE layers.

        Raises:
            ValueError: it has no MoE layers, or some that cannot be grafted on.
        """
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(self.config, dtype=dtype, trust_remote_code=False)
        return model, family_of(str(self.config.model_type)).sites(model)


def read_architecture(name: str, source: str, hub: dict[str, Any]) -> Architecture:
    """Read config.json and choose the class that will be loaded.

    Args:
        name: `model.name`, for messages.
        source: folder or hub name.
        hub: options of every call that may reach the hub.

    Raises:
        ValueError: no readable configuration, remote code, an encoder-decoder, or no causal language model.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

    where = f"model.name {name!r}:"
    try:
        raw, _ = PretrainedConfig.get_config_dict(source, **hub)
    except (OSError, ValueError) as error:
        raise ValueError(f"{where} config.json cannot be read ({_first_line(error)})") from error
    kind = raw.get("model_type")
    if kind not in CONFIG_MAPPING:
        code = "brings its own code (auto_map), which is never run, and " if raw.get("auto_map") else ""
        raise ValueError(
            f"{where} {code}its architecture {kind!r} is not one of the installed transformers; use another model or a newer version"
        )
    try:
        config = AutoConfig.from_pretrained(source, **hub)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{where} config.json does not describe a {kind} model ({_first_line(error)})") from error
    return _as_text_model(where, config)


def hub_commit(settings: ModelSettings) -> str:
    """The commit of a hub name, with its config.json in the local cache afterwards.

    Raises:
        ValueError: it is not there, gated, or not reachable; one line with the remedy.
    """
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(settings.name, "config.json", revision=settings.revision, local_files_only=settings.offline)
    except (OSError, ValueError) as error:
        causes = [type(cause).__name__ for cause in _chain(error)]
        trouble = next((HUB_TROUBLE[cause] for cause in causes if cause in HUB_TROUBLE), UNREACHABLE.format(name=settings.name))
        raise ValueError(f"model.name {settings.name!r} {trouble}") from error
    assert path is not None
    return Path(path).parent.name


def stray_text_weights(architecture: Architecture, unexpected: set[str]) -> list[str]:
    """Weights of the checkpoint that the text model has no place for; a wrapper's vision and audio parts are not among them."""
    return sorted(key for key in unexpected if architecture.wrapper is None or TEXT_PART.match(key))


def _as_text_model(where: str, config: Any) -> Architecture:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING as CAUSAL

    kind = config.model_type
    if config.is_encoder_decoder:
        raise ValueError(
            f"{where} {kind} is an encoder-decoder; experts are grafted on decoder-only language models, such as mixtral or olmoe"
        )
    quantisation: Any = getattr(config, "quantization_config", None)
    packing = quantisation.to_dict() if hasattr(quantisation, "to_dict") else quantisation
    text = config.get_text_config(decoder=True)
    if type(text) not in CAUSAL:
        what = f"a wrapper whose text part ({text.model_type}) has" if text is not config else "an architecture that has"
        raise ValueError(f"{where} {kind} is {what} no causal language model of its own in transformers; use a text-only MoE model")
    for holder in (config, text):
        if hasattr(holder, "quantization_config"):
            del holder.quantization_config
    if text is config:
        return Architecture(config=config, quantisation=packing)
    own = type(config) in CAUSAL and CAUSAL[type(config)] is CAUSAL[type(text)]
    return Architecture(config=text, quantisation=packing, wrapper=kind, key_mapping={} if own else TEXT_KEYS)


def _chain(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)

"""From a configuration alone: is it a decoder-only MoE language model, and what does it look like before its weights are there?"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedgraft.moe.family import Anatomy, anatomy_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TEXT_KEYS = {r"^language_model\.lm_head": "lm_head", r"^(?:model\.)?language_model\.(?:model\.)?": "model."}
"""Names of a wrapper's text weights -> those of its text model alone."""
TEXT_PART = re.compile(r"^(lm_head|(language_model\.|model\.)*(layers|embed_tokens|norm)\.)")


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

    def skeleton(self, dtype: torch.dtype = torch.float32) -> Anatomy:
        """The model without memory (meta device): its MoE layers and linear projections.

        Raises:
            ValueError: it has no MoE layers, or some that cannot be grafted on.
        """
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(self.config, dtype=dtype, trust_remote_code=False)
        return anatomy_of(model)


def read_architecture(name: str, folder: Path) -> Architecture:
    """Read a folder's config.json and choose the class that will be loaded; `name` is for messages.

    Raises:
        ValueError: no readable configuration, remote code, an encoder-decoder, or no causal language model.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

    where = f"model.name {name!r}:"
    try:
        raw, _ = PretrainedConfig.get_config_dict(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{where} config.json cannot be read ({_first_line(error)})") from error
    kind = raw.get("model_type")
    if kind not in CONFIG_MAPPING:
        code = "brings its own code (auto_map), which is never run, and " if raw.get("auto_map") else ""
        raise ValueError(
            f"{where} {code}its architecture {kind!r} is not one of the installed transformers; use another model or a newer version"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # configuration classes check their fields in ways of their own
        raise ValueError(f"{where} config.json is no valid configuration of {kind} ({_first_line(error)})") from error
    return _as_text_model(where, config)


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


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)

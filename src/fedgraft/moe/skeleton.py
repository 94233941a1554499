"""A model without weights: its anatomy from the configuration alone, on the meta device, in seconds whatever its size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedgraft.moe.family import Anatomy, anatomy_of
from fedgraft.moe.load import locate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def skeleton(name: str, dtype: str = "float32") -> Anatomy:
    """The anatomy of a model whose parameters have shapes and no memory.

    Args:
        name: `demo`, a folder, a config.json, or a hub name, of which config.json alone is fetched.
        dtype: the one its parameters would be loaded in. A quantised checkpoint counts as unpacked to it.

    Raises:
        ValueError: no configuration there, an architecture that transformers does not know, or one without MoE layers.
    """
    from transformers import AutoModelForCausalLM

    config = _configuration(name)
    if hasattr(config, "quantization_config"):  # else the packed modules would be built
        del config.quantization_config
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"{name}: its configuration ({config.model_type}) does not make a causal language model of transformers ({_first_line(error)})"
        ) from error
    model.requires_grad_(False).eval()
    return anatomy_of(model)


def tokenizer_of(name: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a model, without the model; None for a config.json alone.

    Raises:
        ValueError: there should be one and it cannot be read.
    """
    from transformers import AutoTokenizer

    if Path(name).is_file():
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(locate(name))
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise ValueError(f"model.name {name!r}: its tokenizer cannot be read ({_first_line(error)})") from error
    return tokenizer


def _configuration(name: str) -> Any:
    from transformers import AutoConfig

    source = name if Path(name).is_file() else locate(name)
    try:
        config: Any = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if Path(source).exists():
            raise ValueError(f"{name}: not the configuration of a model that transformers knows ({_first_line(error)})") from error
        raise ValueError(
            f"{name}: neither a folder or config.json here nor a model that the Hugging Face hub gave; check the spelling and the network, "
            "or give the path of its config.json"
        ) from error
    return config.get_text_config(decoder=True)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)

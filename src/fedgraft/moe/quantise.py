"""Quantised bases: experts kept as int8 through torchao, packed checkpoints unpacked at loading, and what is refused."""

from __future__ import annotations

import copy
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fedgraft.moe.architecture import Architecture
from fedgraft.moe.checkpoint import Checkpoint
from fedgraft.moe.family import Anatomy, Family
from fedgraft.moe.site import Site

UNPACKED = frozenset({"mxfp4"})
"""Packings that transformers unpacks exactly while loading, on any device and without further packages."""


def expert_parameters(sites: list[Site]) -> dict[str, Any]:
    """Path -> fused expert parameter (3-D) of every MoE layer."""
    return {
        f"{site.path}.{name}": parameter for site in sites for name, parameter in site.experts.named_parameters() if parameter.ndim == 3
    }


def int8_bytes(parameter: Any) -> int:
    """Bytes of a fused parameter [E, rows, columns] as int8 with one scale per row in its own dtype."""
    count = int(parameter.numel())
    return count + count // int(parameter.shape[-1]) * int(parameter.element_size())


def check_int8(anatomy: Anatomy) -> None:
    """Refuse int8 where torchao or the architecture's expert dispatch does not carry it.

    Raises:
        ValueError: torchao is missing, or an experts module computes in a way that torchao's int8 tensors do not support.
    """
    if importlib.util.find_spec("torchao") is None:
        raise ValueError("quantise int8: needs torchao; pip install 'fedgraft[quant]'")
    for site in anatomy.sites:
        if getattr(site.experts, "is_transposed", True) or anatomy.family.expert is not Family.expert:
            raise ValueError(
                f"quantise int8: {site.path} ({type(site.experts).__name__}) keeps its weights transposed or in a form of its own, which "
                "torchao's int8 tensors do not support; use quantise: none with dtype: bfloat16"
            )


def int8_options(sites: list[Site]) -> dict[str, Any]:
    """What `from_pretrained` is given so that the fused experts, and nothing else, become int8 while they are read."""
    with quiet_torchao():
        from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return {"quantization_config": TorchAoConfig(FqnToConfig({path: Int8WeightOnlyConfig() for path in expert_parameters(sites)}))}


def unpack_options(architecture: Architecture) -> dict[str, Any]:
    """What `from_pretrained` is given to unpack a packed checkpoint; empty for a plain one.

    Raises:
        ValueError: weights packed in a way that is not unpacked here.
    """
    if architecture.quantisation is None:
        return {}
    method = str(architecture.quantisation.get("quant_method", "unknown")).lower()
    if method not in UNPACKED:
        raise ValueError(f"its weights are quantised ({method}), and a graft is cut from plain weights; {_remedy()}")
    from transformers.utils.quantization_config import Mxfp4Config

    config: Any = copy.deepcopy(architecture.config)
    config.quantization_config = architecture.quantisation
    return {"config": config, "quantization_config": Mxfp4Config(dequantize=True)}


def check_plain(architecture: Architecture, checkpoint: Checkpoint) -> None:
    """Refuse packed weights whose configuration says nothing of it; transformers would take the numbers as they are.

    Raises:
        ValueError: naming one of them.
    """
    packed = checkpoint.packed()
    if packed and architecture.quantisation is None:
        name = min(packed)
        raise ValueError(f"{name} is stored as {packed[name]}, and config.json does not say how it is quantised; {_remedy()}")


@contextmanager
def quiet_torchao() -> Iterator[None]:
    """Importing torchao warns of compiled parts it does not need and of torch functions it still calls; neither concerns a user."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _remedy() -> str:
    return (
        f"only {', '.join(sorted(UNPACKED))} is unpacked while loading; give the unquantised checkpoint of the model, "
        "and to save memory set model.dtype: bfloat16 or model.quantise: int8"
    )

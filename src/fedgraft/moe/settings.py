"""The recipe section `model`, and which of its combinations this machine can carry out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from fedgraft.settings import Section

EMBEDDED = "demo"


class ModelSettings(Section):
    """The pretrained base every site holds. It must be a decoder-only MoE language model that transformers knows without remote code."""

    name: str = EMBEDDED
    """`demo` (embedded in the package), a local folder (config.json, tokenizer, safetensors weights), or a Hugging Face hub name, the only
    case in which anything is downloaded. Code that a checkpoint brings along is never run."""
    revision: str | None = None
    """Branch, tag or commit of a hub name; empty is the default branch. The commit found goes into the base's digest."""
    offline: bool = False
    """Take a hub name from the local cache alone and never connect."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision in which the frozen base is kept in memory: 4, 2 or 2 bytes a parameter. A checkpoint stored in another one is converted.
    float16 is for GPUs without bfloat16."""
    device: str = "auto"
    """`auto` (a GPU when torch sees one), `cpu`, `cuda`, `cuda:1`, `mps`. Leave it at `auto` when `device_map` is set."""
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = None
    """Spread the base over all GPUs and, where they are full, over CPU memory (accelerate's strategies); a decoder layer is never split.
    Empty: one device. Layers in CPU memory are copied to a GPU for every forward; train such a model with `training.checkpointing`, else
    their copies stay on the GPU until the backward pass."""
    max_memory: dict[int | str, str] | None = None
    """Most memory `device_map` may fill, by GPU number and `cpu`: `{0: 20GiB, 1: 20GiB, cpu: 60GiB}`. Empty: what is free."""
    offload: str | None = None
    """Folder for layers that fit neither the GPUs nor CPU memory (`device_map` only); they are read from it in every forward."""
    experts: Literal["grouped_mm", "eager", "batched_mm"] = "grouped_mm"
    """transformers' expert dispatch. `batched_mm` copies the chosen experts' weights for every token, so it is refused on a CPU; `eager`
    loops over the experts, and is the one for quantised experts. Architectures that run their experts in a way of their own (llama4, dbrx,
    jetmoe) do so whatever is set here."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation; `auto` is transformers' choice. `flash_attention_2` needs a GPU, a 16-bit `dtype` and the flash-attn
    package."""
    quantise: Literal["none", "int8", "bitsandbytes"] = "none"
    """`int8`: the fused experts, most of an MoE's weights, are kept as 8-bit integers with one scale per row (torchao, extra `quant`, with
    `experts: eager`); everything else keeps `dtype`. A graft is cut from the dequantised expert. `bitsandbytes` is refused: it leaves fused
    experts as they are, so it would not save what it seems to."""
    threads: int | None = Field(default=None, ge=1)
    """Torch CPU threads; empty keeps torch's choice. Small models are often fastest with 1."""

    def target(self) -> torch.device:
        """The device of the base, or with `device_map` the kind of device its layers compute on.

        Raises:
            ValueError: torch does not know the device or does not see it here.
        """
        automatic = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(automatic if self.device == "auto" else self.device)
        except RuntimeError:
            raise ValueError(f"model.device {self.device!r}: not a device; use auto, cpu, cuda, cuda:<number> or mps") from None
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise ValueError(f"model.device {self.device!r}: torch sees {count} GPUs here; use device: auto" + (" or cpu" * (not count)))
        if device.type == "mps" and not torch.backends.mps.is_available():
            raise ValueError("model.device 'mps': torch sees no Apple GPU here; use device: auto")
        return device

    def check(self, *, local: bool) -> None:
        """Refuse combinations that cannot work here; `local`: the base is a folder or embedded.

        Raises:
            ValueError: naming the keys and the remedy.
        """
        from transformers.utils.import_utils import is_flash_attn_2_available

        kind = self.target().type
        flash = self.attention == "flash_attention_2"
        spread = self.device_map is not None
        int8, placed = self.quantise == "int8", "model.device_map"
        problems = (
            (kind == "cpu" and self.dtype == "float16", "dtype float16: many times slower than float32 on a CPU; use bfloat16"),
            (
                kind == "cpu" and self.experts == "batched_mm",
                "experts batched_mm: copies the chosen experts for every token, gigabytes and minutes on a CPU; use grouped_mm",
            ),
            (flash and kind != "cuda", f"attention flash_attention_2: needs a CUDA GPU, the base goes to {kind}; use sdpa"),
            (flash and self.dtype == "float32", "attention flash_attention_2: computes in 16 bits only; set model.dtype: bfloat16"),
            (
                flash and not is_flash_attn_2_available(),
                "attention flash_attention_2: the package flash-attn is not installed; pip install flash-attn, or use sdpa",
            ),
            (
                int8 and self.experts != "eager",
                f"quantise int8: {self.experts} cannot dispatch quantised experts; set model.experts: eager",
            ),
            (int8 and self.offload is not None, "quantise int8: weights quantised while loading cannot go to disk; remove model.offload"),
            (spread and self.device != "auto", f"device_map {self.device_map}: chooses the devices itself; set model.device: auto"),
            (not spread and self.max_memory is not None, f"max_memory: limits what {placed} may fill; set {placed}: auto"),
            (not spread and self.offload is not None, f"offload: takes what {placed} finds no place for; set {placed}: auto"),
            (local and self.revision is not None, f"revision: belongs to hub names, and {self.name!r} is not one; remove it"),
        )
        for found, message in problems:
            if found:
                raise ValueError(f"model.{message}")
        self.limits()

    def limits(self) -> dict[int | str, int]:
        """`max_memory` in bytes, GPU numbers as numbers; empty when it is not set.

        Raises:
            ValueError: a key is no device or a value no size.
        """
        from accelerate.utils import convert_file_size_to_int

        limits: dict[int | str, int] = {}
        for key, size in (self.max_memory or {}).items():
            name = int(key) if str(key).isdigit() else key
            if isinstance(name, str) and name != "cpu":
                raise ValueError(f"model.max_memory: {key!r} is no device; its keys are GPU numbers and cpu")
            try:
                limits[name] = int(convert_file_size_to_int(size))
            except ValueError:
                raise ValueError(f"model.max_memory.{key}: {size!r} is no size; write 20GiB or 500MiB") from None
        return limits

    def options(self) -> dict[str, Any]:
        """What transformers' `from_pretrained` is given of dtype, dispatch, attention and placement."""
        placement: dict[str, Any] = {"device_map": {"": self.target()}}
        if self.device_map is not None:
            placement = {"device_map": self.device_map, "max_memory": self.limits() or None}
            if self.offload is not None:
                placement["offload_folder"] = str(Path(self.offload).expanduser())
        attention = {} if self.attention == "auto" else {"attn_implementation": self.attention}
        return {"dtype": getattr(torch, self.dtype), "experts_implementation": self.experts, **attention, **placement}

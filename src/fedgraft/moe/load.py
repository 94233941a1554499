"""Loading a base model: the embedded one, a local folder or a hub name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedgraft.moe.family import Anatomy, anatomy_of
from fedgraft.moe.site import Site
from fedgraft.settings import Section

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMBEDDED = "demo"


class ModelSettings(Section):
    """The pretrained base every site holds."""

    name: str = EMBEDDED
    """`demo` (embedded in the package), a local folder, or a Hugging Face hub name (the only case in which anything is downloaded)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which the frozen base is kept in memory."""
    device: str = "auto"
    """`auto` (a GPU when torch sees one), `cpu`, `cuda`, `cuda:1`, `mps`."""
    experts: Literal["grouped_mm", "eager", "batched_mm"] = "grouped_mm"
    """transformers' expert dispatch. batched_mm needs many gigabytes and is slow on a CPU."""
    threads: int | None = Field(default=None, ge=1)
    """Torch CPU threads; empty keeps torch's choice. Small models are often fastest with 1."""


@dataclass(frozen=True, kw_only=True)
class Base(Anatomy):
    """A loaded, frozen base model with its MoE layers."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    digest: str
    """SHA-256 over configuration and weight files (hub: name and commit)."""

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        device: torch.device = self.model.device
        return device

    @property
    def pad_id(self) -> int:
        """Padding token id."""
        token = self.tokenizer.pad_token_id
        return int(token if token is not None else self.tokenizer.eos_token_id)

    @contextmanager
    def logits_at(self, chosen: Tensor) -> Iterator[None]:
        """A forward inside the block gives logits [N, V] for the N `chosen` positions ([B, T] bool, row by row) alone.

        The head then sees no other position: with a long vocabulary it is a good part of the work, and its logits most of the memory.
        """
        head: Any = self.model.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda _, args: (args[0][chosen], *args[1:]))
        try:
            yield
        finally:
            handle.remove()


def load_base(settings: ModelSettings) -> Base:
    """Load model and tokenizer, freeze every weight, find the MoE layers and check that each runs once per forward.

    Raises:
        ValueError: no such model, damaged files, or an architecture without MoE layers.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # the run has its own
    if settings.threads:
        torch.set_num_threads(settings.threads)
    source = locate(settings.name)
    device = settings.device if settings.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = {"dtype": getattr(torch, settings.dtype), "experts_implementation": settings.experts}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model: Any = AutoModelForCausalLM.from_pretrained(source, **options)
    except (OSError, KeyError) as error:
        raise ValueError(f"model.name {settings.name!r}: cannot be loaded as a causal language model ({error})") from error
    return prepare(settings.name, model.to(device), tokenizer, _digest(source, model.config))


def prepare(name: str, model: Any, tokenizer: Any, digest: str) -> Base:
    """A `Base` from a live model and tokenizer: frozen, its MoE layers found and probed."""
    model.requires_grad_(False).eval()
    anatomy = anatomy_of(model)
    probe(model, anatomy.sites)
    return Base(name=name, tokenizer=tokenizer, digest=digest, **vars(anatomy))


def probe(model: nn.Module, sites: list[Site]) -> None:
    """Check that every MoE layer runs exactly once in a forward; kernels that replace a whole block would bypass the grafts.

    Raises:
        ValueError: a layer ran never or more than once.
    """
    fired = dict.fromkeys((site.path for site in sites), 0)

    def counter(path: str) -> Any:
        def hook(*_: Any) -> None:
            fired[path] += 1

        return hook

    handles = [site.hooked.register_forward_hook(counter(site.path)) for site in sites]
    try:
        with torch.no_grad():
            model(torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    wrong = [path for path, times in fired.items() if times != 1]
    if wrong:
        raise ValueError(f"{wrong[0]}: ran {fired[wrong[0]]} times in one forward, so a graft there would not act as specified")


def locate(name: str) -> str:
    """Folder or hub name to load from.

    Raises:
        ValueError: it looks like a path and is not there.
    """
    if name == EMBEDDED:
        return str(resources.files("fedgraft") / "assets" / "base")
    looks_local = name.startswith((".", "/", "~")) or os.sep in name[:1] or name.count("/") > 1
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    if looks_local:
        raise ValueError(f"model.name {name!r}: no such folder")
    return name


def _digest(source: str, config: Any) -> str:
    sums = hashlib.sha256()
    if not Path(source).is_dir():
        return hashlib.sha256(f"{source}@{getattr(config, '_commit_hash', None)}".encode()).hexdigest()
    for path in sorted(Path(source).iterdir()):
        if path.name in {"config.json", "tokenizer.json"} or path.suffix == ".safetensors":
            sums.update(path.name.encode())
            with path.open("rb") as content:
                while block := content.read(1 << 22):
                    sums.update(block)
    return sums.hexdigest()

"""Loading a base model: the embedded one, a local folder or a hub name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from logging import CRITICAL
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedgraft.moe.architecture import Architecture, stray_text_weights
from fedgraft.moe.checkpoint import Checkpoint, inspect_folder
from fedgraft.moe.family import Anatomy, Family, anatomy_of
from fedgraft.moe.hub import hub_weights
from fedgraft.moe.memory import check_room, means_out_of_memory
from fedgraft.moe.padding import Compaction, spared
from fedgraft.moe.plan import Plan, examine, file_notes
from fedgraft.moe.quantise import check_plain, quiet_torchao
from fedgraft.moe.settings import ModelSettings
from fedgraft.moe.site import Site
from fedgraft.moe.weights import compute_device, is_offloaded, keep_in_memory, vectors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Base(Anatomy):
    """A loaded, frozen base model with its MoE layers."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    digest: str
    """SHA-256 over configuration, tokenizer and every byte of the weight files (hub: name and commit)."""
    notes: tuple[str, ...] = ()
    """What was found and done while loading that changes numbers or leaves something out."""

    @property
    def device(self) -> torch.device:
        """Where inputs go, and logits come back to."""
        return compute_device(self.model.get_input_embeddings())

    @property
    def pad_id(self) -> int:
        """Padding token id."""
        token = self.tokenizer.pad_token_id
        return int(token if token is not None else self.tokenizer.eos_token_id)

    @cached_property
    def _compaction(self) -> Compaction:
        return Compaction.tried(self, self.device)

    @property
    def compacts(self) -> bool:
        """Whether `without_padding` is for this model; it is tried out when first asked, in evaluation mode."""
        return self._compaction.padding

    def without_padding(self, mask: Tensor, read: Tensor) -> AbstractContextManager[None]:
        """A forward of rows with this mask [B, L] inside the block spares MoE layers the padding; equal to rounding where it is `read`.

        If nothing else reads what the last of them makes of a position, it is spared all but those positions ([B, L] bool). Whatever
        watches or adapts these layers then sees the N tokens that are left, in the order of the rows.
        """
        assert self.compacts
        return spared([site.block for site in self.sites], mask, read if self._compaction.unread else None)

    @contextmanager
    def logits_at(self, chosen: Tensor) -> Iterator[None]:
        """A forward inside the block gives logits [N, V] for the N `chosen` positions ([B, T] bool, row by row) alone.

        The head then sees no other position: with a long vocabulary it is a good part of the work, and its logits most of the memory.
        """
        head: Any = self.model.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda _, args: (args[0][chosen.to(args[0].device)], *args[1:]))
        try:
            yield
        finally:
            handle.remove()

    def states_at(self, ids: Tensor, mask: Tensor, chosen: Tensor) -> Tensor:
        """[N, H]: what the head reads at the N `chosen` positions ([B, T] bool, row by row) in a forward over ids [B, T]."""
        seen: list[Tensor] = []
        head: Any = self.model.get_output_embeddings()
        with self.logits_at(chosen):
            handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            try:
                self.model(input_ids=ids, attention_mask=mask, use_cache=False)
            finally:
                handle.remove()
        return seen[0]


def load_base(settings: ModelSettings) -> Base:
    """Load model and tokenizer, freeze every weight, find the MoE layers and check that each runs once per forward.

    Raises:
        ValueError: settings that this machine cannot carry out, no such model, a damaged or incomplete checkpoint, one that is no
            decoder-only MoE language model, or one that does not fit into memory.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    plan = examine(settings)
    check_room(settings.name, plan.needed, plan.room, settings)
    checkpoint = checkpoint_of(settings, plan)
    with naming(settings):
        tokenizer = tokenizer_of(checkpoint.folder, plan.architecture)
        model = _model(checkpoint.folder, plan)
    digest = digest_of(settings, plan, checkpoint)
    return prepare(settings.name, model, tokenizer, digest, (*plan.notes, *file_notes(settings, checkpoint)))


@contextmanager
def naming(settings: ModelSettings) -> Iterator[None]:
    """Errors say which model they are about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"model.name {settings.name!r}: {error}") from error


def checkpoint_of(settings: ModelSettings, plan: Plan) -> Checkpoint:
    """The weight files, downloaded where the model is a hub name.

    Raises:
        ValueError: they are incomplete, damaged, or packed without saying so.
    """
    checkpoint = plan.checkpoint or inspect_folder(hub_weights(settings, str(plan.commit)))
    with naming(settings):
        check_plain(plan.architecture, checkpoint)
    return checkpoint


def digest_of(settings: ModelSettings, plan: Plan, checkpoint: Checkpoint) -> str:
    """What tells this base from every other: `Base.digest`."""
    return _digest(checkpoint.folder) if plan.commit is None else _digest_of_commit(settings.name, plan.commit)


def prepare(name: str, model: Any, tokenizer: Any, digest: str, notes: tuple[str, ...] = ()) -> Base:
    """A `Base` from a live model and tokenizer: frozen, its MoE layers found and probed."""
    model.requires_grad_(False).eval()
    anatomy = anatomy_of(model)
    for site in anatomy.sites:
        for part in (site.router, *vectors(site.block)):  # small, and read between forwards too
            keep_in_memory(part)
        if is_offloaded(site.experts) and anatomy.family.expert is not Family.expert:
            raise ValueError(f"{site.path}: experts of {model.config.model_type} cannot be offloaded; raise model.max_memory")
    base = Base(name=name, tokenizer=tokenizer, digest=digest, notes=notes, **vars(anatomy))
    probe(model, base.sites, base.device)
    return base


def probe(model: nn.Module, sites: list[Site], device: torch.device | str = "cpu") -> None:
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
            model(torch.zeros(1, 2, dtype=torch.long, device=device))
    finally:
        for handle in handles:
            handle.remove()
    wrong = [path for path, times in fired.items() if times != 1]
    if wrong:
        raise ValueError(f"{wrong[0]}: ran {fired[wrong[0]]} times in one forward, so a graft there would not act as specified")


def tokenizer_of(folder: Path, architecture: Architecture) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        ValueError: it cannot be read or belongs to another model.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise ValueError(f"its tokenizer cannot be read ({error}); copy its files again") from error
    vocabulary = architecture.config.vocab_size
    if len(tokenizer) > vocabulary:
        raise ValueError(f"its tokenizer has {len(tokenizer):,} tokens, the model {vocabulary:,}; the files are of two models")
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError("its tokenizer names neither a padding nor an end token; set eos_token in tokenizer_config.json")
    return tokenizer


def _model(folder: Path, plan: Plan) -> Any:
    """The weights, complete: transformers would draw missing ones at random and drop those it has no place for."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # the run has its own
    level = logging.get_verbosity()
    logging.set_verbosity(CRITICAL)  # what its report says is raised here
    options = plan.options | {"use_safetensors": True, "trust_remote_code": False}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # mismatches are raised below, with their names
    try:
        with quiet_torchao():
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    except RuntimeError as error:  # transformers puts experts stored one by one together
        if means_out_of_memory(error):
            raise
        raise ValueError(f"its weights don't make up the model of config.json, one may be missing or of another shape ({error})") from error
    except (OSError, KeyError, ValueError, ImportError) as error:
        raise ValueError(f"cannot be loaded as a causal language model ({error})") from error
    finally:
        logging.set_verbosity(level)
    model, found = loaded
    for key, stored, wanted in sorted(found["mismatched_keys"]):
        raise ValueError(f"{key} is {list(stored)} in the checkpoint and {list(wanted)} by config.json; they are of two models")
    if found["missing_keys"]:
        raise ValueError(f"the checkpoint lacks {_some(found['missing_keys'])}; it is incomplete, copy it again")
    if stray := stray_text_weights(plan.architecture, found["unexpected_keys"]):
        raise ValueError(f"config.json has no place for {_some(stray)}; it is of another model than the weights")
    return model


def _some(keys: Any) -> str:
    names = sorted(keys)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _digest(folder: Path) -> str:
    """Every byte counts, so that a base that differs in one weight is another base."""
    sums = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name in {"config.json", "tokenizer.json"} or path.suffix == ".safetensors":
            sums.update(path.name.encode())
            with path.open("rb") as content:
                while block := content.read(1 << 22):
                    sums.update(block)
    return sums.hexdigest()


def _digest_of_commit(name: str, commit: str) -> str:
    """A hub commit stands for its bytes."""
    return hashlib.sha256(f"{name}@{commit}".encode()).hexdigest()

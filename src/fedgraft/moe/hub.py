"""Hub names: the only place that may connect to anything, and only for what a recipe names.

A model is brought into the local cache as a folder and from there on treated as one, so that the same checks hold.
"""

from __future__ import annotations

from pathlib import Path

from fedgraft.moe.settings import ModelSettings

TROUBLE = {
    "GatedRepoError": "is gated: accept its terms on huggingface.co and log in with `hf auth login`",
    "RepositoryNotFoundError": "is neither a folder here nor a model on the hub (or it is private: `hf auth login`); check the spelling",
    "RevisionNotFoundError": "has no such model.revision",
    "EntryNotFoundError": "has no config.json on the hub, so it is not a transformers model",
    "RemoteEntryNotFoundError": "has no config.json on the hub, so it is not a transformers model",
    "HFValidationError": "is neither a folder here nor a possible hub name (owner/model)",
}
UNREACHABLE = (
    "is no folder here and not in the local hub cache, and the hub was not reached (or model.offline forbids it); download it where there "
    "is a network (`hf download {name}`) and give the folder, or check the spelling of the path"
)
WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt"]
UNWANTED = ["*/*", "consolidated*"]
"""Other forms of the same weights: subfolders, and Mistral's own file."""


def hub_config(settings: ModelSettings) -> Path:
    """The cache folder of a hub model, named by its commit, with at least its config.json: a download of a few kilobytes.

    Raises:
        ValueError: it does not exist, is gated or not reachable; one line with the remedy.
    """
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(settings.name, "config.json", revision=settings.revision, local_files_only=settings.offline)
    except (OSError, ValueError) as error:
        raise _explained(settings.name, error) from error
    return Path(path).parent


def hub_weights(settings: ModelSettings, commit: str) -> Path:
    """The cache folder of a hub model with its tokenizer and weights, downloaded if need be.

    Raises:
        ValueError: as `hub_config`.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                settings.name, revision=commit, local_files_only=settings.offline, allow_patterns=WANTED, ignore_patterns=UNWANTED
            )
        )
    except (OSError, ValueError) as error:
        raise _explained(settings.name, error) from error


def _explained(name: str, error: BaseException) -> ValueError:
    kinds = [kind.__name__ for kind in type(error).__mro__]
    trouble = UNREACHABLE.format(name=name)
    if "LocalEntryNotFoundError" not in kinds:  # it is an EntryNotFoundError too
        trouble = next((TROUBLE[kind] for kind in kinds if kind in TROUBLE), trouble)
    return ValueError(f"model.name {name!r} {trouble}")

"""Hub names: one message when they cannot be had, the cache when they can, no connection when offline."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors

from fedgraft.moe.hub import hub_config
from fedgraft.moe.load import Base, load_base
from fedgraft.moe.plan import examine
from fedgraft.moe.settings import ModelSettings

COMMIT = "0123456789abcdef0123456789abcdef01234567"
IDS = torch.arange(3, 12)[None]


def load(name: str | Path, **options: Any) -> Base:
    return load_base(ModelSettings(name=str(name), device="cpu", **options))


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, olmoe_folder: Path) -> Path:
    """A local hub cache that holds the olmoe as `some/olmoe`."""
    folder = tmp_path / "hub" / "models--some--olmoe"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    shutil.copytree(olmoe_folder, folder / "snapshots" / COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return folder


@pytest.mark.usefixtures("no_network", "repository")
def test_a_hub_name_from_the_cache(olmoe_folder):
    """transformers itself would look for an adapter on the hub, `local_files_only` or not."""
    base, same = load("some/olmoe", offline=True), load(olmoe_folder)
    with torch.no_grad():
        assert torch.equal(base.model(IDS).logits, same.model(IDS).logits)
    assert base.digest == load("some/olmoe", offline=True, revision=COMMIT).digest != same.digest


@pytest.mark.usefixtures("no_network")
def test_two_commits_are_two_bases(repository):
    first, other = load("some/olmoe", offline=True).digest, COMMIT[::-1]
    shutil.copytree(repository / "snapshots" / COMMIT, repository / "snapshots" / other)
    (repository / "refs" / "main").write_text(other)
    assert load("some/olmoe", offline=True).digest != first


@pytest.mark.usefixtures("no_network", "repository")
@pytest.mark.parametrize(("name", "options"), [("some/other", {}), ("some/olmoe", {"revision": "v2"})])
def test_offline_a_hub_name_that_is_not_cached_is_one_message(name, options):
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        load(name, offline=True, **options)
    assert str(refused.value) == (
        f"model.name '{name}' is no folder here and not in the local hub cache, and the hub was not reached (or model.offline forbids it); "
        f"download it where there is a network (`hf download {name}`) and give the folder, or check the spelling of the path"
    )


@pytest.mark.usefixtures("no_network")
def test_examining_a_hub_name_needs_its_configuration_alone(repository):
    """The weights come after the check that they fit."""
    snapshot = repository / "snapshots" / COMMIT
    for path in snapshot.iterdir():
        if path.name != "config.json":
            path.unlink()
    plan = examine(ModelSettings(name="some/olmoe", offline=True, device="cpu"))
    assert (plan.commit, plan.checkpoint, len(plan.skeleton.sites)) == (COMMIT, None, 2)
    with pytest.raises(ValueError, match="no tokenizer files"):
        load("some/olmoe", offline=True)


@pytest.mark.usefixtures("no_network")
def test_offline_an_incomplete_download_is_refused(repository):
    lost = sorted((repository / "snapshots" / COMMIT).glob("model-*.safetensors"))[0]
    lost.unlink()
    with pytest.raises(ValueError, match=f"missing {lost.name} of"):
        load("some/olmoe", offline=True)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("GatedRepoError", "model.name 'a/b' is gated: accept its terms on huggingface.co and log in with `hf auth login`"),
        ("RepositoryNotFoundError", "model.name 'a/b' is neither a folder here nor a model on the hub"),
        ("RevisionNotFoundError", "model.name 'a/b' has no such model.revision"),
        ("RemoteEntryNotFoundError", "model.name 'a/b' has no config.json on the hub"),
        ("LocalEntryNotFoundError", "(`hf download a/b`) and give the folder"),
        ("OfflineModeIsEnabled", "(`hf download a/b`) and give the folder"),
    ],
)
def test_troubles_of_the_hub_are_one_line_with_the_remedy(monkeypatch, error, words):
    def fails(*_: Any, **__: Any) -> str:
        kind = getattr(errors, error)
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        hub_config(ModelSettings(name="a/b"))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["two words", "a--b/..c", "-"])
def test_what_cannot_be_a_hub_name_is_refused(name):
    with pytest.raises(ValueError, match="is neither a folder here nor a possible hub name"):
        hub_config(ModelSettings(name=name))

"""Compression and privacy over Flower messages."""

from __future__ import annotations

import pytest

from fedgraft import reach, runner
from fedgraft.report.html import run_page
from fedgraft.transforms.noise import SECRET
from tests.engine.conftest import grid_of, identity, light, place, start
from tests.engine.test_flower import LEAN, digests, flower, timeless

__all__ = ["grid_of", "identity", "light", "place", "start"]


def test_int8_over_a_grid_is_int8_in_process(place, tmp_path, grid_of):
    recipe = place.recipe("flex", **LEAN, compression={"name": "int8"})
    here = runner.run(recipe, out=tmp_path / "here")
    afar = runner.run(flower(recipe), out=tmp_path / "afar", connect=reach.over(grid_of()))
    assert digests(afar.folder, tmp_path / "sites") == digests(here.folder)
    assert timeless(afar) == timeless(here)


def test_privacy_over_a_grid_is_privacy_in_process_with_the_same_secret_and_keeps_figures(place, tmp_path, grid_of, monkeypatch):
    """Noise and samples come from a secret there, and no figure of a client's evaluation is asked for; the page bears that."""
    pytest.importorskip("opacus", reason="extra privacy")
    monkeypatch.setattr("fedgraft.transforms.noise.secrets.token_bytes", lambda count: b"s" * count)
    private = {"name": "client", "clip": 0.01, "secret": True}
    sampled = {"federation": {"rounds": 2, "clients_per_round": 2, "sampling": "poisson"}}
    recipe = place.recipe("flex", **{**LEAN, **sampled}, privacy=private)
    here = runner.run(recipe, out=tmp_path / "here")
    del recipe["privacy"]["secret"]
    afar = runner.run(flower(recipe), out=tmp_path / "afar", connect=reach.over(grid_of()))
    assert digests(afar.folder, tmp_path / "sites") == digests(here.folder)
    assert timeless(afar)[0] == timeless(here)[0]
    assert here.results
    assert afar.finished
    assert afar.results == {}
    assert afar.further["privacy"] == here.further["privacy"]
    assert afar.further["privacy"]["seeded"] is False
    assert (afar.folder / SECRET).read_bytes() == (here.folder / SECRET).read_bytes()
    assert "Clients keep their figures to themselves" in run_page(afar)

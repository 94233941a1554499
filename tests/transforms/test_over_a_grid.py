"""Compression over Flower messages."""

from __future__ import annotations

from fedgraft import reach, runner
from tests.engine.conftest import grid_of, identity, light, place, start
from tests.engine.test_flower import LEAN, digests, flower, timeless

__all__ = ["grid_of", "identity", "light", "place", "start"]


def test_int8_over_a_grid_is_int8_in_process(place, tmp_path, grid_of):
    recipe = place.recipe("flex", **LEAN, compression={"name": "int8"})
    here = runner.run(recipe, out=tmp_path / "here")
    afar = runner.run(flower(recipe), out=tmp_path / "afar", connect=reach.over(grid_of()))
    assert digests(afar.folder, tmp_path / "sites") == digests(here.folder)
    assert timeless(afar) == timeless(here)

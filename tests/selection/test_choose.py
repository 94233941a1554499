"""Names, bounds, ties and the record of losses; the recipe section."""

from __future__ import annotations

import numpy as np
import pydantic
import pytest
import torch

from fedgraft.selection.choose import best, choose, losses, needs_gram
from fedgraft.selection.profile import measure
from fedgraft.selection.settings import SelectionSettings
from tests.selection import brute
from tests.selection.brute import rows

RNG = np.random.default_rng(0)


@pytest.fixture
def profile(tiny_base):
    return measure(tiny_base("olmoe"), [rows(12)], 12)


def test_unknown_criterion_names_the_nearest(profile):
    with pytest.raises(ValueError, match=r"unknown criterion 'reconstructoin' \(did you mean 'reconstruction'\?\).*gate_mass"):
        choose("reconstructoin", profile, 1, RNG)


@pytest.mark.parametrize("r", [0, 9])
def test_r_outside_the_experts_is_refused(profile, r):
    with pytest.raises(ValueError, match=f"{r} experts per layer were asked for; the model's layers have 8"):
        choose("gate_mass", profile, r, RNG)


def test_joint_choice_wants_gram(profile):
    assert needs_gram("reconstruction", 2)
    assert not needs_gram("reconstruction", 1)
    assert not needs_gram("raw_reconstruction", 2)
    with pytest.raises(ValueError, match="measure the profile with gram=True"):
        choose("reconstruction", profile, 2, RNG)


def test_ties_go_to_the_lowest_index():
    score_LE = torch.zeros(2, 100, dtype=torch.float64)
    score_LE[1, [7, 60, 99]] = 1
    assert best(score_LE, 4) == [[0, 1, 2, 3], [7, 60, 99, 0]]


def test_losses_are_relative_squared_errors(tiny_base):
    base, batch = tiny_base("olmoe"), rows(12)
    record = losses(measure(base, [batch], 12))
    for row, site, x in zip(record, base.sites, brute.layer_inputs(base, batch), strict=True):
        full = float(brute.routed(base, site, x, brute.unit_sum).square().sum())
        assert row == pytest.approx([brute.subset_loss(base, site, x, [expert]) / full for expert in range(8)], rel=1e-5)


def test_settings_budget_by_device():
    assert SelectionSettings().criterion == "reconstruction"
    assert [SelectionSettings().budget(device) for device in ("cpu", "cuda")] == [4096, 262144]
    assert SelectionSettings(tokens=100).budget("cuda") == 100
    with pytest.raises(pydantic.ValidationError, match="greater than or equal to 1"):
        SelectionSettings(tokens=0)

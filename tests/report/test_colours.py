"""The eight colours of series can be told apart by eyes that lack a kind of cones, and from the paper."""

from __future__ import annotations

import itertools
import re
from importlib.resources import files

import numpy as np
import pytest

CSS = (files("fedgraft") / "assets" / "report" / "style.css").read_text(encoding="utf-8")
PALETTES = [re.findall(r"--s\d: (#[0-9a-f]{6})", line) for line in CSS.splitlines() if "--s0:" in line]
PAPERS = re.findall(r"--paper: (#[0-9a-f]{3,6})", CSS)
SEEING = {  # Machado, Oliveira and Fernandes 2009, table 1, severity 1.0; on linear RGB
    "all cones": np.eye(3),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
    "tritanopia": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]),
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])  # of sRGB, IEC 61966-2-1
WHITE = XYZ.sum(1)


def linear(colour):
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    values = np.array([int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIE L*a*b*, in which a distance of about 2.3 is just seen."""
    ratio = XYZ @ np.clip(rgb, 0, 1) / WHITE
    f = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_light_dark_and_print_have_eight_each():
    assert [len(palette) for palette in PALETTES] == [8, 8, 8]
    assert len(PAPERS) == 3


@pytest.mark.parametrize("eyes", SEEING)
@pytest.mark.parametrize("palette", PALETTES[:2], ids=["light", "dark"])
def test_any_two_are_six_just_seen_steps_apart(palette, eyes):
    seen = [lab(SEEING[eyes] @ linear(colour)) for colour in palette]
    assert min(np.linalg.norm(one - other) for one, other in itertools.combinations(seen, 2)) > 6 * 2.3


@pytest.mark.parametrize("at", range(3), ids=["light", "dark", "print"])
def test_graphics_stand_out_from_the_paper(at):
    """WCAG 2.1, 1.4.11: a contrast of 3 to 1."""
    paper = XYZ[1] @ linear(PAPERS[at])
    for colour in PALETTES[at]:
        darker, brighter = sorted((XYZ[1] @ linear(colour), paper))
        assert (brighter + 0.05) / (darker + 0.05) >= 3

"""Drawings: round ticks, gaps, thinning, and colours that can be read."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgraft.report import heat_map
from fedgraft.report.blocks import Grid
from fedgraft.report.figures import POINTS, Series, curves, element, ticks
from tests.report.parsed import parse

NOTHING = Grid(caption="c", columns=["x"], rows=[])


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0, 1, [0, 0.5, 1]),
        (0, 4, [0, 1, 2, 3, 4]),
        (2.9, 3.7, [2.8, 3.0, 3.2, 3.4, 3.6, 3.8]),
        (1, 200, [0, 50, 100, 150, 200]),
        (0, 0, [-0.5, 0, 0.5]),
        (5e-324, 5e-324, [-0.5, 0, 0.5]),
    ],
)
def test_ticks_are_round(low, high, wanted):
    assert ticks(low, high) == pytest.approx(wanted)


@given(st.floats(-1e9, 1e9), st.floats(0, 1e9))
def test_ticks_span_what_they_mark(low, width):
    marks = ticks(low, low + width)
    slack = 1e-6 * max(1e-9, marks[-1] - marks[0])
    assert marks[0] <= low + slack
    assert marks[-1] >= low + width - slack
    assert 2 <= len(marks) <= 12
    assert marks == sorted(set(marks))


def draw(points, **options):
    options = {"x_title": "round", "y_title": "loss", "x": (1, 3)} | options
    figure = curves("name", "title", "description", [Series(label="one", style="s0", points=points)], NOTHING, **options)
    return parse(figure.svg)


def line(root):
    return [node.attributes["d"] for node in root.all("path", class_="s0") if "line" in node.attributes["class"]]


def test_a_curve_goes_through_its_points():
    """Ticks 0 ... 4 span the frame: of 420 x 268, 54 to 406 across, 30 to 224 down."""
    assert line(draw([(1, 0.0), (2, 4.0), (3, 1.0)])) == ["M54.0 224.0L230.0 30.0L406.0 175.5"]


def test_a_gap_parts_a_curve_and_a_lone_point_is_marked():
    assert line(draw([(1, 0.0), (2, math.nan), (3, 4.0)])) == ["M54.0 224.0", "M406.0 30.0"]
    assert draw([(1, 2.0)]).all("path", class_="mark")
    assert not line(draw([(1, math.nan)]))


def test_long_curves_are_thinned():
    (path,) = line(draw([(at, at % 7) for at in range(1, 10 * POINTS + 1)], x=(1, 10 * POINTS)))
    assert path.count("L") < POINTS


def test_elements_escape_what_they_are_given():
    assert element("text", "tick", "<&>", x=1.25, name='"') == '<text class="tick" x="1.2" name="&quot;">&lt;&amp;&gt;</text>'


@pytest.mark.parametrize("level", [0.0, 0.1, 0.25, 0.4, 0.45, 0.5, 0.55, 0.6, 0.75, 1.0, 7.0, -1.0, math.nan])
def test_numbers_on_colours_can_be_read(level):
    """WCAG 2.2 asks 4.5 : 1 of text."""
    colour, black = heat_map._viridis(level)
    ground = heat_map.luminance(bytes.fromhex(colour))
    assert ((ground + 0.05) / 0.05 if black else 1.05 / (ground + 0.05)) >= 4.5


def test_luminance_is_that_of_the_standard():
    """White 1, black 0, pure green 0.7152, and 0.2159 for the middle grey 128."""
    known = {"ffffff": 1.0, "000000": 0.0, "00ff00": 0.7152, "808080": 0.2159}
    assert {colour: round(heat_map.luminance(bytes.fromhex(colour)), 4) for colour in known} == known

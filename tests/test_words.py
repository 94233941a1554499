from __future__ import annotations

from fedgraft import words


def test_numbers_have_three_digits_and_a_unit() -> None:
    assert [words.count(number) for number in (0, 9_999, 10_000, 9_437_184, 14_315_784_192)] == ["0", "9,999", "10 k", "9.44 M", "14.3 B"]
    assert [words.size(number) for number in (17, 999_600, 37_748_736, 28_631_568_384)] == ["17 B", "1 MB", "37.7 MB", "28.6 GB"]
    assert words.flops(1_660_944_384) == "1.66 GFLOP"
    assert words.percent(0.125) == "12.5 %"
    assert [words.duration(seconds) for seconds in (0.25, 35, 150, 3 * 3600, 36 * 3600, 5 * 86_400)] == [
        "0.2 s", "35 s", "2.5 min", "3 h", "36 h", "5 days",
    ]  # fmt: skip


def test_spans() -> None:
    assert words.spans([4]) == "4"
    assert words.spans(range(24)) == "0-23"
    assert words.spans([0, 1, 2, 4, 5, 6]) == "0-2, 4-6"
    assert words.spans(range(1, 24, 2)) == "1, 3, .., 23"
    assert words.spans([layer for layer in range(40) if layer % 4 != 3]) == "0-2, 4-6, 8-10, .., 36-38 (30)"


def test_lines_keep_numbers_with_their_units() -> None:
    lines = words.labelled("travels", "nine parameters, 37.7 MB each way", 34)
    assert lines == [("travels   ", "nine parameters, 37.7"[:-5].rstrip()), ("          ", "37.7 MB each way")]
    assert words.labelled("x", "", 80) == [("x         ", "")]

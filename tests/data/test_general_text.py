"""The two parts of the shipped general text."""

from collections import Counter

from fedgraft.data.example import read_rows
from fedgraft.data.general_text import FILE, calibration_texts, general_texts
from fedgraft.selection.settings import CPU_TOKENS


def test_no_document_is_in_both_parts():
    """So that what an expert was chosen by is never what knowledge is measured on."""
    whole = [row["text"] for _, row in read_rows(FILE)]
    measured, calibrated = general_texts(), calibration_texts()
    assert not set(measured) & set(calibrated)
    assert sorted([*measured, *calibrated]) == sorted(whole)


def test_every_source_but_the_news_is_in_both_parts():
    """Of those with more than one document; news, which comes first, is measured on alone."""
    source = {row["text"]: row["source"] for _, row in read_rows(FILE)}
    several = {name for name, number in Counter(source.values()).items() if number > 1}
    measured, calibrated = ({source[text] for text in texts} & several for texts in (general_texts(), calibration_texts()))
    assert measured == several
    assert calibrated == several - {"wikinews"}


def test_both_parts_are_long_enough_for_the_defaults():
    """Characters, of which a token has rarely more than 8."""
    assert sum(map(len, calibration_texts())) > 8 * CPU_TOKENS
    assert list(general_texts()[: len(general_texts()) // 2]) == [row["text"] for _, row in read_rows(FILE)][: len(general_texts()) // 2]

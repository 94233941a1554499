"""The two parts of the shipped general text."""

from fedgraft.data.example import read_rows
from fedgraft.data.general_text import FILE, calibration_texts, general_texts
from fedgraft.selection.settings import CPU_TOKENS


def test_no_document_is_in_both_parts():
    """So that what an expert was chosen by is never what knowledge is measured on."""
    whole = [row["text"] for _, row in read_rows(FILE)]
    measured, calibrated = general_texts(), calibration_texts()
    assert not set(measured) & set(calibrated)
    assert sorted([*measured, *calibrated]) == sorted(whole)


def test_both_parts_are_long_enough_for_the_defaults():
    """Characters, of which a token has rarely more than 8."""
    assert sum(map(len, calibration_texts())) > 8 * CPU_TOKENS
    assert list(general_texts()[: len(general_texts()) // 2]) == [row["text"] for _, row in read_rows(FILE)][: len(general_texts()) // 2]

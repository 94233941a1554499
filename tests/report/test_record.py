"""The record of a run, finished or not."""

from __future__ import annotations

import math

import pytest
import yaml

from fedgraft import files
from fedgraft.report.record import Record, read_document, summary, write_document, write_recipe


@pytest.mark.parametrize(("higher", "worst"), [(False, 4.0), (True, 1.0)])
def test_summary_is_mean_sample_deviation_and_the_worst_client(higher, worst):
    """Of 1, 3, 4: mean 8/3, squared deviations 25/9 + 1/9 + 16/9 = 14/3, over n - 1 = 2."""
    row = summary({"ada": 1.0, "ben": 3.0, "cleo": 4.0}, higher)
    assert row == {"mean": pytest.approx(8 / 3), "std": pytest.approx(math.sqrt(7 / 3)), "worst": worst}


def test_one_client_has_no_deviation():
    assert summary({"ada": 2.5}, True) == {"mean": 2.5, "std": 0.0, "worst": 2.5}


def test_a_run_that_has_only_begun_has_empty_parts(tmp_path):
    write_recipe(tmp_path / "recipe.yaml", {"method": {"name": "flex"}, "federation": {"rounds": 2}})
    record = Record.load(tmp_path)
    assert (record.environment, record.rounds, record.selection, record.results, record.digest) == ({}, [], {}, {}, "")
    assert record.method == "flex"
    assert not record.finished
    assert record.figures("personal", "loss") == {}


def test_results_count_only_for_the_rounds_of_the_recipe(tmp_path):
    write_recipe(tmp_path / "recipe.yaml", {"method": {"name": "flex"}, "federation": {"rounds": 2}})
    files.write_text(tmp_path / "digest.txt", "abc\n")
    for rounds, finished in ((1, False), (2, True)):
        write_document(tmp_path / "results.json", {"rounds": rounds, "clients": {"ada": {"base": {"loss": 1.0}, "personal": {}}}})
        record = Record.load(tmp_path)
        assert (record.finished, record.digest) == (finished, "abc" if finished else "")
    assert record.figures("base", "loss") == {"ada": 1.0}
    assert record.figures("personal", "loss") == record.figures("shared", "loss") == {}


def test_documents_carry_a_schema_and_survive(tmp_path):
    path = tmp_path / "x.json"
    write_document(path, {"name": "Åsa"})
    assert read_document(path) == {"schema": 1, "name": "Åsa"}
    assert read_document(tmp_path / "none.json") == {}
    write_recipe(tmp_path / "recipe.yaml", {"lr": 4e-5, "name": "Åsa"})
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text(encoding="utf-8")) == {"schema": 1, "lr": 4e-5, "name": "Åsa"}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": "new"}', "null"])
def test_damaged_documents_are_named(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json: damaged"):
        read_document(tmp_path / "x.json")

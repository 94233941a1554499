"""Many clients' rows: the same as read at once, in memory only where the clients are few."""

from __future__ import annotations

import json

import pytest

from fedgraft.data.clients import RESIDENT, Clients, check_rows
from fedgraft.data.example import read_rows
from fedgraft.data.partition import load_clients
from fedgraft.data.settings import DataSettings


@pytest.fixture
def settings_of(tmp_path):
    """Settings for a folder with a file of ten rows for each of so many clients."""

    def make(count):
        for number in range(count):
            rows = [{"instruction": f"{number} {row}", "response": "yes", "split": split(row)} for row in range(10)]
            (tmp_path / f"c{number:03}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return DataSettings(dataset="jsonl", partition="files", path=str(tmp_path))

    def split(row):
        return {8: "validation", 9: "test"}.get(row, "train")

    return make


@pytest.mark.parametrize("count", [2, RESIDENT + 1])
def test_rows_are_those_that_are_read_at_once(settings_of, count):
    settings = settings_of(count)
    clients, known = Clients(settings, 3), load_clients(settings, 3)
    assert list(clients.values()) == known
    assert list(clients) == [client.name for client in known]
    assert clients.outlines["c001"].rows == {"train": 8, "validation": 1, "test": 1}
    assert clients.outlines["c001"].categories == {"c001": 8}
    assert "c001" in clients
    assert "nobody" not in clients
    with pytest.raises(KeyError):
        clients["nobody"]


def test_only_few_clients_rows_are_kept(settings_of, tmp_path):
    """A file that is gone afterwards is missed only where there are many."""
    few, many = Clients(settings_of(RESIDENT), 0), Clients(settings_of(RESIDENT + 1), 0)
    (tmp_path / "c003.jsonl").unlink()
    assert len(few["c003"].train) == 8
    with pytest.raises(ValueError, match=r"c003\.jsonl"):
        many["c003"]
    assert len(many["c004"].train) == 8


def test_a_file_is_read_once_for_all_splits_whenever_it_is_its_turn(settings_of, monkeypatch):
    """Read again, so what reads it did not hold on to it."""
    many, read = Clients(settings_of(RESIDENT + 1), 0), []
    monkeypatch.setattr("fedgraft.data.datasets.jsonl.read_rows", lambda path: read.append(path.stem) or read_rows(path))
    for name in ("c003", "c004", "c003"):
        assert len(many[name].train) == 8
    assert read == ["c003", "c004", "c003"]


def test_rows_that_change_during_a_run_are_refused(settings_of, tmp_path):
    clients, path = Clients(settings_of(RESIDENT + 1), 0), tmp_path / "c003.jsonl"
    path.write_text(path.read_text().replace('"3 1"', '"3 one"'))
    with pytest.raises(ValueError, match="the data of client 'c003' have changed since"):
        clients["c003"]


def test_many_are_checked_as_few_are(settings_of, tmp_path):
    settings = settings_of(RESIDENT + 1)
    (tmp_path / "c007.jsonl").write_text(json.dumps({"instruction": "a", "response": "b", "split": "train"}))
    with pytest.raises(ValueError, match="client 'c007' has no validation rows"):
        Clients(settings, 0)
    with pytest.raises(ValueError, match=r"client 'c007' has no test rows to be evaluated on; raise data\.test_rows"):
        check_rows({"c001": {"test": 1}, "c007": {"test": 0}}, "test")

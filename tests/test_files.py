"""Atomic writes."""

from __future__ import annotations

import json
import os

import pytest

from fedgraft import files


def test_write_makes_the_folder_replaces_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "a" / "b.txt"
    files.write_text(path, "old")
    files.write_text(path, "später")
    assert path.read_bytes() == "später".encode()
    assert [entry.name for entry in path.parent.iterdir()] == ["b.txt"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_content(tmp_path, monkeypatch, failing):
    path = tmp_path / "state"
    files.write_bytes(path, b"old")

    def broken(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, broken)
    with pytest.raises(OSError, match="No space left"):
        files.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]


def test_content_is_on_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr(os, "replace", lambda old, new: (order.append("rename"), replace(old, new))[1])
    files.write_bytes(tmp_path / "x", b"1")
    assert order == ["fsync", "rename", "fsync"]  # the file, the rename, the folder


def test_json_keeps_every_character(tmp_path):
    files.write_json(tmp_path / "x.json", {"name": "Åsa", "value": [1, None]})
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"name": "Åsa", "value": [1, None]}
    assert "Åsa" in text
    assert text.endswith("\n")


def test_lines_are_appended_and_a_cut_last_one_is_not_read(tmp_path):
    path = tmp_path / "rounds.jsonl"
    assert files.read_lines(path) == []
    for number in range(3):
        files.append_line(path, {"round": number})
    path.write_bytes(path.read_bytes()[:-4])
    assert files.read_lines(path) == [{"round": 0}, {"round": 1}]

"""Atomic writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

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


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_names_its_file(tmp_path, monkeypatch, failing):
    def broken(*arguments):
        raise OSError(28, "No space left on device", "/somewhere/.aside.tmp")

    monkeypatch.setattr(os, failing, broken)
    with pytest.raises(OSError, match="No space left") as refused:
        files.write_bytes(tmp_path / "state", b"new")
    assert refused.value.filename == str(tmp_path / "state")


def test_lines_have_the_same_bytes_everywhere(tmp_path):
    files.append_line(tmp_path / "x.jsonl", {"name": "Åsa"})
    assert (tmp_path / "x.jsonl").read_bytes() == '{"name": "Åsa"}\n'.encode()


def test_a_character_cut_in_two_by_a_crash_is_not_read(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes('{"a": 1}\n{"a": "Å'.encode()[:-1])
    assert files.read_lines(path) == [{"a": 1}]


def test_text_is_utf8_with_or_without_a_mark_and_errors_name_the_line(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xef\xbb\xbfseed: 1\r\nx: 2\r\n")
    assert files.read_text(path) == "seed: 1\nx: 2\n"
    path.write_bytes(b"seed: 1\nx: \xff\n")
    with pytest.raises(ValueError, match=r"x.yaml, line 2: not UTF-8 \(byte 0xff\)"):
        files.read_text(path)


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on the size of files")
def test_a_line_that_does_not_fit_leaves_no_part_of_itself(tmp_path):
    """The limit stands for a full disk: a part is written, then the system refuses."""
    import resource

    path, line = tmp_path / "x.jsonl", {"text": "x" * 2000}
    files.append_line(path, line)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"x\.jsonl"):
            files.append_line(path, line)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    files.append_line(path, line)
    assert files.read_lines(path) == [line, line]


def test_one_process_at_a_time(tmp_path):
    with files.locked(tmp_path), pytest.raises(ValueError, match="another fedgraft is running"), files.locked(tmp_path):
        pass
    with files.locked(tmp_path):
        pass


def test_the_lock_of_a_killed_process_is_gone_with_it(tmp_path):
    code = (
        "import sys, os, pathlib; from fedgraft import files\nwith files.locked(pathlib.Path(sys.argv[1])): print(1, flush=True); input()"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.read(1)
        with pytest.raises(ValueError, match="another fedgraft is running"), files.locked(tmp_path):
            pass
        holder.kill()
        holder.wait()
        with files.locked(tmp_path):
            pass


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    out = tmp_path / "deep" / "out"

    def write(fail):
        with files.whole_folder(out) as aside:
            assert not out.exists()
            (aside / "inner").mkdir()
            (aside / "inner" / "x").write_text("1")
            if fail:
                raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        write(fail=True)
    assert list(out.parent.iterdir()) == []
    write(fail=False)
    assert (out / "inner" / "x").read_text() == "1"
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    with pytest.raises(ValueError, match="never overwritten"):
        write(fail=False)


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "out").mkdir()
    with files.whole_folder(tmp_path / "out") as aside:
        (aside / "x").write_text("1")
    assert (tmp_path / "out" / "x").is_file()

"""A name is a file."""

from __future__ import annotations

import pytest

from fedgraft import plugins


def test_names_are_the_files_of_the_folder(tmp_path, monkeypatch):
    package = tmp_path / "plugfolder"
    (package / "sub").mkdir(parents=True)
    for name in ("__init__", "beta", "alpha", "_helper", "method"):
        (package / f"{name}.py").write_text(f'"""About {name}.\n\nMore."""\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(plugins.FOLDERS, "toy", "plugfolder")
    assert plugins.names("toy") == ["alpha", "beta"]
    assert plugins.load("toy", "beta").__doc__.startswith("About beta.")
    assert plugins.describe("toy") == [{"name": name, "supported": True, "reason": f"About {name}."} for name in ("alpha", "beta")]
    with pytest.raises(ValueError, match=r"unknown toy 'bata' \(did you mean 'beta'\?\); there are: alpha, beta"):
        plugins.load("toy", "bata")


@pytest.mark.parametrize("kind", sorted(plugins.FOLDERS))
def test_every_shipped_plug_in_loads_and_says_what_it_is(kind):
    rows = plugins.describe(kind)
    assert [row["name"] for row in rows] == plugins.names(kind)
    assert all(row["reason"] for row in rows)


@pytest.mark.parametrize("name", ["method", "__init__", "os", "../fedavg", "fedavg.build", ""])
def test_nothing_outside_the_folder_can_be_loaded(name):
    with pytest.raises(ValueError, match=r"unknown method .* there are: .*fedavg"):
        plugins.load("method", name)


def test_nearest_says_nothing_about_strangers():
    assert plugins.nearest("zzz", ["fedavg"]) == ""
    assert plugins.nearest("fedavgm", ["fedavg"]) == " (did you mean 'fedavg'?)"

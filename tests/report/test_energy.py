"""Joules are differences of the counters that may be read; a counter that began anew loses nothing."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from fedgraft.report import energy


@pytest.fixture
def powercap(tmp_path, monkeypatch):
    """Two packages, the second of which wraps at 1,000 J; one part of a package; one that may not be read."""
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    for name, joules in (("intel-rapl:0", 5), ("intel-rapl:1", 990), ("intel-rapl:0:0", 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "max_energy_range_uj").write_text("1000000000\n")
        set_to(tmp_path, name, joules)
    (tmp_path / "intel-rapl:2").mkdir()
    return tmp_path


def set_to(folder, name, joules):
    (folder / name / "energy_uj").write_text(f"{joules * 1_000_000}\n")


def test_packages_are_summed_and_one_that_began_anew_goes_on(powercap):
    used = energy.Energy()
    set_to(powercap, "intel-rapl:0", 25)
    set_to(powercap, "intel-rapl:0:0", 900)
    set_to(powercap, "intel-rapl:1", 4)  # 10 J to its end and 4 from there
    assert used.facts() == {"energy_processors": 34.0}
    set_to(powercap, "intel-rapl:0", 26)
    assert used.facts() == {"energy_processors": 35.0}


def test_a_machine_that_tells_nothing_has_no_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "none")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy.Energy().facts() == {}


def test_cards_that_keep_a_counter_are_summed(tmp_path, monkeypatch):
    module, millijoules = ModuleType("pynvml"), {"a": 1000, "b": 2000}

    class NVMLError(Exception):
        pass

    def total(handle):
        if handle == "old":
            raise NVMLError
        return millijoules[handle]

    functions = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 3,
        nvmlDeviceGetHandleByIndex=["a", "old", "b"].__getitem__,
        nvmlDeviceGetTotalEnergyConsumption=total,
        NVMLError=NVMLError,
    )
    vars(module).update(vars(functions))
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "none")
    used = energy.Energy()
    millijoules["a"], millijoules["b"] = 4000, 2500
    assert used.facts() == {"energy_gpus": 3.5}

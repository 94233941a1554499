from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from fedgraft.account.forecast import forecast, probe_rate
from fedgraft.account.machine import Machine, look, troubles
from fedgraft.account.take import Account


def calm(**facts: object) -> Machine:
    settled = {"cores": 4, "threads": 4, "load": 0.5, "memory_free": 10**10, "disk_free": 10**11}
    return replace(look(Path("runs")), **settled | facts)  # type: ignore[arg-type]


def test_a_sound_machine_has_no_troubles() -> None:
    machine = calm()
    assert list(troubles(machine)) == []
    assert machine.packages["torch"] == torch.__version__
    assert machine.as_dict()["memory_total"] > 0


def test_each_trouble_has_a_remedy() -> None:
    def told(**facts: object) -> list[str]:
        return [f"{one.text}; {one.remedy}" for one in troubles(calm(**facts), requirements=["torch>=99", "peft>=0.1", "absent>=1"])][1:]

    (old,) = troubles(calm(), requirements=["torch>=99", "peft>=0.1", "absent>=1"])
    assert (old.text, old.remedy) == (f"torch {torch.__version__} is not one that fedgraft supports (>=99)", "pip install 'torch>=99'")
    assert told(threads=16)[0].startswith("torch uses 16 threads on 4 cores")
    assert told(memory_free=10**9)[0].startswith("only 1 GB of memory are free")
    assert told(disk_free=10**8)[0] == "only 100 MB of disk are free for runs/; free some, or give another disk with --out"
    assert "busy (load 9.0)" in told(load=9.0)[0]


def test_the_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert look(tmp_path / "a" / "b").disk_free > 0
    assert not (tmp_path / "a").exists()


def test_forecast_is_flops_by_rate(counted: object) -> None:
    account: Account = counted("olmoe-1b-7b-0924")  # type: ignore[operator]
    plan = forecast(account, 1e15, clients=8, per_round=4, rounds=10, tokens=1000, calibration=100)
    compute = account.compute
    assert plan.round == 4 * 1000 * (2 * compute.grafted + compute.adapters + compute.graft) / 0.5e15
    assert plan.selection == 8 * 100 * (compute.base + compute.selection) / 0.5e15
    twice = forecast(replace(account, passes=2), 1e15, clients=8, per_round=4, rounds=10, tokens=1000, calibration=100)
    assert (twice.round, twice.selection) == (2 * plan.round, plan.selection)
    assert plan.total == plan.selection + 10 * plan.round
    assert probe_rate(torch.device("cpu"), torch.float32) > 0

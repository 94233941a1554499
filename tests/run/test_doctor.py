"""`fedgraft doctor` and `fedgraft run --dry-run`, through the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from fedgraft import checkup
from fedgraft.report.record import Record
from tests.run.world import World

CONFIGS = Path(__file__).parents[1] / "account" / "configs"
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def known_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "probe_rate", lambda device, dtype: 1e11)


def test_the_machine_alone(command: Command) -> None:
    code, out, _ = command("doctor")
    assert code == 0
    assert re.search(r"versions +fedgraft \d", out)
    assert re.search(r"memory +[\d.]+ GB free of", out)


def test_a_model_from_its_configuration(command: Command) -> None:
    code, out, _ = command("doctor", CONFIGS / "deepseek-v3.json", "--set", "model.dtype=bfloat16")
    assert code == 0  # it does not fit here, and nobody said it should
    assert "deepseek_v3: 671 B parameters, 61 layers" in out
    assert "layers 0-2\n" in out
    assert "layers 3-60\n" in out
    assert "+kv_a[kv] 7168>576" in out
    assert "256 of 7168 > 2048, top 8" in out
    assert "base 1.34 TB in bfloat16" in out
    assert max(map(len, out.splitlines())) <= 100
    assert "warning    the base takes 1.34 TB in bfloat16" in out


def test_everything_as_json(command: Command) -> None:
    code, out, err = command("doctor", CONFIGS / "qwen1.5-moe-a2.7b.json", "--json", "--length", "1024", "--batch", "2")
    assert (code, err) == (0, "")
    found = json.loads(out)
    account = found["account"]
    assert account["bytes_up"] == account["bytes_down"] == {"fp32": 37_748_736, "bf16": 18_874_368}
    assert (account["work"]["length"], account["work"]["rows"]) == (1024, 2)
    (layers,) = account["layers"]
    assert (layers["shared"], layers["personal"]) == (9_437_184 // 24, 8_011_776 // 24)
    assert [linear["name"] for linear in layers["linears"] if linear["adapted"]] == ["q", "k", "v"]
    assert found["recipe"]["lora"]["rank"] == 32


def test_a_recipe(command: Command, world: World, tmp_path: Path) -> None:
    code, out, _ = command("doctor", world.write(tmp_path / "recipe.yaml"))
    assert code == 0
    assert "trained by flex" in out
    assert re.search(r"bakery +14 +3 +3", out)
    assert "3 rounds of" in out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.targets=[mixer]", "this model has no 'mixer' layer that can be adapted"),
        ("data.path=/nowhere", "'/nowhere'"),
        ("model.device=cuda:99", "model.device 'cuda:99': torch sees"),
        ("graft.per_layer=9", "graft.per_layer 9: there are only 8 experts to choose from; set graft.per_layer to at most 8"),
    ],
)
def test_what_would_fail_is_an_error_and_the_rest_is_still_said(
    command: Command, world: World, tmp_path: Path, override: str, message: str
) -> None:
    code, out, _ = command("doctor", world.write(tmp_path / "recipe.yaml"), "--set", override)
    flat = " ".join(out.split())
    assert code == 2
    assert message in flat
    assert flat.count("error ") == 1
    assert "qwen2_moe: " in flat


def test_a_base_that_does_not_fit_fails_a_recipe(command: Command, world: World, tmp_path: Path) -> None:
    recipe = world.write(tmp_path / "recipe.yaml", model={"name": str(CONFIGS / "deepseek-v3.json")})
    code, out, _ = command("doctor", recipe, "--json")
    errors = [finding for finding in json.loads(out)["findings"] if finding["severity"] == "error"]
    assert code == 2
    assert errors[-1]["text"].startswith("the base takes 2.68 TB in float32")
    assert errors[-1]["remedy"].startswith("set model.dtype: bfloat16")


def test_a_base_that_does_not_fit_can_be_chosen_from_layer_by_layer(command: Command, world: World, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("fedgraft.moe.memory._free", lambda device: 24 * 2**30)
    options = {"name": str(CONFIGS / "qwen1.5-moe-a2.7b.json"), "dtype": "bfloat16"}
    found = json.loads(command("doctor", world.write(tmp_path / "recipe.yaml", model=options), "--json")[1])
    outside = 2 * (151_936 * 2048 + 2048)
    layer = 2 * (60 * 3 * 2048 * 1408 + 3 * 2048 * 5632 + 4 * 2048**2 + 3 * 2048 + 60 * 2048 + 2 * 2048 + 2048)
    assert found["selecting"] == outside + 3 * layer  # 4.2 GB of 28.6
    severities = {finding["severity"]: finding for finding in found["findings"]}
    assert severities["error"]["text"].startswith("the base takes 28.6 GB")
    assert severities["note"]["remedy"].startswith("fedgraft select chooses for all clients")
    assert "fedgraft select" not in command("doctor", world.write(tmp_path / "recipe.yaml"))[1]


def test_quantised_experts_take_half_the_memory(command: Command) -> None:
    def weights(*words: str) -> int:
        found = json.loads(command("doctor", CONFIGS / "olmoe-1b-7b-0924.json", "--json", "--set", "model.dtype=bfloat16", *words)[1])
        return int(found["account"]["memory"]["weights"])

    experts = 16 * 64 * 3 * 2048 * 1024
    saved = weights() - weights("--set", "model.quantise=int8", "--set", "model.experts=eager")
    assert saved == pytest.approx(experts, rel=0.01)  # 2 bytes become 1, with a scale a row


def test_cut_rows_are_warned_of(command: Command, world: World, tmp_path: Path) -> None:
    code, out, _ = command("doctor", world.write(tmp_path / "recipe.yaml"), "--length", "48")
    assert code == 0
    assert re.search(r"warning +training rows longer than data.max_length 48 are cut, many here: bakery \d+ of 14", out)


def test_an_unknown_target(command: Command) -> None:
    code, out, _ = command("doctor", "/no/such/model")
    assert code == 2
    assert "no such folder" in out


def test_dry_run_goes_to_the_first_step_and_writes_nothing(command: Command, world: World, tmp_path: Path) -> None:
    recipe, out_folder = world.write(tmp_path / "recipe.yaml"), tmp_path / "new" / "run"
    code, out, err = command("run", recipe, "--out", out_folder, "--set", "data.max_length=48", "--dry-run")
    assert code == 0
    assert re.search(r"^rows: 42 training rows of 3 clients, [1-9]\d* cut to data.max_length$", out, re.MULTILINE)
    assert re.search(r"^first batch: client bakery, loss \d", out, re.MULTILINE)
    assert f"ready: start with `fedgraft run {recipe} --out {out_folder} --set data.max_length=48`" in out
    assert "travels    " in err
    assert sorted(tmp_path.iterdir()) == [recipe]


def test_dry_run_fails_where_the_run_would(command: Command, world: World, tmp_path: Path) -> None:
    recipe, occupied = world.write(tmp_path / "recipe.yaml"), tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "file").touch()
    code, _, err = command("run", recipe, "--dry-run", "--out", occupied)
    assert (code, "exists and is never overwritten" in err) == (2, True)
    code, _, err = command("run", recipe, "--dry-run", "--out", recipe / "below")
    assert (code, "is a file; choose another --out" in err) == (2, True)
    code, _, err = command("run", recipe, "--dry-run", "--set", "lora.targets=[mixer]")
    assert (code, "no 'mixer' layer" in err) == (2, True)


def test_the_screen_before_training_says_what_the_run_sends(finished: Record, command: Command, world: World, tmp_path: Path) -> None:
    code, out, _ = command("doctor", world.write(tmp_path / "recipe.yaml"), "--json")
    account = json.loads(out)["account"]
    assert code == 0
    for line in finished.rounds:
        clients = len(line["clients"])
        for direction in ("bytes_up", "bytes_down"):
            header = line[direction] / clients - account[direction]["fp32"]
            assert 0 < header < 4096

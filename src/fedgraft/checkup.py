"""What the doctor looks at: this machine, and on wish a model or a whole recipe; nothing is loaded but configurations and rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fedgraft.account.finding import Finding
from fedgraft.account.forecast import Forecast, forecast, probe_rate
from fedgraft.account.layers import Layer, alike, layers_of
from fedgraft.account.machine import Machine, look, troubles
from fedgraft.account.memory import workload
from fedgraft.account.remarks import remarks
from fedgraft.account.rows import Rows, look_at_rows, response_share
from fedgraft.account.take import Account, take_account
from fedgraft.data.partition import load_clients
from fedgraft.methods.method import settled
from fedgraft.moe.family import Anatomy
from fedgraft.moe.memory import layered_bytes, needed_by, room_for
from fedgraft.moe.skeleton import is_local, skeleton
from fedgraft.moe.tokenizer import load_tokenizer
from fedgraft.recipe import Recipe, load_recipe, shipped_names
from fedgraft.words import size

RECIPE_FILES = (".yaml", ".yml")
CUT_SHARE = 0.2
"""Share of rows cut from which on it is worth a warning."""


@dataclass(kw_only=True)
class Checkup:
    """What was found."""

    target: str | None
    recipe: Recipe | None
    """What would be run; for a model, the defaults on it."""
    machine: Machine
    model_type: str = ""
    parameters: int = 0
    layers: list[Layer] = field(default_factory=list)
    """Like layers together, also where there is no account because the recipe does not fit the model."""
    account: Account | None = None
    selecting: int = 0
    """Bytes of the weights in memory while `fedgraft select` chooses experts; 0 where there are none to choose."""
    rows: list[Rows] = field(default_factory=list)
    forecast: Forecast | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def failing(self) -> bool:
        """Whether a run would fail."""
        return any(finding.severity == "error" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "target": self.target,
            "machine": self.machine.as_dict(),
            "recipe": self.recipe.complete() if self.recipe else None,
            "model_type": self.model_type,
            "parameters": self.parameters,
            "layers": [asdict(layer) for layer in self.layers],
            "account": self.account.as_dict() if self.account else None,
            "selecting": self.selecting,
            "rows": [vars(one) for one in self.rows],
            "forecast": {**vars(self.forecast), "total": self.forecast.total} if self.forecast else None,
            "findings": [finding.as_dict() for finding in self.findings],
        }


def check_up(target: str | None = None, overrides: list[str] | None = None, folder: Path = Path("runs")) -> Checkup:
    """Look at the machine, and at a recipe (file or shipped name) or a model (hub name, folder, config.json).

    What would make a run fail is a finding, not an exception; a model is weighed against the machine without judging it, because nothing
    says that it would run here.

    Raises:
        ValueError: a recipe or override that cannot be read.
    """
    recipe = None
    if target is not None or overrides:
        recipe = load_recipe(target if _is_recipe(target) else {"model": {"name": target}}, overrides)
        if recipe.model.threads:
            torch.set_num_threads(recipe.model.threads)
    machine = look(folder)
    result = Checkup(target=target, recipe=recipe, machine=machine, findings=list(troubles(machine)))
    if recipe is not None:
        with _noting(result):
            recipe.model.check(local=is_local(recipe.model))
        with _noting(result):
            anatomy = skeleton(recipe.model)
            if _is_recipe(target):
                with _noting(result):
                    result.rows = _rows(recipe)
            _examine(result, recipe, anatomy)
        with _noting(result):
            _weigh(result, recipe, must_fit=_is_recipe(target))
    return result


def _is_recipe(target: str | None) -> bool:
    return target is None or Path(target).suffix in RECIPE_FILES or str(target) in shipped_names()


@contextmanager
def _noting(result: Checkup) -> Iterator[None]:
    """A mistake of the user becomes an error among the findings, so that the rest is still looked at."""
    try:
        yield
    except (ValueError, OSError) as error:
        found = Finding(severity="error", text=str(error))
        if found not in result.findings:  # what several steps stumble over is said once
            result.findings.append(found)


def _rows(recipe: Recipe) -> list[Rows]:
    tokenizer = None if Path(recipe.model.name).is_file() else load_tokenizer(recipe.model.name)
    return [
        look_at_rows(client, recipe.data, tokenizer, batch=recipe.training.batch_size) for client in load_clients(recipe.data, recipe.seed)
    ]


def _examine(result: Checkup, recipe: Recipe, anatomy: Anatomy) -> None:
    result.model_type = str(anatomy.model.config.model_type)
    result.parameters = sum(parameter.numel() for parameter in anatomy.model.parameters())
    result.layers = alike(layers_of(anatomy, (), {}, {}))
    method = settled(recipe.build_method(), anatomy, recipe.lora, [rows.client for rows in result.rows])
    result.selecting = layered_bytes(anatomy) if "side" in method.places else 0
    share = response_share(result.rows)
    work = workload(recipe.training, length=recipe.data.max_length, dtype=recipe.model.dtype, predicting=share)
    account = take_account(anatomy, method, recipe.lora, recipe.graft, work)
    weights = needed_by(anatomy, recipe.model.quantise).weights
    result.account = replace(account, memory=replace(account.memory, weights=weights))
    result.layers = result.account.layers
    result.findings += remarks(anatomy, result.layers, method, recipe.lora, recipe.graft)
    device = recipe.model.target()
    rate = probe_rate(device, torch.bfloat16 if recipe.training.precision == "bf16" else getattr(torch, recipe.model.dtype))
    clients = len(result.rows) or recipe.data.clients
    seen = [one for one in result.rows if one.seen]
    padded = sum(one.padded for one in seen) / len(seen) if seen else recipe.data.max_length
    result.forecast = forecast(
        result.account,
        rate,
        clients=clients,
        per_round=min(recipe.federation.clients_per_round or clients, clients),
        rounds=recipe.federation.rounds,
        tokens=recipe.training.steps * recipe.training.batch_size * padded,
        calibration=recipe.selection.budget(device.type) if "side" in method.places else 0,
    )


def _weigh(result: Checkup, recipe: Recipe, *, must_fit: bool) -> None:
    """Findings on memory and on rows that were cut."""
    if result.account is not None:
        room, memory = room_for(recipe.model), result.account.memory
        there = f"{size(room.total)} are free ({', '.join(room.free)})"
        if memory.weights > room.total and not room.unlimited:
            text = f"the base takes {size(memory.weights)} in {recipe.model.dtype}, {there}"
            half = "set model.dtype: bfloat16, or " if recipe.model.dtype == "float32" else ""
            remedy = f"{half}take a smaller model or a larger machine"
            result.findings.append(Finding(severity="error" if must_fit else "warning", text=text, remedy=remedy))
        elif memory.total > room.total and not room.unlimited:
            text = f"training needs about {size(memory.total)}, {there}"
            remedy = "raise training.accumulation, set training.checkpointing: true, or lower data.max_length"
            result.findings.append(Finding(severity="warning", text=text, remedy=remedy))
        if memory.weights > room.total >= result.selecting > 0:
            text = f"choosing experts needs no more than {size(result.selecting)} of the base at once and reads each weight once"
            remedy = "fedgraft select chooses for all clients; a run that trains elsewhere, or quantised, takes its file (selection.file)"
            result.findings.append(Finding(severity="note", text=text, remedy=remedy))
    cut = [one for one in result.rows if one.seen and one.cut / one.seen >= CUT_SHARE]
    if cut:
        listed = ", ".join(f"{one.client} {one.cut} of {one.seen}" for one in cut)
        text = f"training rows longer than data.max_length {recipe.data.max_length} are cut, many here: {listed}"
        result.findings.append(Finding(severity="warning", text=text, remedy="raise data.max_length if memory allows"))

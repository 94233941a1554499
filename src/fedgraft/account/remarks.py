"""What must be said aloud of a model and the adapters on it: what is adapted together, what is left out, what cannot be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from fedgraft.account.finding import Finding
from fedgraft.account.layers import Layer
from fedgraft.grafts.lora import LoraSettings
from fedgraft.grafts.side_expert import GraftSettings
from fedgraft.methods.method import Method
from fedgraft.moe.family import Anatomy
from fedgraft.words import spans


def remarks(anatomy: Anatomy, layers: Sequence[Layer], method: Method, lora: LoraSettings, graft: GraftSettings) -> list[Finding]:
    """Findings on the layers (like ones together), the LoRA targets and the graft."""
    found = []
    if "adapters" in method.places:
        found += list(_on_adapters(layers, lora))
    if "side" in method.places:
        found += list(_on_graft(anatomy, layers, graft))
    return found


def _on_adapters(layers: Sequence[Layer], lora: LoraSettings) -> Iterator[Finding]:
    targets = ", ".join(lora.targets)
    for numbers, names in _grouped(layers, lambda layer: _mixers(layer, adapted=False)):
        text = f"{numbers}: linear attention, state space or convolution ({names}) is not adapted by lora.targets {targets}"
        yield Finding(severity="note", text=text, remedy="add mixer to lora.targets to adapt it")
    for numbers, names in _grouped(layers, lambda layer: _mixers(layer, adapted=True)):
        yield Finding(severity="note", text=f"{numbers}: linear attention, state space or convolution ({names}) is adapted too")
    for numbers, names in _grouped(
        layers, lambda layer: [linear.name for linear in layer.at("attention") if set("qkv") <= {*linear.roles}]
    ):
        yield Finding(severity="note", text=f"{numbers}: q, k and v are one fused projection ({names}), adapted as a whole")
    for numbers, names in _grouped(layers, lambda layer: [one.name for one in layer.at("attention") if one.roles == "kv"]):
        text = f"{numbers}: k and v come from the same projection{'s' * (',' in names)} ({names}), adapted once either is named"
        yield Finding(severity="note", text=text)
    for numbers, names in _grouped(layers, _low_rank_queries):
        yield Finding(severity="note", text=f"{numbers}: q is low-rank itself ({names}); each factor has its own pair")
    for numbers, names in _grouped(layers, lambda layer: list(layer.unreachable)):
        yield Finding(severity="note", text=f"{numbers}: {names} is no plain linear map and cannot be adapted")
    for numbers, names in _grouped(layers, _untouched):
        yield Finding(severity="note", text=f"{numbers}: its attention ({names}) is not adapted by lora.targets {targets}")


def _on_graft(anatomy: Anatomy, layers: Sequence[Layer], graft: GraftSettings) -> Iterator[Finding]:
    for numbers, _ in _grouped(layers, lambda layer: [] if layer.experts else ["dense"]):
        yield Finding(severity="note", text=f"{numbers}: no routed experts, so nothing is grafted there")
    fewest = min(site.num_experts for site in anatomy.sites)
    if graft.per_layer > fewest:
        text = f"graft.per_layer {graft.per_layer}: there are only {fewest} experts to choose from"
        yield Finding(severity="error", text=text, remedy=f"set graft.per_layer to at most {fewest}")
    if any(site.identity for site in anatomy.sites):
        yield Finding(
            severity="note", text="the router also chooses zero-computation experts; they are never grafted, and FLOPs are upper bounds"
        )
    if graft.has_gate and graft.gate_start == "router_row":
        try:
            anatomy.family.router_row(anatomy.sites[0], 0)
        except ValueError as error:
            text, _, _ = str(error).partition("; ")
            yield Finding(severity="error", text=text, remedy="set graft.gate_start: low")


def _mixers(layer: Layer, *, adapted: bool) -> list[str]:
    return [linear.name for linear in layer.at("mixer") if linear.adapted == adapted]


def _untouched(layer: Layer) -> list[str]:
    attention = layer.at("attention")
    return [] if any(linear.adapted for linear in attention) else [linear.name for linear in attention]


def _low_rank_queries(layer: Layer) -> list[str]:
    queries = [linear.name for linear in layer.at("attention") if linear.roles == "q"]
    return queries if len(queries) > 1 else []


def _grouped(layers: Sequence[Layer], names_in: Callable[[Layer], list[str]]) -> Iterator[tuple[str, str]]:
    """(`layers 0-3`, names) for every different list of names that is not empty."""
    groups: dict[str, list[int]] = {}
    for layer in layers:
        if names := names_in(layer):
            groups.setdefault(", ".join(names), []).extend(layer.numbers)
    for listed, numbers in groups.items():
        yield f"layer{'s' * (len(numbers) > 1)} {spans(sorted(numbers))}", listed

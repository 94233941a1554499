"""The doctor's findings in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from fedgraft.cli.frame import console, escape

if TYPE_CHECKING:
    from fedgraft.account.finding import Finding
    from fedgraft.account.layers import Layer, Linear
    from fedgraft.account.machine import Machine
    from fedgraft.account.rows import Rows
    from fedgraft.account.take import Account
    from fedgraft.checkup import Checkup

Line = tuple[str, str]
STYLES = {"note": "cyan", "warning": "yellow", "error": "bold red"}


def print_checkup(found: Checkup) -> None:
    """Machine; model by layer; what trains, travels and stays; cost; data; findings."""
    _print_block("this machine", machine_lines(found.machine))
    if found.layers:
        _print_layers(found)
    if found.account is not None:
        account = found.account
        from fedgraft.account.take import summary

        name = found.recipe.method.name if found.recipe else ""
        _print_block(f"trained by {name}", summary(account))
        _print_block(f"cost at {account.work.length} tokens a row", [*compute_lines(account), *memory_lines(account), *time_lines(found)])
    if found.rows:
        _print_rows(found.rows)
    _print_findings(found.findings)


def machine_lines(machine: Machine) -> Iterator[Line]:
    """The facts, (label, text) a line."""
    from fedgraft.words import size

    yield "versions", f"fedgraft {machine.fedgraft}, Python {machine.python}, {machine.system}"
    yield "", ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    omp = f", OMP_NUM_THREADS={machine.omp_threads}" if machine.omp_threads else ""
    yield "processor", f"{machine.cores} cores, {machine.threads} torch thread{'s' * (machine.threads != 1)}{omp}, load {machine.load:.1f}"
    yield "memory", f"{size(machine.memory_free)} free of {size(machine.memory_total)}; disk for runs/ {size(machine.disk_free)} free"
    gpus = [f"{gpu['name']}, {size(gpu['free'])} free of {size(gpu['memory'])}" for gpu in machine.gpus]
    yield "GPUs", "; ".join(gpus) or "none that torch sees"
    there = [extra for extra, installed in machine.extras.items() if installed]
    absent = [extra for extra, installed in machine.extras.items() if not installed]
    browser = f"; browser {machine.browser}" if machine.browser else ""
    yield "extras", f"{', '.join(there) or 'none'} (not installed: {', '.join(absent) or 'none'}){browser}"


def compute_lines(account: Account) -> Iterator[Line]:
    """FLOPs per token."""
    from fedgraft.words import flops, percent

    compute = account.compute
    yield "forward", f"{flops(compute.base)} a token; {flops(compute.grafted)} with adapters and graft"
    parts = {"routed": compute.routed, "shared": compute.shared, "other": compute.other, "scores": compute.scores, "head": compute.head}
    yield "", ", ".join(f"{name} {flops(value)}" for name, value in parts.items() if value)
    if account.grafts:
        routed, active = map(percent, compute.experts_per_graft)
        yield "graft", f"+{routed} of the routed, +{active} of the routed and shared expert compute"
        yield "selection", f"{flops(compute.selection)} a calibration token on top of a forward"


def memory_lines(account: Account) -> Iterator[Line]:
    """Bytes while training."""
    from fedgraft.words import size

    memory, work = account.memory, account.work
    parts = {
        "trained leaves and optimiser": memory.leaves,
        "activations": memory.activations,
        "logits": memory.logits,
        "casts": memory.casts,
    }
    kind = "checkpointed" if work.checkpointing else "not checkpointed"
    yield "memory", f"about {size(memory.total)}: base {size(memory.weights)} in {work.dtype}, training {size(memory.training)}"
    yield "", f"{', '.join(f'{name} {size(value)}' for name, value in parts.items() if value)} ({work.rows} rows, {kind})"


def time_lines(found: Checkup) -> Iterator[Line]:
    """Seconds to expect."""
    from fedgraft.words import duration, flops

    plan = found.forecast
    if plan is None:
        return
    selection = f"selection {duration(plan.selection)}, " if plan.selection else ""
    yield "time", f"about {duration(plan.total)} before evaluation: {selection}{plan.rounds} rounds of {duration(plan.round)}"
    yield "", f"an order of magnitude, from a matrix product's {flops(plan.rate)}/s here just now"


def layer_lines(layer: Layer) -> Iterator[Line]:
    """What is what in a layer, (part, text) a line; adapted linear layers carry a plus."""
    from fedgraft.words import count

    kind = layer.kind.replace("_", " ") + (f" over {layer.window:,}" if layer.window else "")
    prefix = f"{kind}: " if kind else ""
    for place in ("attention", "mixer"):
        if linears := layer.at(place):
            yield place, prefix + "  ".join(map(_linear, linears))
    if layer.experts is not None:
        experts = layer.experts
        yield "experts", f"{experts.number} of {experts.inputs} > {experts.width}, top {experts.top_k}"
    for place, label in (("shared", "shared"), ("linear", "other")):
        if linears := layer.at(place):
            yield label, "  ".join(map(_linear, linears))
    if layer.unreachable:
        yield "closed", "  ".join(layer.unreachable)
    if layer.shared or layer.personal:
        each = " a layer" if len(layer.numbers) > 1 else ""
        yield "trained", f"{count(layer.shared)} parameters travel, {count(layer.personal)} stay{each}"


def _linear(linear: Linear) -> str:
    roles = f"[{linear.roles}]" if linear.roles not in {"", linear.name} else ""
    return f"{'+' if linear.adapted else ''}{linear.name}{roles} {linear.inputs}>{linear.outputs}"


def _print_layers(found: Checkup) -> None:
    from fedgraft.words import count, spans

    number = sum(len(layer.numbers) for layer in found.layers)
    _print_title(f"{found.model_type}: {count(found.parameters)} parameters, {number} layers; inputs > outputs, + adapted")
    for layer in found.layers:
        plural = "s" * (len(layer.numbers) > 1)
        console().print(f"layer{plural} {spans(layer.numbers)}", style="bold", highlight=False)
        _print_lines((f"  {part}", text) for part, text in layer_lines(layer))


def _print_rows(rows: Sequence[Rows]) -> None:
    from rich.table import Table

    table = Table("client", box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("train", "validation", "test", "tokens", "longest", "cut"):
        table.add_column(name, justify="right")
    for one in rows:
        figures = [f"{one.tokens:.0f}", f"{one.longest}", f"{one.cut} of {one.seen}"] if one.seen else ["-", "-", "-"]
        table.add_row(one.client, f"{one.train:,}", f"{one.validation:,}", f"{one.test:,}", *figures)
    _print_title("clients")
    console().print(table, highlight=False)


def _print_findings(findings: Sequence[Finding]) -> None:
    _print_title("findings" if findings else "nothing stands in the way")
    for finding in sorted(findings, key=lambda finding: list(STYLES).index(finding.severity)):
        text = finding.text + (f"; {finding.remedy}" if finding.remedy else "")
        _print_lines([(finding.severity, text)], STYLES[finding.severity])


def _print_block(title: str, lines: Iterable[Line]) -> None:
    _print_title(title)
    _print_lines(lines)


def _print_lines(lines: Iterable[Line], style: str = "bold") -> None:
    from fedgraft.words import labelled

    terminal = console()
    for line in lines:
        for label, text in labelled(*line, terminal.width):
            terminal.print(f"[{style}]{label}[/] {escape(text)}", highlight=False, soft_wrap=True)


def _print_title(text: str) -> None:
    console().print(f"\n{text}", style="bold cyan", highlight=False, markup=False, soft_wrap=True)

"""docs/scaling.md: what a round costs at full size and with many clients, from shapes and from what was measured.

    python -m tools.scaling

Sizes and FLOPs are counted from the public configurations in tests/account/configs, without weights. What a coordinator takes for each
byte is read from benchmarks/results.json. Nothing here was run at full size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedgraft import files
from fedgraft.account.memory import Workload
from fedgraft.account.take import Account, take_account
from fedgraft.grafts.lora import LoraSettings
from fedgraft.grafts.side_expert import GraftSettings
from fedgraft.methods.flex import build
from fedgraft.moe.settings import ModelSettings
from fedgraft.moe.skeleton import skeleton
from fedgraft.words import count, duration, flops, size

ROOT = Path(__file__).parents[1]
MODELS = {"Qwen1.5-MoE-A2.7B": "qwen1.5-moe-a2.7b", "Qwen3-30B-A3B": "qwen3-30b-a3b", "DeepSeek-V3": "deepseek-v3"}
RANK, ROWS, LENGTH, STEPS = 32, 4, 512, 10
CLIENTS = (10, 1_000, 1_000_000)
SHARES = (1.0, 0.1, 0.001)
FULL_RATE = 40e12
"""FLOPs per second that a site's GPU is supposed to reach: a twenty-fifth of an H100's dense bfloat16 peak; a guess, no measurement."""
LINK = 12.5e6
"""Bytes per second of a site's connection, up and down: 100 Mbit/s."""
TRAINING = 3
"""Forwards' work of a training step with checkpointing: forward, forward again, and gradients of activations; weights are frozen."""


def account_of(config: str) -> Account:
    """FLEx with LoRA grafts on a base in bfloat16."""
    anatomy = skeleton(ModelSettings(name=str(ROOT / "tests" / "account" / "configs" / f"{config}.json"), dtype="bfloat16"))
    work = Workload(length=LENGTH, rows=ROWS, dtype="bfloat16", precision="bf16", checkpointing=True)
    return take_account(anatomy, build(), LoraSettings(rank=RANK), GraftSettings(), work)


def coordinator_rate() -> float:
    """Bytes per second that went through a coordinator, each way counted: the growth from 2 to 8 sites of 100 MB each, over Flower."""
    measured = {entry["name"]: entry for entry in json.loads((ROOT / "benchmarks" / "results.json").read_text(encoding="utf-8"))}
    few, many = (measured[f"flower_memory_{sites}"]["figures"]["seconds"] for sites in (2, 8))
    return 2 * 6 * 100e6 / (many - few)


def site_rows(account: Account) -> list[tuple[str, str]]:
    """What one site has to bear, by name."""
    tokens = STEPS * ROWS * LENGTH
    work = TRAINING * tokens * account.compute.grafted
    up = account.bytes_up()
    return [
        ("parameters, frozen", count(account.parameters)),
        ("trained by a site", f"{count(account.trained)} ({100 * account.trained / account.parameters:.3f} %)"),
        ("shared, sent up in a round (fp32 / int8)", f"{size(up)} / {size(up / 4)}"),
        ("private, on the site's disk (fp32)", size(4 * account.personal.total)),
        ("the same private expert in full, were it sent (bf16)", size(2 * account.frozen_graft)),
        ("memory of a site that trains (bf16 base, checkpointing)", size(account.memory.total)),
        ("forward, FLOPs a token with graft", flops(account.compute.grafted)),
        (f"a round's training, {tokens:,} tokens", f"{work / 1e12:,.0f} TFLOP, {duration(work / FULL_RATE)}"),
        ("a round's transfer, up and down", duration((up + account.bytes_down()) / LINK)),
    ]


def coordinator_rows(accounts: dict[str, Account], rate: float) -> list[list[str]]:
    """Seconds of one coordinator and bytes through it, by federation and share of clients in a round."""
    rows = []
    for clients in CLIENTS:
        for share in SHARES:
            asked = round(clients * share)
            if asked < 1:
                continue
            each = [asked * (account.bytes_up() + account.bytes_down()) for account in accounts.values()]
            rows.append([f"{clients:,}", f"{asked:,}", *(f"{size(total)}, {duration(total / rate)}" for total in each)])
    return rows


def table(head: list[str], rows: list[Any]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def page() -> str:
    """The whole page."""
    accounts, rate = {name: account_of(config) for name, config in MODELS.items()}, coordinator_rate()
    sites = [site_rows(account) for account in accounts.values()]
    labels = [label for label, _ in sites[0]]
    by_label = [[label, *(dict(rows)[label] for rows in sites)] for label in labels]
    first = next(iter(accounts.values()))
    return TEXT.format(
        rank=RANK,
        rows=ROWS,
        length=LENGTH,
        steps=STEPS,
        sites=table(["a site", *accounts], by_label),
        coordinator=table(["clients", "asked in a round", *accounts], coordinator_rows(accounts, rate)),
        rate=size(rate),
        full_rate=f"{FULL_RATE / 1e12:.0f}",
        link=f"{8 * LINK / 1e6:.0f}",
        state=size(2 * 8 * first.shared.total),
        first_name=next(iter(accounts)),
    )


TEXT = """# Growth, on paper

Written by `python -m tools.scaling`. Sizes and FLOPs are counted from public configurations, as `fedgraft doctor` counts them; **nothing
on this page was run at full size**. FLEx with LoRA of rank {rank} on q, k, v, one grafted expert per MoE layer with LoRA of the same
rank, base in bfloat16, {steps} steps of {rows} x {length} tokens a round.

## A site

{sites}

Time of training supposes {full_rate} TFLOP/s (a guess of a twenty-fifth of an H100's dense bfloat16 peak) and three forwards' work a
token; time of transfer a line of {link} Mbit/s both ways. So the *site* is limited by memory for the frozen base long before anything
else: what it trains is about a thousandth of that or less. Its ways out are `model.quantise`, `model.max_memory` (layers offloaded to
memory or disk) and gradient checkpointing. One base in memory serves every client of a process, so clients of one site cost their leaves
and nothing more.

## The coordinator

It holds the state and the sum in hand (float64, {state} for {first_name}) whatever the number of clients, because linear merges fold
replies as they come; merges that need each reply (median, trimmed mean, Krum, stacked LoRA) hold all of a round. What passes through it:

{coordinator}

Seconds are bytes over {rate}/s, which is what one coordinator passed on two shared CPU cores, its sites on the same machine, over TLS
(`flower_memory_2` to `flower_memory_8` of [benchmarks](benchmarks.md)): an upper bound of the coordinator's own work, its network apart.

## Where it ends

| clients | the limit | what the design does |
|---|---|---|
| 10 | the sites: memory for the base, and the slowest of them | quantised or offloaded bases; a deadline for each question; unequal work |
| 1,000 | the coordinator's network, if all are asked | `federation.clients_per_round`; `compression`; experts cost nothing here |
| 1,000,000 | one coordinator, even if a thousandth is asked | a round costs what those cost who are asked; tiers are **not built** |

`compression.name: int8` sends a quarter of the bytes up, with error feedback. Tiers (coordinators that report to a coordinator) would fit
linear merges, which are sums with weights. A SuperNode looks for work every few seconds, so a million of them are a load by themselves;
that was not tried.

Personal experts never leave the sites, so their number and size appear in no row of the coordinator. Files of a client lie on its own
site: two generations of one memory.
"""


if __name__ == "__main__":
    files.write_text(ROOT / "docs" / "scaling.md", page())

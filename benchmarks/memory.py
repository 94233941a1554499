"""Peak memory of runs with many clients, against one with 4 and against the plain PyTorch loop; each in a process of its own.

`memory200` trains 4 clients in each of 2 rounds, `memory200_all` every client in one round, against the same with 4 clients. `memory4` and
`memory400` are a round of so many clients against the plain loop: each client's file is read and its rows are made batches when it is its
turn, its leaves train in the same model with AdamW, personal leaves stay in memory, shared ones are summed as they come. The loop chooses
no experts, evaluates nothing and writes nothing; our side does all of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import results
from many_clients import Contestant, Figures, Plan, add_child, apart, be_child, peak, recipe_of, whole_run

FEW, MANY = 4, 200
VARIANTS = {"memory200": Plan(rounds=2, asked=4, steps=4), "memory200_all": Plan()}
AGAINST_THE_LOOP = (4, 400)


def plain_loop(data: Path, plan: Plan) -> Figures:
    """The loop that one writes without a framework: `peak_MiB`."""
    import torch
    from torch import nn

    from fedgraft.data.batches import collate, encode
    from fedgraft.data.datasets import jsonl
    from fedgraft.grafts.graft import GraftedModel
    from fedgraft.moe.load import load_base
    from fedgraft.recipe import check_values

    torch.set_num_threads(1)
    recipe = check_values(recipe_of(data, plan), "the recipe")
    base = load_base(recipe.model)
    assert recipe.graft is not None
    model = GraftedModel(base, recipe.lora, recipe.graft, dict)
    experts = [[0] for _ in base.sites]
    shared, personal, sums, total = model.fresh_adapters(0), dict[str, Any](), dict[str, Any](), 0
    for path in sorted(data.iterdir()):
        rows = jsonl.load("train", str(path))
        leaves = {key: nn.Parameter(leaf.clone()) for key, leaf in (shared | model.fresh_side(experts, 0, [])).items()}
        optimizer = torch.optim.AdamW(leaves.values(), lr=1e-3, weight_decay=0.0)
        with model.using(leaves, experts):
            for step in range(plan.steps):
                some = rows[step * plan.batch_size : (step + 1) * plan.batch_size]
                batch = collate([encode(row, base.tokenizer, recipe.data.template, plan.tokens)[0] for row in some], base.pad_id)
                base.model.train()(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels, use_cache=False).loss.backward()
                nn.utils.clip_grad_norm_(leaves.values(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        personal[path.name] = {key: leaf.detach() for key, leaf in leaves.items() if key not in shared}
        for key in shared:
            sums[key] = sums.get(key, 0) + len(rows) * leaves[key].detach()
        total += len(rows)
    shared = {key: leaf / total for key, leaf in sums.items()}
    return {"peak_MiB": peak()}


CONTESTANTS: Mapping[str, Contestant] = {"run": whole_run, "loop": plain_loop}


def compared(name: str, ours: Figures, other: Figures, unit: str, told: str) -> dict[str, Any]:
    """The ratio of two peaks, printed and as an entry."""
    mine, theirs = ours["peak_MiB"], other["peak_MiB"]
    print(f"{name:14} {mine:.0f} MiB, {told} {theirs:.0f} MiB, ratio {mine / theirs:.3f}", flush=True)
    return results.entry(name, [mine / theirs], unit, MiB=round(mine, 1), **{f"{told}_MiB": round(theirs, 1)})


def main() -> None:
    """Measure, print, write `results.json`; with --child, one contestant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a few clients with a few rows, nothing written: shows that it runs")
    add_child(parser)
    arguments = parser.parse_args()
    if arguments.child:
        be_child(arguments.child, CONTESTANTS)
        return
    small = Plan(rows=10, letters=60, tokens=32, batch_size=1)
    entries = []
    for name, plan in {} if arguments.small else VARIANTS.items():
        unit = f"times the peak memory of {FEW} clients"
        entries.append(compared(name, apart("run", MANY, plan), apart("run", FEW, plan), unit, "few"))
    for clients in (4,) if arguments.small else AGAINST_THE_LOOP:
        plan = small if arguments.small else Plan()
        ours, loop = apart("run", clients, plan), apart("loop", clients, plan)
        entries.append(compared(f"memory{clients}", ours, loop, "times the peak memory of the plain loop", "loop"))
    if not arguments.small:
        results.write(entries)


if __name__ == "__main__":
    main()

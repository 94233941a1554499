"""Write docs/benchmarks.md from results.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import results

from fedgraft import files

TARGET = Path(__file__).parents[1] / "docs" / "benchmarks.md"
INTRODUCTION = """# Benchmarks

Written by `python benchmarks/report.py` from `benchmarks/results.json`; `make bench` measures everything anew. Ratios below 1 are in
fedgraft's favour. The machine was shared with other work, so absolute seconds say little; the contestants of a ratio took turns in one
process, or ran one after another, under the same load.
"""
SECTIONS = {
    "A round against the plain PyTorch loop": (
        ("sequential", "sequential_cpu", "sequential_lean", "sequential_lean_cpu"),
        """One FLEx round on the embedded base: 4 clients x 4 steps x batch 4, rows of at most 256 tokens, LoRA rank 8. fedgraft's side
is all that a round of a run does: codec, client memories from and to the disk, tokenising, training, merge, record, commit. The plain side
trains the same leaves on batches made beforehand and averages in memory. `sequential` uses transformers' own loss over all positions,
`sequential_lean` a head on the response tokens alone, which is fedgraft's way. Contestants take turns after every client; a ratio is taken
per round after one to warm up, the table shows its median and range. Run with the environment that `make bench` sets: one thread, and an
allocator that keeps freed memory.""",
    ),
    "A cohort against the plain PyTorch loop": (
        ("cohort8", "cohort8_bf16", "cohort8_autocast"),
        """As above with 8 clients that train at once (`engine.cohort: 8`) and rows of at most 128 tokens: with the base in
single precision, with the base in bfloat16 (leaves in fp32), and under bfloat16 autocast; the plain loop has the same. It is that of
`sequential`. Both have one thread: with two (`--threads 2`) a cohort was slower on this machine, whose cores are shared.""",
    ),
    "Memory with many clients": (
        ("memory200", "memory200_all"),
        """Peak resident memory of a whole run on the embedded base with 200 clients against one with 4, each run in a process of its own.
All clients choose experts, grow a graft and are evaluated; `memory200` trains 4 of them in each of 2 rounds, `memory200_all` trains all.
Every client has 50 rows of about 1,000 characters.""",
    ),
    "Writing answers": (
        ("generation", "generation_personal"),
        """Greedy answers for the evaluation (20 rows a client, up to 64 new tokens, batches of 16, KV cache) against transformers' own
batched `generate` on the base model with the same prompts in the order of the rows; the answers of the base are compared and must be the
same. `generation_personal` writes with a client's LoRA, grafted expert and gate in place. The two take turns client by client.""",
    ),
    "Serving eight clients at once": (
        ("serve_mixed", "serve_queued"),
        """40 requests of eight clients to `fedgraft serve` on the embedded base, five of each, over HTTP, greedy, of up to 48 tokens.
`serve_mixed` keeps eight requests open, mixed in one batch; `serve_queued` hands over all at once (batches of 16). Each is set against the
same requests one by one at the same server; they take turns, and the answers are compared and must be the same.""",
    ),
    "Start": (
        ("start_help", "start_first_step"),
        """`fedgraft --help` against `python -c pass`, processes in turns; and the demo recipe from `fedgraft.run` to its first optimiser
step, less imports and the experts' selection, each turn in a process of its own (its ratio is in seconds).""",
    ),
    "Selection": (
        ("selection", "selection_experts"),
        """One client's calibration pass on the embedded base (4,096 tokens, rows of at most 384) against a loop of the experts' own matrix
products on as many tokens, in turns in one process, by CPU time. `selection` is all of the pass: the products of all experts on all tokens,
and those of attention, shared experts and routers, a second, over the rate of the loop; padding, activations, norms and the sums of the
criterion count as no work. `selection_experts` is the experts' part: the loop over what the pass takes longer than a forward without
routed experts. Higher is better, 1 cannot be reached.""",
    ),
    "Over Flower's servers": (
        ("flower_5MB", "flower_100MB"),
        """One question to two sites and their answers, with a payload of that size each way: one SuperLink and two SuperNodes on loopback,
over TLS with node keys. Our side is all that `ask` does: codec, messages, the site's executor, worker, guard and codec, and back; the site
has no model and answers at once. The floor is a bare ClientApp in the same executor, which returns the same number of bytes in a bare
Flower message. They take turns within one run. A SuperNode looks for messages every three seconds, which both pay.""",
    ),
    "Memory of the coordinator": (
        ("flower_memory_2", "flower_memory_4", "flower_memory_8"),
        """Peak resident memory of one FedAvg round with an update of 100 MB from 2, 4 and 8 sites, each on servers of its own. The
ServerApp merges replies as it pulls them, one at a time. Those that have come and are not pulled yet wait in the SuperLink, Flower's own
process, which keeps them in memory.""",
    ),
    "Full-size models on one GPU": (
        ("full_size_qwen1.5-moe-a2.7b", "full_size_qwen3-30b-a3b"),
        """Random bf16 weights at the sizes of Qwen1.5-MoE-A2.7B and Qwen3-30B-A3B: every expert of every layer on 128 x 2,048 calibration
tokens, then 10 steps of 4 x 2,048 tokens with gradient checkpointing, FLEx with rank 32. The ratio is model FLOPs utilisation: the work of
training, without recomputation, over the rate of a large bf16 matrix product measured in the same process. Needs a GPU with 80 GB; give
each of the two files in `tests/account/configs`.

    python benchmarks/full_size.py tests/account/configs/qwen1.5-moe-a2.7b.json""",
    ),
    "The same in small": (
        ("full_size_qwen1.5-moe-a2.7b_small", "full_size_qwen3-30b-a3b_small"),
        """The same script with `--small` on a CPU: it shows that every line runs, and says nothing about a GPU.""",
    ),
}


def section(title: str, names: tuple[str, ...], text: str, found: dict[str, dict[str, Any]]) -> str:
    """One section with its command, machine and table; names without a result are left out."""
    entries = [found[name] for name in names if name in found]
    if not entries:
        return f"## {title}\n\n{text}\n\nNot measured yet.\n"
    first = entries[0]
    rows = ["| name | ratio | min | max | unit | figures |", "|---|---|---|---|---|---|"]
    for item in entries:
        figures = ", ".join(
            f"{name.replace('_', ' ')} {value if isinstance(value, str) else f'{value:,}'}" for name, value in item["figures"].items()
        )
        rows.append(f"| `{item['name']}` | {item['ratio']:.3f} | {item['min']:.3f} | {item['max']:.3f} | {item['unit']} | {figures} |")
    table = "\n".join(rows)
    where = f"Measured on {first['machine']} (shared), {first['date']}:"
    return f"## {title}\n\n{text}\n\n    {first['command']}\n\n{where}\n\n{table}\n"


def main() -> None:
    """Write the page."""
    found = {item["name"]: item for item in results.read()}
    parts = [section(title, names, text, found) for title, (names, text) in SECTIONS.items()]
    files.write_text(TARGET, "\n".join([INTRODUCTION, *parts]))


if __name__ == "__main__":
    main()

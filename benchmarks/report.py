"""Write docs/benchmarks.md from results.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import results

from fedgraft import files

TARGET = Path(__file__).parents[1] / "docs" / "benchmarks.md"
INTRODUCTION = """# Benchmarks

Written by `python benchmarks/report.py` from `benchmarks/results.json`; `make bench` and `make bench-peers` measure everything anew. Ratios
below 1 are in fedgraft's favour; in a row of a peer, in the peer's. The machine was shared with other work, so absolute seconds say little;
the contestants of a ratio took turns in one process, or ran one after another, under the same load.
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
    "Beside what one would use instead": (
        ("peer_plain", "peer_fedgraft", "peer_trainer", "peer_trl", "peer_flower", "peer_nvflare"),
        """FedAvg of LoRA (rank 8, attention) on a tiny random Mixtral: 4 layers, 8 experts of which 2 are used, 5 million parameters;
4 clients x 4 steps x batch 4, rows of at most 128 tokens, one thread. All start from the same adapters and train on the same batches in the
same order; each client's loss must be the plain loop's to 1 in 10,000 in the first two rounds and to 5 in 1,000
later, when rounding may have routed a token otherwise. `peer_plain` is a loop in PyTorch and PEFT, with the
adapters averaged in memory; `peer_trainer` and `peer_trl` make a `Trainer` and an `SFTTrainer` for each client and round in such a loop;
`peer_flower` and `peer_nvflare` are these frameworks' simulations and FedAvg around the plain loop's steps; `peer_fedgraft` is a run with
all that belongs to it (memories on disk, record, commit). Rows are tokens before the clock starts, but for fedgraft, which tokenises;
nobody logs, saves or evaluates that can be told not to. Each contestant runs in fresh processes that share one core, so that none gains by
clients that train side by side. They take turns; a ratio is taken per round, against the same round of the plain loop in the same turn,
without the first round of a run. The first step counts from the start of the process; peak memory is of all its processes, what they share
counted once; bytes are both ways, all clients: those of the packages and replies (fedgraft), those of the arrays (Flower), or computed
from the size of the adapters (NVFlare). Versions are pinned in `constraints.txt` and `benchmarks/peers/*.txt`. Needs PyPI the first time:
`make bench-peers`.""",
    ),
    "A cohort against the plain PyTorch loop": (
        ("cohort8", "cohort8_bf16", "cohort8_autocast"),
        """As above with 8 clients (a Dirichlet split) that train at once (`engine.cohort: 8`) and rows of at most 128 tokens: with the
base in single precision, with the base in bfloat16 (leaves in fp32), and under bfloat16 autocast; the plain loop has the same. It is
that of `sequential`. Both have one thread: with two (`--threads 2`) a cohort was slower on this machine, whose cores are shared. The
floor is the CPU time of all matrix products of one more round of fedgraft, attention included, each timed in its place: `floor ratio`
is what would be left if all else took no time.""",
    ),
    "Training by rows": (
        ("dp_sgd",),
        """A step of DP-SGD (`privacy.name: examples`: each row's gradient by itself, clipped, the sum noised) against one over the batch,
FedAvg on the embedded base, the demo's four clients, 8 rows a step (drawn independently with privacy, so on average), rows of at most 256
tokens. Drawing noise is in it, tokenising is not. The two take turns client by client, and which begins changes from round to round.""",
    ),
    "Memory with many clients": (
        ("memory200", "memory200_all", "memory4", "memory400"),
        """Peak resident memory of a whole run on the embedded base with 200 clients against one with 4, each run in a process of its own.
All clients choose experts, grow a graft and are evaluated; `memory200` trains 4 of them in each of 2 rounds, `memory200_all` trains all.
Every client has 50 rows of about 1,000 characters. `memory4` and `memory400` are a round of so many against the plain PyTorch
loop, which trains them one after another in the same model and keeps their own leaves in memory; it chooses, evaluates and writes
nothing.""",
    ),
    "From 4 to 4,000 clients": (
        ("scale_40", "scale_400", "scale_4000"),
        """Whole runs on the embedded base, each in a process of its own: every client has a file of 10 short rows, chooses experts, trains
one step and is evaluated. Seconds a client are those after the first question, which comes after the start: loading the base and reading
every file once. Files and kB a client are those of the run folder. `--most` adds 4,000 clients, for which `make bench` has no time.""",
    ),
    "Folding a reply": (
        ("merge",),
        """One reply of 200 MB (fp32) folded into the running weighted mean, against a copy of as many numbers by torch; one thread, in
turns. For each number the fold reads 4 bytes of the reply, 4 of the state and 8 of the mean and writes 8 of the mean, which is held in
float64; the copy reads 4 and writes 4. What the fold moves beyond that counts for nothing.""",
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
    "Choosing experts on a base larger than memory": (
        ("stream_selection_24", "stream_selection_4"),
        """`fedgraft select` on a checkpoint with random bf16 weights at the sizes of Qwen1.5-MoE-A2.7B with 24 layers (28.6 GB, the
real one's) and with 4, in a control group that is given `limit GiB`: a process that held more would be killed. Four clients choose by 512
tokens each. The ratio is the peak of the process's anonymous memory (libraries and all) over the checkpoint's size; pages of files, which
the system takes back when it needs them, are not in it. A layer's seconds are reading and joining its experts and measuring them;
`computing share` is the part of the second. The digest of the base, another read of all files, is in `seconds`.

    python benchmarks/stream.py --layers 24 --limit 8""",
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

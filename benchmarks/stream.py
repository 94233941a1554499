"""Experts chosen on a base that is larger than the memory it is given: `fedgraft select`, one decoder layer at a time.

A checkpoint with random bf16 weights at the sizes of Qwen1.5-MoE-A2.7B, its experts stored one by one, is written shard by shard (with
24 layers 28.6 GB on the disk, deleted afterwards) and four clients choose by 512 tokens each. The work runs in a process of its own, where
the system allows it (Linux, as root) in a control group whose limit is a part of the checkpoint: a process that held more would be killed.
The ratio is that process's peak of anonymous memory over the size of the checkpoint.

    python benchmarks/stream.py --layers 24 --limit 8          # 28.6 GB on the disk, in 8 GiB
    python benchmarks/stream.py --small                        # every line, in a minute
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import results
import torch
from safetensors.torch import save_file

CONFIG = Path(__file__).parents[1] / "tests" / "account" / "configs" / "qwen1.5-moe-a2.7b.json"
SMALL = {"hidden_size": 256, "moe_intermediate_size": 64, "intermediate_size": 256, "shared_expert_intermediate_size": 256}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 16, "vocab_size": 8192}
GROUPS = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))
LIMITS, PEAKS = ("memory.limit_in_bytes", "memory.max"), ("memory.max_usage_in_bytes", "memory.peak")
"""Of control groups of version 1 and 2."""


def write_checkpoint(folder: Path, layers: int, small: bool) -> int:
    """Write a random checkpoint, one shard a decoder layer, each dropped before the next is drawn; returns its bytes."""
    values = json.loads(CONFIG.read_text(encoding="utf-8")) | {"num_hidden_layers": layers} | (SMALL if small else {})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    tokenizer = Path(__file__).parents[1] / "src" / "fedgraft" / "assets" / "base"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / name, folder / name)
    shards: dict[str, str] = {}
    total, rng = 0, torch.Generator().manual_seed(0)
    parts: list[dict[str, tuple[int, ...]]] = [outer_shapes(values), *(layer_shapes(number, values) for number in range(layers))]
    for number, shapes in enumerate(parts, start=1):
        name = f"model-{number:05}-of-{len(parts):05}.safetensors"
        drawn = {key: draw(shape, rng) for key, shape in shapes.items()}
        save_file(drawn, folder / name, metadata={"format": "pt"})
        shards |= dict.fromkeys(drawn, name)
        total += sum(tensor.numel() * tensor.element_size() for tensor in drawn.values())
        print(f"shard {number} of {len(parts)}, {total / 1e9:.1f} GB", flush=True)
    index = {"metadata": {"total_size": total}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def draw(shape: tuple[int, ...], rng: torch.Generator) -> torch.Tensor:
    """Norms of ones, matrices at unit scale of their inputs."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, shape[-1] ** -0.5, generator=rng)


def outer_shapes(values: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Embeddings, last norm and head."""
    hidden, words = values["hidden_size"], values["vocab_size"]
    return {"model.embed_tokens.weight": (words, hidden), "model.norm.weight": (hidden,), "lm_head.weight": (words, hidden)}


def layer_shapes(number: int, values: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """A decoder layer as it is stored on the hub."""
    hidden, width, shared = values["hidden_size"], values["moe_intermediate_size"], values["shared_expert_intermediate_size"]
    head = f"model.layers.{number}."
    shapes: dict[str, tuple[int, ...]] = {f"{head}{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
    shapes |= {f"{head}self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
    shapes |= {f"{head}self_attn.{name}_proj.bias": (hidden,) for name in "qkv"}
    shapes |= {f"{head}mlp.gate.weight": (values["num_experts"], hidden), f"{head}mlp.shared_expert_gate.weight": (1, hidden)}
    blocks = {f"{head}mlp.shared_expert.": shared} | {f"{head}mlp.experts.{expert}.": width for expert in range(values["num_experts"])}
    for block, inner in blocks.items():
        shapes |= {f"{block}{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{block}down_proj.weight"] = (hidden, inner)
    return shapes


@contextmanager
def limited(gibibytes: float | None) -> Iterator[Path | None]:
    """A control group with so much memory, or None where the system has or gives none."""
    group = next((place for place in GROUPS if place.is_dir()), GROUPS[-1]) / f"fedgraft-stream-{os.getpid()}"
    try:
        if gibibytes is None:
            raise OSError("none is asked for")
        group.mkdir()
        limit = next(group / name for name in LIMITS if (group / name).exists())
        limit.write_text(str(round(gibibytes * 2**30)), encoding="ascii")
    except (OSError, StopIteration) as error:
        print(f"no limit on memory ({error}); the peak is measured all the same", flush=True)
        if group.exists():
            group.rmdir()
        yield None
        return
    try:
        yield group
    finally:
        group.rmdir()


class Watch:
    """The peak of this process's anonymous memory, looked at fifty times a second."""

    def __init__(self) -> None:
        self.peak = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(0.02):
            self.peak = max(self.peak, anonymous())

    def end(self) -> int:
        """The peak in bytes."""
        self._over.set()
        self._thread.join()
        return self.peak


def anonymous() -> int:
    """Bytes of this process that are no pages of files."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def child(folder: Path, tokens: int, threads: int, group: str) -> None:
    """Choose experts in this process; prints one JSON line."""
    if group:
        Path(group, "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")
    from fedgraft.beforehand import choose_beforehand
    from fedgraft.moe.layer_weights import LayerWeights
    from fedgraft.moe.layered import Layered

    seconds = {"reading": 0.0, "computing": 0.0}
    read = [0]
    put, layer = LayerWeights.put, Layered._layer

    def timed_put(self: LayerWeights, number: int) -> None:
        began = time.perf_counter()
        put(self, number)
        seconds["reading"] += time.perf_counter() - began
        read[0] += self.bytes_of(number)

    def timed_layer(self: Layered, *arguments: Any, **options: Any) -> None:
        began, before = time.perf_counter(), seconds["reading"]
        layer(self, *arguments, **options)
        seconds["computing"] += time.perf_counter() - began - (seconds["reading"] - before)

    LayerWeights.put, Layered._layer = timed_put, timed_layer  # type: ignore[method-assign]
    watch, began = Watch(), time.perf_counter()
    recipe: dict[str, Any] = {
        "model": {"name": str(folder), "dtype": "bfloat16", "threads": threads},
        "data": {"max_length": 256},
        "selection": {"tokens": tokens},
    }
    found = choose_beforehand(recipe, out=folder / "choices.json")
    total = time.perf_counter() - began
    told = {"peak": watch.end(), "read": read[0], "total": total, **seconds, "clients": len(found.choices)}
    peaks = [Path(group, name) for name in PEAKS if group and Path(group, name).exists()]
    told["group_peak"] = int(peaks[0].read_text(encoding="ascii")) if peaks else 0
    print(json.dumps(told))


def main() -> None:
    """Measure, print, write `results.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="decoder layers; the real model has 24 (28.6 GB)")
    parser.add_argument("--limit", type=float, default=None, help="GiB of memory that the process gets")
    parser.add_argument("--tokens", type=int, default=512, help="calibration tokens of each of the four clients")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, default=None, help="where the checkpoint is written (default: a temporary folder)")
    parser.add_argument("--small", action="store_true", help="narrow layers, for a minute's look")
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "GROUP"), help="for internal use")
    arguments = parser.parse_args()
    if arguments.child:
        child(Path(arguments.child[0]), arguments.tokens, arguments.threads, arguments.child[1])
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place, limited(arguments.limit) as group:
        folder = Path(place) / "base"
        size = write_checkpoint(folder, arguments.layers, arguments.small)
        command = [sys.executable, __file__, "--child", str(folder), str(group or ""), "--tokens", str(arguments.tokens)]
        run = subprocess.run([*command, "--threads", str(arguments.threads)], check=True, stdout=subprocess.PIPE, text=True)
        told = json.loads(run.stdout.splitlines()[-1])
    name = f"stream_selection_{arguments.layers}{'_small' if arguments.small else ''}"
    figures = {
        "checkpoint_GB": round(size / 1e9, 2),
        **({"limit_GiB": arguments.limit, "group_peak_GiB": round(told["group_peak"] / 2**30, 3)} if group else {}),
        "peak_anonymous_GiB": round(told["peak"] / 2**30, 3),
        "read_GB": round(told["read"] / 1e9, 2),
        "seconds": round(told["total"], 1),
        "seconds_a_layer": round((told["reading"] + told["computing"]) / arguments.layers, 2),
        "reading_GB_per_second": round(told["read"] / 1e9 / told["reading"], 2),
        "computing_share": round(told["computing"] / (told["computing"] + told["reading"]), 3),
        "tokens": arguments.tokens * told["clients"],
        "threads": arguments.threads,
    }
    print(json.dumps(figures, indent=2), flush=True)
    results.write([results.entry(name, [told["peak"] / size], "of the checkpoint's size in memory at once", **figures)])


if __name__ == "__main__":
    main()

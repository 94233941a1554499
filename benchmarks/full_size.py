"""A full-size model with random weights on one GPU: choose experts, graft, train; tokens per second, model FLOPs utilisation, peak memory.

Only config.json is needed, no checkpoint. On a GPU with 80 GB or more:

    python benchmarks/full_size.py tests/account/configs/qwen1.5-moe-a2.7b.json
    python benchmarks/full_size.py tests/account/configs/qwen3-30b-a3b.json

Without one, `--small` shrinks width, depth and number of experts of the same architecture, so that every line runs on a CPU in a minute.
Utilisation is the work of training by `fedgraft.account` (frozen matrices twice, trained ones three times, no recomputation) over the rate
of a large matrix product measured in the same process; with gradient checkpointing the hardware does one more forward than is counted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import results
import torch

from fedgraft.account.forecast import probe_rate
from fedgraft.account.memory import Workload
from fedgraft.account.take import take_account
from fedgraft.data.batches import Batch
from fedgraft.grafts.graft import GraftedModel
from fedgraft.grafts.lora import LoraSettings
from fedgraft.grafts.side_expert import GraftSettings
from fedgraft.methods.flex import build
from fedgraft.moe.load import prepare
from fedgraft.selection.choose import choose
from fedgraft.selection.profile import measure
from fedgraft.training.fit import fit
from fedgraft.training.settings import TrainingSettings
from fedgraft.tree import combine

SMALL = {"hidden_size": 256, "moe_intermediate_size": 64, "intermediate_size": 256, "shared_expert_intermediate_size": 256}
SMALL |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 4096}
SMALL |= {"num_experts": 16, "num_local_experts": 16}


@dataclass(frozen=True)
class Size:
    """How much is run."""

    rows: int
    length: int
    steps: int
    calibration: int


def random_model(config: Path, small: bool, device: torch.device) -> Any:
    """The model of a configuration with random bf16 weights, made where it will run."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = json.loads(config.read_text(encoding="utf-8"))
    if small:
        values |= {name: value for name, value in SMALL.items() if name in values}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(values), encoding="utf-8")
        settings = AutoConfig.from_pretrained(folder)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)


def batches(size: Size, vocabulary: int, count: int) -> Iterator[Batch]:
    """Random rows without padding, the second half of each a response."""
    rng = torch.Generator().manual_seed(0)
    for _ in range(count):
        ids = torch.randint(3, vocabulary, (size.rows, size.length), generator=rng)
        labels = ids.clone()
        labels[:, : size.length // 2] = -100
        yield Batch(ids, torch.ones_like(ids), labels)


def timed(device: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a piece of work, the device's queue emptied before and after."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    value = work()
    wait()
    return time.perf_counter() - began, value


def peak_gib(device: torch.device) -> float:
    """Peak memory: of the GPU, or what the process holds now on a CPU."""
    used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return used / 2**30


def main() -> None:
    """Measure, print, write `results.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a config.json")
    parser.add_argument("--small", action="store_true", help="the same architecture in small, for a CPU")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    full, little = Size(rows=4, length=2048, steps=10, calibration=128 * 2048), Size(rows=4, length=128, steps=4, calibration=1024)
    size = little if arguments.small else full
    seconds, model = timed(device, lambda: random_model(arguments.config, arguments.small, device))
    print(f"{sum(part.numel() for part in model.parameters()) / 1e9:.3f} B parameters made in {seconds:.1f} s on {device}", flush=True)
    lora, graft = LoraSettings(rank=32, alpha=64.0), GraftSettings()
    grafted = GraftedModel(prepare("random", model, None, "random"), lora, graft)
    vocabulary = model.config.vocab_size
    calibration = list(batches(size, vocabulary, -(-size.calibration // (size.rows * size.length))))
    selection, profile = timed(device, lambda: measure(grafted.base, calibration, size.calibration))
    experts = choose("reconstruction", profile, 1, None)  # type: ignore[arg-type]  # it draws nothing
    print(f"selection: {size.calibration:,} tokens in {selection:.1f} s, peak {peak_gib(device):.1f} GiB", flush=True)
    start = combine(grafted.fresh_adapters(0), grafted.fresh_side(experts, 0))
    settings = TrainingSettings(checkpointing=True, precision="bf16", router_aux=0.0)
    steps = [[batch] for batch in batches(size, vocabulary, size.steps + 1)]
    options: dict[str, Any] = {"lr": 4e-5, "seed": 0, "experts": experts}
    fit(grafted, start, steps[:1], settings, **options)  # warm up
    training, done = timed(device, lambda: fit(grafted, start, steps[1:], settings, **options))
    tokens = size.steps * size.rows * size.length
    work = Workload(length=size.length, rows=size.rows, dtype="bfloat16", precision="bf16", checkpointing=True, predicting=0.5)
    compute = take_account(grafted.base, build(), lora, graft, work).compute
    used = (2 * (compute.grafted - compute.head // 2) + compute.adapters + compute.graft) * tokens / training
    rate = probe_rate(device, torch.bfloat16)
    shape = f"{size.steps} steps of {size.rows} x {size.length}"
    print(f"training: {shape} in {training:.1f} s, loss {done.loss:.3f}, {tokens / training:,.0f} tokens/s")
    print(f"{used / 1e12:.2f} of {rate / 1e12:.2f} TFLOP/s, peak {peak_gib(device):.1f} GiB", flush=True)
    name = f"full_size_{arguments.config.stem}{'_small' if arguments.small else ''}"
    figures = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "tokens_per_second": round(tokens / training, 1),
        "selection_seconds": round(selection, 2),
        "selection_tokens": size.calibration,
        "peak_GiB": round(peak_gib(device), 2),
        "TFLOPs_per_second": round(used / 1e12, 3),
    }
    results.write([results.entry(name, [used / rate], "of the rate of a large bf16 matrix product (model FLOPs utilisation)", **figures)])


if __name__ == "__main__":
    main()

"""Pretrain the embedded base model on the token files of `prepare.py`.

Two stages in one run under a warmup - constant - decay schedule: the corpus while the learning rate is constant, then mid-training (chat
rows mixed with corpus text) while it decays to zero. Matrices are trained by Muon (orthogonalised momentum, Jordan 2024), everything else
by AdamW; the router is balanced by the Switch loss taken per layer. Data parallel over `--workers` single-threaded processes, which on a
small CPU beats one process with as many threads.

Writes `log.jsonl` (one line per evaluation), `checkpoint.pt` (to continue; read only by this tool) and `model/` (a Hugging Face folder),
all renewed every `--save-every` steps. Started again with the same `--out`, it continues.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen2MoeConfig, Qwen2MoeForCausalLM

CORPUS = {  # passes over each source in one epoch of the first stage
    "tinystories_sample": 1.0,
    "african_storybook_en": 2.0,
    "fairytales": 1.0,
    "short_stories": 0.6,
    "folktales_classics": 0.5,
    "wikinews": 1.5,
    "medquad": 0.8,
}
CHAT = {"dolly": 3.0, "medquad_chat": 0.25, "wikinews": 0.2, "tinystories_sample": 0.2, "short_stories": 0.03}
BALANCE = 0.02
DEAD = 0.005  # an expert that serves a smaller share of a layer's held-out tokens than this is started anew


def build_config(tokenizer_size: int, end: int, pad: int) -> Qwen2MoeConfig:
    """Qwen1.5-MoE-A2.7B in small: fine experts, top-4, one gated shared expert as wide as the active ones, unnormalised top-k."""
    return Qwen2MoeConfig(
        vocab_size=tokenizer_size,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=96,
        shared_expert_intermediate_size=384,
        intermediate_size=384,
        norm_topk_prob=False,
        decoder_sparse_step=1,
        max_position_embeddings=2048,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        router_aux_loss_coef=0.001,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
        initializer_range=0.02,
    )


class Stream:
    """Endless [batch, length + 1] windows of one stage: chunks of all sources, reshuffled every epoch, the same for the same seed."""

    def __init__(self, folder: Path, mix: dict[str, float], length: int, seed: int) -> None:
        self.parts = {name: np.load(folder / f"{name}.train.npy", mmap_mode="r") for name in mix}
        self.mix, self.length, self.seed = mix, length, seed
        self.epoch, self.order = -1, np.zeros((0, 2), np.int64)
        self.names = list(mix)

    def _epoch(self, epoch: int) -> None:
        rng = np.random.default_rng([self.seed, epoch])
        rows: list[np.ndarray] = []
        for index, name in enumerate(self.names):
            size = len(self.parts[name])
            for turn in range(math.ceil(self.mix[name])):
                share = min(1.0, self.mix[name] - turn)
                starts = np.arange(int(rng.integers(self.length)), size - self.length - 1, self.length)
                starts = rng.permutation(starts)[: max(1, round(share * len(starts)))]
                rows.append(np.stack([np.full(len(starts), index), starts], axis=1))
        self.order, self.epoch = rng.permutation(np.concatenate(rows)), epoch

    def batch(self, number: int, size: int) -> Tensor:
        """The `number`-th global batch of `size` windows."""
        if self.epoch < 0:
            self._epoch(0)
        per_epoch = len(self.order) // size
        epoch, place = divmod(number, per_epoch)
        if epoch != self.epoch:
            self._epoch(epoch)
        chosen = self.order[place * size : (place + 1) * size]
        windows = [self.parts[self.names[i]][s : s + self.length + 1].astype(np.int64) for i, s in chosen]
        return torch.from_numpy(np.stack(windows))


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by five Newton-Schulz steps, for [..., m, n] weights (leading axes are independent matrices)."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix."""
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                buffer = state.setdefault("momentum", torch.zeros_like(weight))
                buffer.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalise(weight.grad.lerp(buffer, group["momentum"]))
                scale = max(1.0, weight.shape[-2] / weight.shape[-1]) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def orthogonalise(matrix: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrix, roughly (singular values in about [0.7, 1.2])."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.bfloat16()
    flip = x.shape[-2] > x.shape[-1]
    x = x.mT if flip else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if flip else x).to(matrix.dtype)


def split_fused(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices for Muon, the rest for AdamW): embeddings, router, gates, norms and biases are not orthogonalised."""
    muon, adam = [], []
    for name, weight in model.named_parameters():
        inner = weight.ndim >= 2 and not any(part in name for part in ("embed", "lm_head", "mlp.gate.", "shared_expert_gate"))
        (muon if inner else adam).append(weight)
    return muon, adam


def balance_loss(router_logits: tuple[Tensor, ...], experts: int, top_k: int) -> Tensor:
    """Switch load-balancing loss E * sum_e f_e P_e, one term per layer (1 when balanced), averaged over layers."""
    losses = []
    for logits in router_logits:
        p = logits.float().softmax(-1)
        chosen = F.one_hot(p.topk(top_k, dim=-1).indices, experts).sum(1).float().mean(0) / top_k
        losses.append(experts * (chosen * p.mean(0)).sum())
    return torch.stack(losses).mean()


def learning_rate(step: int, stable: int, total: int, warmup: int = 60) -> float:
    """Factor on the learning rates: linear warmup, constant until `stable`, then linear to zero at `total`."""
    if step < stable:
        return min(1.0, (step + 1) / warmup)
    return max(0.0, (total - step) / (total - stable))


@torch.no_grad()
def evaluate(model: Qwen2MoeForCausalLM, folder: Path, length: int = 512, rows: int = 8) -> tuple[dict[str, float], Tensor]:
    """(held-out nats per token of every source, share of the tokens by layer and expert [L, E])."""
    model.eval()
    losses, use = {}, torch.zeros(model.config.num_hidden_layers, model.config.num_experts)
    for path in sorted(folder.glob("*.held.npy")):
        tokens = np.load(path).astype(np.int64)
        rows_here = min(rows, len(tokens) // (length + 1))
        if not rows_here:
            continue
        batch = torch.from_numpy(tokens[: rows_here * (length + 1)].reshape(rows_here, length + 1))
        with torch.autocast("cpu", torch.bfloat16):
            out = model(batch[:, :-1], output_router_logits=True)
        logits = out.logits.float().flatten(0, 1)
        losses[path.name.split(".")[0]] = round(F.cross_entropy(logits, batch[:, 1:].flatten()).item(), 4)
        for layer, scores in enumerate(out.router_logits):
            use[layer] += scores.topk(model.config.num_experts_per_tok, -1).indices.flatten().bincount(minlength=use.shape[1])
    model.train()
    return losses, use / use.sum(1, keepdim=True)


@torch.no_grad()
def revive(model: Qwen2MoeForCausalLM, share: Tensor) -> int:
    """Start every dead expert anew as a copy of its layer's most used one, whose tokens it then splits; returns how many."""
    revived = 0
    for layer, row in enumerate(share):
        block, best = model.model.layers[layer].mlp, int(row.argmax())
        for expert in (row < DEAD).nonzero().flatten().tolist():
            block.experts.gate_up_proj[expert] = block.experts.gate_up_proj[best]
            block.experts.down_proj[expert] = block.experts.down_proj[best]
            noise = torch.randn(block.gate.weight.shape[1], generator=torch.Generator().manual_seed(expert))
            block.gate.weight[expert] = block.gate.weight[best] + noise * block.gate.weight[best].std()
            revived += 1
    return revived


def save(model: Qwen2MoeForCausalLM, optimizers: list[torch.optim.Optimizer], step: int, options: argparse.Namespace) -> None:
    """Checkpoint and bf16 model folder, each written aside and renamed."""
    target, aside = options.out / "checkpoint.pt", options.out / "checkpoint.tmp"
    torch.save({"step": step, "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}, aside)
    os.replace(aside, target)
    folder, fresh = options.out / "model", options.out / "model.tmp"
    shutil.rmtree(fresh, ignore_errors=True)
    state = {name: weight.bfloat16() for name, weight in model.state_dict().items() if name != "lm_head.weight"}  # tied to the embedding
    model.save_pretrained(fresh, state_dict=state)
    AutoTokenizer.from_pretrained(options.data / "tokenizer").save_pretrained(fresh)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def worker(rank: int, options: argparse.Namespace) -> None:
    """One data-parallel process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{options.out.resolve()}/rendezvous", rank=rank, world_size=options.workers)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.data / "tokenizer")
    model = Qwen2MoeForCausalLM(build_config(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id))
    for block in model.modules():  # the routers of transformers start at zero: every token would tie
        if type(block).__name__.endswith("TopKRouter"):
            nn.init.normal_(block.weight, std=0.02)
    model.train()
    matrices, rest = split_fused(model)
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=options.muon_lr),
        torch.optim.AdamW(rest, lr=options.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    base = [options.muon_lr, options.adam_lr]
    step = 0
    if (options.out / "checkpoint.pt").exists():
        kept = torch.load(options.out / "checkpoint.pt", weights_only=True)
        model.load_state_dict(kept["model"])
        for optimizer, state in zip(optimizers, kept["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        step = kept["step"]
    stages = [Stream(options.data, CORPUS, 512, seed=1), Stream(options.data, CHAT, 1024, seed=2)]
    log = options.out / "log.jsonl"
    began, tokens_seen, running = time.time(), 0, 0.0
    parameters = [p for p in model.parameters() if p.requires_grad]
    while step < options.steps:
        late = step >= options.stable
        size = options.tokens // stages[late].length
        batch = stages[late].batch(step - options.stable if late else step, size)[rank :: options.workers]
        factor = learning_rate(step, options.stable, options.steps)
        for optimizer, lr in zip(optimizers, base, strict=True):
            optimizer.param_groups[0]["lr"] = lr * factor
        loss_sum = torch.zeros(())
        micro = max(1, options.micro_tokens // stages[late].length)
        parts = batch.split(micro)
        for part in parts:
            with torch.autocast("cpu", torch.bfloat16):
                out = model(part[:, :-1], output_router_logits=True)
            nll = F.cross_entropy(out.logits.float().flatten(0, 1), part[:, 1:].flatten())
            balance = balance_loss(out.router_logits, model.config.num_experts, model.config.num_experts_per_tok)
            share = len(part) / len(batch)
            ((nll + BALANCE * balance) * share).backward()
            loss_sum += nll.detach() * share
        flat = torch.cat([p.grad.flatten() for p in parameters] + [loss_sum[None]])
        dist.all_reduce(flat)
        flat /= options.workers
        place = 0
        for p in parameters:
            p.grad.copy_(flat[place : place + p.numel()].view_as(p))
            place += p.numel()
        nn.utils.clip_grad_norm_(rest, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        tokens_seen += options.tokens
        running = 0.95 * running + 0.05 * flat[-1].item() if running else flat[-1].item()
        if step % options.eval_every == 0 or step == options.steps:  # on every worker, so that all revive alike
            losses, use = evaluate(model, options.data)
            record = {"step": step, "tokens": step * options.tokens, "train": round(running, 4), "lr": round(factor, 4)}
            record |= {"tokens_per_second": round(tokens_seen / (time.time() - began)), "held_out": losses}
            record |= {"expert_share": [round(use.min().item(), 4), round(use.max().item(), 4)]}
            record["revived"] = 0 if late else revive(model, use)
            if rank == 0:
                with log.open("a") as sink:
                    sink.write(json.dumps(record) + "\n")
        if rank == 0 and (step % options.save_every == 0 or step in (options.steps, options.stable)):
            save(model, optimizers, step, options)
    dist.destroy_process_group()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder written by prepare.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True, help="optimiser steps in all")
    parser.add_argument("--stable", type=int, required=True, help="steps on the corpus before mid-training and decay begin")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens a step, over all workers")
    parser.add_argument("--micro-tokens", type=int, default=2048, help="tokens of one forward")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.003)
    parser.add_argument("--eval-every", type=int, default=100)
    parser.add_argument("--save-every", type=int, default=200)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "rendezvous").unlink(missing_ok=True)
    torch.multiprocessing.spawn(worker, args=(options,), nprocs=options.workers)


if __name__ == "__main__":
    main()

"""A fedgraft round against the plain PyTorch loop over the same batches, client by client in one process.

fedgraft's side is the round as a run does it: package and reply through the codec, client memory read from and flushed to the disk,
tokenising, training, merging, the line of `rounds.jsonl` and the committed state. The plain side trains the same leaves in the same model
on batches made before the clock starts, with AdamW and gradient clipping, and averages the shared leaves in memory. It is measured in two
forms: `sequential` with transformers' own loss (`labels=...`), `sequential_lean` with the head on the response tokens alone, which is how
fedgraft does it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import results
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedgraft.data.batches import Batch
from fedgraft.grafts.graft import Experts, GraftedModel
from fedgraft.hosting import Holdings
from fedgraft.reach import Here
from fedgraft.recipe import load_recipe
from fedgraft.report.progress import Quiet
from fedgraft.session import Session
from fedgraft.training.fit import autocast
from fedgraft.tree import Tree

STEPS, BATCH_SIZE, MAX_LENGTH = 4, 4, 256


@dataclass
class Clock:
    """Seconds of one contestant in the round in hand."""

    wall: float = 0.0
    cpu: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what happens inside the block."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def labels_loss(network: Any, batch: Batch) -> Tensor:
    """transformers' loss: logits of every position."""
    loss: Tensor = network(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels, use_cache=False).loss
    return loss


def lean_loss(network: Any, batch: Batch) -> Tensor:
    """The same loss with logits of the response positions only."""
    hidden = network.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).last_hidden_state
    wanted = batch.labels[:, 1:]
    chosen = wanted != -100
    return F.cross_entropy(network.lm_head(hidden[:, :-1][chosen]).float(), wanted[chosen])


@dataclass
class PlainLoop:
    """The loop that one writes without a framework."""

    model: GraftedModel
    loss: Callable[[Any, Batch], Tensor]
    precision: str
    shared: Tree
    personal: dict[str, Tree]
    experts: dict[str, Experts]
    threads: int
    clock: Clock = field(default_factory=Clock)
    sums: Tree = field(default_factory=dict)
    rows: int = 0
    losses: list[float] = field(default_factory=list)

    def train(self, name: str, batches: Sequence[Batch], lr: float, rows: int) -> None:
        """One client's local steps."""
        with torch_threads(self.threads):
            self._train(name, batches, lr, rows)

    def _train(self, name: str, batches: Sequence[Batch], lr: float, rows: int) -> None:
        leaves = {key: nn.Parameter(leaf.clone()) for key, leaf in (self.shared | self.personal[name]).items()}
        network = self.model.base.model.train()
        optimizer = torch.optim.AdamW(leaves.values(), lr=lr, weight_decay=0.0)
        with self.model.using(leaves, self.experts[name]):
            for batch in batches:
                with autocast(self.precision, self.model.base.device):
                    loss = self.loss(network, batch)
                loss.backward()
                nn.utils.clip_grad_norm_(leaves.values(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                self.losses.append(loss.item())
        self.personal[name] = {key: leaves[key].detach() for key in self.personal[name]}
        for key in self.shared:
            self.sums[key] = self.sums.get(key, 0) + rows * leaves[key].detach()
        self.rows += rows

    def average(self) -> float:
        """The mean of the clients' shared leaves becomes the new state; returns the round's mean loss."""
        self.shared = {key: total / self.rows for key, total in self.sums.items()}
        loss = statistics.fmean(self.losses)
        self.sums, self.rows, self.losses = {}, 0, []
        return loss


def holdings_of(session: Session) -> Holdings:
    """Rows and model of an in-process session."""
    assert isinstance(session.reach, Here)
    return session.reach.holdings


def plain_loop(session: Session, loss: Callable[[Any, Batch], Tensor], threads: int) -> PlainLoop:
    """A plain loop that starts from the session's state and its clients' memories."""
    holdings, store = holdings_of(session), session.engine.store
    memories = {name: store.load(name, session.engine.asked) for name in holdings.clients}
    return PlainLoop(
        model=holdings.model,
        loss=loss,
        threads=threads,
        precision=session.recipe.training.precision,
        shared=session.server.state.tree("shared"),
        personal={name: memory.tree("personal") for name, memory in memories.items()},
        experts={name: memory.facts["experts"] for name, memory in memories.items()},  # type: ignore[misc]
    )


def one_round(session: Session, loops: dict[str, PlainLoop]) -> tuple[Clock, int]:
    """One round of all contestants, who take turns after every client; returns fedgraft's clock and the round's tokens.

    Raises:
        RuntimeError: a plain loop's training loss differs from fedgraft's, so that they didn't do the same work.
    """
    number, lr = session.server.round, session.server.round_lr()
    holdings = holdings_of(session)
    batches = {name: [part for parts in holdings.open(name).batches(number) for part in parts] for name in holdings.clients}

    def others_turn(question: str, name: str, content: bytes) -> None:
        with outside.running():
            for loop in loops.values():
                with loop.clock.running():
                    loop.train(name, batches[name], lr, len(holdings.clients[name].train))

    own, outside = Clock(), Clock()
    for loop in loops.values():
        loop.clock = Clock()
    session.engine.on_send = others_turn
    with own.running():
        session._round()
    for name, loop in loops.items():
        with loop.clock.running():
            loss = loop.average()
        expected = statistics.fmean(facts["loss"] for facts in session.replies.values())
        if abs(loss - expected) > 0.01 * expected:
            raise RuntimeError(f"{name}: training loss {loss:.4f}, fedgraft's is {expected:.4f}")
    tokens = sum(batch.tokens for rounds in batches.values() for batch in rounds)
    return Clock(own.wall - outside.wall, own.cpu - outside.cpu), tokens


def measure(rounds: int, threads: int, precision: str) -> list[dict[str, Any]]:
    """Entries for `results.json`: wall clock and CPU seconds against both plain loops."""
    options = [f"data.max_length={MAX_LENGTH}", f"training.steps={STEPS}", f"training.batch_size={BATCH_SIZE}", "selection.tokens=512"]
    options += [f"federation.rounds={rounds + 1}", f"model.threads={threads}", f"training.precision={precision}", "lora.dropout=0.0"]
    with tempfile.TemporaryDirectory() as folder:
        session = Session(load_recipe("demo", options), Path(folder), Quiet())
        session._open()
        loops = {"sequential": plain_loop(session, labels_loss, threads), "sequential_lean": plain_loop(session, lean_loss, threads)}
        one_round(session, loops)
        taken: list[tuple[Clock, dict[str, Clock], int]] = []
        for _ in range(rounds):
            own, tokens = one_round(session, loops)
            taken.append((own, {name: loop.clock for name, loop in loops.items()}, tokens))
            show(own, taken[-1][1], tokens)
    return [
        results.entry(
            name if kind == "wall" else f"{name}_cpu",
            [getattr(own, kind) / getattr(others[name], kind) for own, others, _ in taken],
            f"times the plain loop, {'wall clock' if kind == 'wall' else 'CPU seconds'}",
            fedgraft_seconds=round(statistics.median(getattr(own, kind) for own, _, _ in taken), 3),
            plain_seconds=round(statistics.median(getattr(others[name], kind) for _, others, _ in taken), 3),
            fedgraft_tokens_per_second=round(statistics.median(tokens / getattr(own, kind) for own, _, tokens in taken)),
            plain_tokens_per_second=round(statistics.median(tokens / getattr(others[name], kind) for _, others, tokens in taken)),
        )
        for name in loops
        for kind in ("wall", "cpu")
    ]


def show(own: Clock, others: dict[str, Clock], tokens: int) -> None:
    """One line per round."""
    parts = [f"{name} {own.wall / clock.wall:.3f} wall {own.cpu / clock.cpu:.3f} CPU" for name, clock in others.items()]
    print(f"{tokens} tokens in {own.wall:.2f} s;", "; ".join(parts), flush=True)


def main() -> None:
    """Measure, print, write `results.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds after one to warm up")
    parser.add_argument("--threads", type=int, default=1, help="torch CPU threads")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    arguments = parser.parse_args()
    entries = measure(arguments.rounds, arguments.threads, arguments.precision)
    print(f"{'':22}{'ratio':>7} {'min':>7} {'max':>7}   fedgraft           plain loop")
    for item in entries:
        figures = item["figures"]
        sides = [f"{figures[f'{side}_seconds']:6.2f} s {figures[f'{side}_tokens_per_second']:5} /s" for side in ("fedgraft", "plain")]
        print(f"{item['name']:22}{item['ratio']:7.3f} {item['min']:7.3f} {item['max']:7.3f}   {'   '.join(sides)}")
    results.write(entries)


if __name__ == "__main__":
    main()

"""The leaves of several clients side by side, so that the rows of one batch are each predicted with those of their own client.

C = clients, B = rows of the batch, L = tokens of a row, R = rows with a graft. Low-rank pairs are stacked and gathered by row; the frozen
weights of the source experts are not copied: each client's rows, next to each other, go through their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fedgraft.grafts.lora import LoraSettings, Pair, Pairs, Terms
from fedgraft.grafts.side_expert import GraftSettings, Side, projected
from fedgraft.moe.site import Arguments, Site

if TYPE_CHECKING:
    from fedgraft.grafts.graft import Fitted


class Rows:
    """Clients whose rows can stand in one batch, in evaluation mode. Holds one stacked copy of their low-rank pairs and gates."""

    def __init__(self, clients: Sequence[Fitted], graft: GraftSettings, lora: LoraSettings) -> None:
        """Stack the leaves.

        Raises:
            ValueError: what these clients adapt is in use for all rows of a batch, so they can't be mixed.
        """
        self._graft = graft
        if any(client.router or client.experts for client in clients):
            raise ValueError("adapted routers and routed experts are in use for all rows of a batch; predict client by client")
        heads = {head: None for client in clients for head in client.low_rank}
        self._low_rank = {head: _stacked_terms([client.low_rank.get(head) for client in clients], lora) for head in heads}
        self._sides = {
            layer: [_StackedSides([_at(client, layer, number) for client in clients], lora) for number in range(count)]
            for layer, count in _counts(clients).items()
        }

    def of(self, which: Sequence[int]) -> FittedRows:
        """What `GraftedModel.put` puts in use for a batch whose row i is of client `which[i]`."""
        device = next((pair[0].device for pair, _ in self._low_rank.values() if pair), torch.device("cpu"))
        index = torch.tensor(list(which), device=device)
        low_rank = {head: RowTerms(pair, dense, index) for head, (pair, dense) in self._low_rank.items()}
        sides: dict[int, list[RowSides]] = {}
        for layer, stacks in self._sides.items():
            found = [RowSides(stack, which, self._graft) for stack in stacks if any(stack.sides[client] for client in which)]
            if found:
                sides[layer] = found
        return FittedRows(low_rank=low_rank, sides=sides)


@dataclass(frozen=True)
class FittedRows:
    """What is in use for one batch, as `Fitted` for one client."""

    low_rank: dict[str, RowTerms]
    sides: dict[int, list[RowSides]]
    router: dict[int, Tensor] = field(default_factory=dict)
    experts: dict[int, dict[int, Pairs]] = field(default_factory=dict)


@dataclass(frozen=True)
class RowTerms:
    """What is added to the output of one linear layer, for every row by its client."""

    pair: Pair | None
    """A [C, r, in] and B [C, out, r], scales and shares within; zero where a client has less."""
    dense: list[Tensor | None]
    """A client's residual matrix [out, in]."""
    index: Tensor
    """The rows' clients [B]."""

    def add(self, output: Tensor, inputs: Tensor, settings: LoraSettings, training: bool) -> Tensor:
        """As `Terms.add`; the first dimension is the rows or, where a layer sees all tokens in one list, rows x tokens."""
        assert not training, "rows of several clients are for prediction"
        rows = len(self.index)
        x, total = inputs.reshape(rows, -1, inputs.shape[-1]), output.reshape(rows, -1, output.shape[-1])
        if self.pair is not None:
            index = self.index.to(self.pair[0].device)
            total = total + _low_rank(x, self.pair, index)
        for client, matrix in enumerate(self.dense):
            if matrix is not None:
                own = torch.where(self.index == client)[0].to(x.device)
                total = total.index_add(0, own, F.linear(x[own].to(matrix.dtype), matrix).to(total.dtype))
        return total.reshape(output.shape).to(output.dtype)


class _StackedSides:
    """The clients' grafts of one number in one layer; leaves stacked over the clients that have one."""

    def __init__(self, sides: Sequence[Side | None], lora: LoraSettings) -> None:
        self.sides = sides
        held = [side for side in sides if side is not None]
        self.places = {client: place for place, client in enumerate(client for client, side in enumerate(sides) if side is not None)}
        names = [] if "down.weight" in held[0].leaves else sorted({name.rpartition(".")[0] for name in held[0].leaves})
        self.pairs = {name: _padded([_scaled(_pair(side, name), lora.alpha) for side in held]) for name in names}
        gates = [side.gate for side in held if side.gate is not None]
        biases = [side.bias for side in held if side.bias is not None]
        self.gates = torch.stack(gates)[:, :, None] if gates else None
        self.biases = torch.stack(biases)[:, None, None] if biases else None


class RowSides:
    """The grafts of one number in one layer, in use for the rows of a batch; rows of clients without are left alone."""

    def __init__(self, stack: _StackedSides, which: Sequence[int], graft: GraftSettings) -> None:
        """Bring the rows of each client together."""
        self.stack, self.graft, self.rows = stack, graft, len(which)
        order = sorted((row for row, client in enumerate(which) if stack.sides[client]), key=lambda row: which[row])
        clients = [which[row] for row in order]
        self._order = torch.tensor(order)
        self._index = torch.tensor([stack.places[client] for client in clients])
        starts = [at for at, client in enumerate(clients) if at == 0 or clients[at - 1] != client]
        self._groups: list[tuple[Side, int, int]] = []
        for first, end in pairwise([*starts, len(clients)]):
            side = stack.sides[clients[first]]
            assert side is not None
            self._groups.append((side, first, end))

    def added(self, site: Site, call: Arguments) -> Tensor:
        """What is added to the routed output [T, H], as by `SideExperts` for each client alone; T = B L."""
        flat = site.inputs(call)
        x = flat.reshape(self.rows, -1, flat.shape[-1])
        order, index = self._order.to(x.device), self._index.to(x.device)
        own = x[order]
        extra = self._expert(own, index)
        if self.graft.form != "faithful":
            extra = extra - self._each(lambda side, part: side.source(part), own)
        share = self._router_share(site, call, order) if self.graft.form == "in_place" else self._gate(own, index)
        if share is not None:
            extra = share * extra
        return torch.zeros_like(x, dtype=extra.dtype).index_copy(0, order, extra).reshape(flat.shape)

    def _expert(self, x: Tensor, index: Tensor) -> Tensor:
        """E_g(x) [R, L, H]."""
        first, pairs = self._groups[0][0], self.stack.pairs
        parts = [projected(side, x[start:end]) for side, start, end in self._groups]
        gates = [gate for gate, _ in parts if gate is not None]
        gate, up = torch.cat(gates) if gates else None, torch.cat([up for _, up in parts])
        if pairs:
            gate = None if gate is None else gate + _low_rank(x, pairs["gate"], index).to(gate.dtype)
            up = up + _low_rank(x, pairs["up"], index).to(up.dtype)
        hidden = first.source.activate(gate, up)
        down = self._each(lambda side, part: F.linear(part, side.down.to(part.dtype), side.source.down_bias), hidden)
        return down + _low_rank(hidden, pairs["down"], index).to(down.dtype) if pairs else down

    def _each(self, run: Callable[[Side, Tensor], Tensor], x: Tensor) -> Tensor:
        return torch.cat([run(side, x[start:end]) for side, start, end in self._groups])

    def _gate(self, x: Tensor, index: Tensor) -> Tensor | None:
        """sigmoid(g.x) [R, L, 1] of every row's own gate; None without gates."""
        gates, biases = self.stack.gates, self.stack.biases
        if gates is None:
            return None
        logits = torch.bmm(x.to(gates.dtype), gates[index])
        return torch.sigmoid(logits if biases is None else logits + biases[index])

    def _router_share(self, site: Site, call: Arguments, order: Tensor) -> Tensor:
        """The router's weight [R, L, 1] of each row's source expert, zero where it is not among the token's top k."""
        chosen, weight = (part.reshape(self.rows, -1, part.shape[-1])[order] for part in site.routing(site, call))
        numbers = torch.cat([torch.full((end - start,), side.number, device=order.device) for side, start, end in self._groups])
        return ((chosen == numbers[:, None, None]) * weight).sum(-1, keepdim=True)


def _stacked_terms(terms: Sequence[Terms | None], lora: LoraSettings) -> tuple[Pair | None, list[Tensor | None]]:
    """One pair per client that holds all its low-rank terms, and its dense residual."""
    pairs: list[Pair | None] = []
    dense: list[Tensor | None] = []
    for term in terms:
        own: list[Pair] = []
        if term is not None:
            if any(share.dim() for share in term.shares.values()):
                raise ValueError("adapters blended row by row can't stand in one batch with other clients'")
            for head, pair in term.pairs.items():
                factor_a, factor_b = _scaled(pair, lora.alpha)
                own.append((factor_a, factor_b * term.shares[head] if head in term.shares else factor_b))
            if len(term.residual) == 2:
                own.append(term.residual)
        pairs.append((torch.cat([a for a, _ in own]), torch.cat([b for _, b in own], 1)) if own else None)
        dense.append(term.residual[0] if term is not None and len(term.residual) == 1 else None)
    return (_padded(pairs) if any(pairs) else None), dense


def _padded(pairs: Sequence[Pair | None]) -> Pair:
    """A [C, r, in] and B [C, out, r] with r the highest rank; zeros in the place of what is less."""
    some = next(pair for pair in pairs if pair is not None)
    rank = max(len(pair[0]) for pair in pairs if pair is not None)
    stacked_a = some[0].new_zeros(len(pairs), rank, some[0].shape[1])
    stacked_b = some[1].new_zeros(len(pairs), some[1].shape[0], rank)
    for client, pair in enumerate(pairs):
        if pair is not None:
            stacked_a[client, : len(pair[0])], stacked_b[client, :, : len(pair[0])] = pair[0].detach(), pair[1].detach()
    return stacked_a, stacked_b


def _scaled(pair: Pair, alpha: float) -> Pair:
    return pair[0], pair[1] * (alpha / len(pair[0]))


def _pair(side: Side, name: str) -> Pair:
    return side.leaves[f"{name}.A"], side.leaves[f"{name}.B"]


def _low_rank(x: Tensor, pair: Pair, index: Tensor) -> Tensor:
    """B A x [B, L, out] with every row's own pair, for x [B, L, in] and the rows' clients [B]."""
    factor_a, factor_b = pair[0][index], pair[1][index]
    return torch.bmm(torch.bmm(x.to(factor_a.dtype), factor_a.mT), factor_b.mT)


def _at(client: Fitted, layer: int, number: int) -> Side | None:
    return next((side for side in client.sides.get(layer, []) if side.place == (layer, number)), None)


def _counts(clients: Sequence[Fitted]) -> dict[int, int]:
    """Layer -> grafts in it, over all clients."""
    places = [side.place for client in clients for sides in client.sides.values() for side in sides]
    return {layer: 1 + max(number for at, number in places if at == layer) for layer in sorted({layer for layer, _ in places})}

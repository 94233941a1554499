"""What one client's calibration text says about the experts of every MoE layer, from one streaming pass over the unmodified model.

Notation (FLEx, arXiv 2506.00965, after NAEE, arXiv 2402.14800): X [T, H] are the inputs of a layer over T real tokens, O_e = E_e(X)
[T, H] the output of expert e for all of them, R = sum over the chosen experts of w_i O_i the routed output. L = MoE layers, E = experts
per layer, k = experts per token, I = expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedgraft.moe.load import Base
from fedgraft.moe.routing import normalised, watching
from fedgraft.moe.site import Routed, Site

GRAM_BYTES = 2 << 30
"""Most memory that the per-token Gram matrices of a profile may take."""
CHUNK_BYTES = 1 << 28
"""Most memory for the expert outputs that are held at once while Gram matrices are computed."""


class Tokens(Protocol):
    """A batch as `measure` reads it."""

    @property
    def ids(self) -> Tensor:
        """Token ids [B, T]."""

    @property
    def mask(self) -> Tensor:
        """[B, T], nonzero at real tokens, zero at padding."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Sums over the calibration tokens, float64 on the CPU. R has top-k weights normalised to sum 1, in `raw_*` the model's own."""

    full_sq_L: Tensor
    """||R||_F^2 [L]"""
    output_sq_LE: Tensor
    """||O_e||_F^2 [L, E]"""
    dot_LE: Tensor
    """<R, O_e> [L, E]"""
    raw_full_sq_L: Tensor
    """||R||_F^2 with the model's own top-k weights [L]"""
    raw_dot_LE: Tensor
    """<R, O_e> with the model's own top-k weights [L, E]"""
    count_LE: Tensor
    """How many tokens have expert e among their top k [L, E]"""
    mass_LE: Tensor
    """Sum of the top-k weights of expert e, as the family computes them [L, E]"""
    strength_LE: Tensor
    """Sum of w_e ||E_e(x)|| over the tokens that have expert e among their top k, w_e as the family computes it [L, E]"""
    tokens: int
    """Real tokens seen"""
    token_scores: Tensor | None = None
    """Router probabilities over all experts [L, tokens, E], float32; only with `gram`, as the next two"""
    token_dot: Tensor | None = None
    """<R(x), O_e(x)> [L, tokens, E], float64"""
    token_gram: Tensor | None = None
    """<O_i(x), O_j(x)> [L, tokens, E, E], float32"""

    @property
    def error_LE(self) -> Tensor:
        """||R - O_e||_F^2 [L, E]: what is lost when expert e alone stands for the whole routed part."""
        return self.full_sq_L[:, None] - 2 * self.dot_LE + self.output_sq_LE


def measure(
    base: Base, batches: Iterable[Tokens], tokens: int, gram: bool = False, progress: Callable[[int], None] | None = None
) -> Profile:
    """Profile the first `tokens` real tokens of `batches` (all of them when there are fewer), row by row; padding does not count.

    Every expert runs on every token: E/k times the routed forward's work, O(tokens of a batch x (I + H)) memory beside the sums.

    Args:
        base: the unmodified model, in eval mode.
        batches: what the client's own text gives; no more batches are drawn than needed.
        tokens: the budget in real tokens.
        gram: also keep what scoring subsets of experts needs, 4 L E^2 bytes a token.
        progress: called with the tokens seen so far, after each batch.

    Raises:
        ValueError: a budget below 1, no real token, outputs that are not finite, or Gram matrices beyond `GRAM_BYTES`.
    """
    assert not base.model.training, "calibration runs the model as it predicts: call eval() first"
    check_budget(base.sites, tokens, gram)
    meter = Meter(base, tokens, gram)
    with torch.no_grad(), watching(base.sites, meter.see):
        for part in parts(batches, tokens, base.device):
            meter.take(part)
            if part.tokens:
                base.model.base_model(input_ids=part.ids, attention_mask=part.mask, use_cache=False)
            if progress is not None:
                progress(meter.seen)
    return meter.profile()


@dataclass(frozen=True, kw_only=True)
class Part:
    """A batch, and what of it is within a budget of tokens."""

    ids: Tensor
    """[B, T]"""
    mask: Tensor
    """[B, T] int64, 1 at real tokens"""
    real: Tensor
    """[B * T] bool, the tokens that count"""
    before: int
    """Tokens that counted in earlier batches"""

    @property
    def tokens(self) -> int:
        """How many count."""
        return int(self.real.sum())


def parts(batches: Iterable[Tokens], tokens: int, device: torch.device) -> Iterator[Part]:
    """The batches on a device, until `tokens` real tokens have come; no more are drawn."""
    seen = 0
    for batch in batches:
        mask = batch.mask.to(device) != 0
        part = Part(ids=batch.ids.to(device), mask=mask.long(), real=_first(mask.flatten(), tokens - seen), before=seen)
        seen += part.tokens
        yield part
        if seen == tokens:
            return


def check_budget(sites: list[Site], tokens: int, gram: bool) -> None:
    """Refuse a budget below 1, or Gram matrices beyond `GRAM_BYTES`.

    Raises:
        ValueError: with the budget that fits.
    """
    if tokens < 1:
        raise ValueError(f"selection.tokens is {tokens}; calibration needs at least 1 token")
    per_token = sum(4 * site.num_experts**2 for site in sites)
    if gram and tokens * per_token > GRAM_BYTES:
        raise ValueError(
            f"choosing several experts jointly would keep {tokens * per_token / 2**30:.1f} GiB for {tokens:,} calibration tokens (at most "
            f"{GRAM_BYTES / 2**30:.0f}); lower selection.tokens to {GRAM_BYTES // per_token:,} or graft one expert per layer"
        )


def _first(real: Tensor, budget: int) -> Tensor:
    """The mask [N] without the real tokens beyond the first `budget`."""
    return real & (real.cumsum(0) <= budget)


class Meter:
    """The running sums of one client."""

    def __init__(self, base: Base, tokens: int, gram: bool) -> None:
        layers, experts = len(base.sites), base.sites[0].num_experts
        self.base, self.gram = base, gram
        self.slot = {site.path: number for number, site in enumerate(base.sites)}
        self.real = torch.zeros(0, dtype=torch.bool)
        self.before = self.seen = 0
        self.full = torch.zeros(2, layers, dtype=torch.float64)  # R normalised, R raw
        self.per_expert = torch.zeros(6, layers, experts, dtype=torch.float64)  # ||O||^2, <R, O>, raw <R, O>, count, mass, strength
        kept = tokens if gram else 0
        self.token_scores = torch.empty(layers, kept, experts)
        self.token_dot = torch.empty(layers, kept, experts, dtype=torch.float64)
        self.token_gram = torch.empty(layers, kept, experts, experts)

    def take(self, part: Part) -> None:
        """The forwards that follow are of this part; it may come again for another layer."""
        self.real, self.before = part.real, part.before
        self.seen = max(self.seen, part.before + part.tokens)

    def see(self, site: Site, routed: Routed) -> None:
        """Add the real tokens of one layer's forward."""
        real = self.real.to(routed.x.device)
        x, index, weight = routed.x[real], routed.index[real], routed.weight[real].double()
        rows = max(1, CHUNK_BYTES // (8 * site.num_experts * x.shape[1])) if self.gram else len(x)
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            self._add(site, self.before + start, x[part], index[part], weight[part])

    def _add(self, site: Site, start: int, x: Tensor, index: Tensor, weight: Tensor) -> None:
        """Add tokens `start`, `start` + 1, ... of the pass."""
        layer, experts = self.slot[site.path], range(site.num_experts)
        run = [self.base.family.expert(site, number) for number in experts]
        stacked = torch.stack([expert(x) for expert in run], 1) if self.gram else None  # [T, E, H]

        def output(number: int, rows: Tensor | slice) -> Tensor:
            return (run[number](x[rows]) if stacked is None else stacked[rows, number]).double()

        full = _routed(x.shape, index, normalised(weight), output, experts)
        if site.identity:
            full += (normalised(weight) * (index >= site.num_experts)).sum(-1, keepdim=True) * x.double()
        scale, full_sq = weight.sum(-1), full.square().sum(-1)  # raw R(x) = scale * normalised R(x)
        square, dot = torch.empty(2, len(x), len(experts), dtype=torch.float64, device=x.device)
        for number in experts:
            out = output(number, slice(None))
            square[:, number] = out.square().sum(-1)
            dot[:, number] = (full * out).sum(-1)
        own = index.clamp(max=site.num_experts)  # whatever stands behind the experts is counted in a column that is dropped
        columns = torch.zeros(len(x), site.num_experts + 1, dtype=torch.float64, device=x.device)
        chosen, mass = columns.scatter(1, own, 1.0)[:, :-1], columns.scatter_add(1, own, weight)[:, :-1]
        sums = (square, dot, scale[:, None] * dot, chosen, mass, mass * square.sqrt())
        self.per_expert[:, layer] += torch.stack([each.sum(0) for each in sums]).cpu()
        self.full[:, layer] += torch.stack((full_sq.sum(), (scale.square() * full_sq).sum())).cpu()
        if stacked is not None:
            tokens = slice(start, start + len(x))
            outputs = stacked if stacked.dtype == torch.float64 else stacked.float()
            self.token_scores[layer, tokens] = self.base.family.scores(site, x, index, weight).float().cpu()
            self.token_dot[layer, tokens] = dot.cpu()
            self.token_gram[layer, tokens] = (outputs @ outputs.mT).float().cpu()

    def profile(self) -> Profile:
        """The sums so far."""
        if not self.seen:
            raise ValueError("calibration saw no real token: the batches are empty or all padding")
        finite = self.per_expert.isfinite().all(-1).all(0) & self.full.isfinite().all(0)
        if not bool(finite.all()):
            path = self.base.sites[int((~finite).nonzero()[0])].path
            raise ValueError(f"{path}: expert outputs are not finite in {self.base.model.dtype}; try model.dtype: float32")
        square, dot, raw_dot, count, mass, strength = self.per_expert.unbind()
        kept = slice(self.seen)
        return Profile(
            full_sq_L=self.full[0],
            output_sq_LE=square,
            dot_LE=dot,
            raw_full_sq_L=self.full[1],
            raw_dot_LE=raw_dot,
            count_LE=count,
            mass_LE=mass,
            strength_LE=strength,
            tokens=self.seen,
            token_scores=self.token_scores[:, kept] if self.gram else None,
            token_dot=self.token_dot[:, kept] if self.gram else None,
            token_gram=self.token_gram[:, kept] if self.gram else None,
        )


def _routed(shape: torch.Size, index: Tensor, weight: Tensor, output: Callable[[int, Tensor | slice], Tensor], experts: range) -> Tensor:
    """R [T, H] in float64: the weighted outputs of the chosen experts `index` [T, k]."""
    total = torch.zeros(shape, dtype=torch.float64, device=index.device)
    for number in experts:
        token, place = torch.where(index == number)
        if len(token):
            total.index_add_(0, token, weight[token, place, None] * output(number, token))
    return total

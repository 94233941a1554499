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
from fedgraft.moe.reading import reading
from fedgraft.moe.routing import normalised
from fedgraft.moe.site import Site

GRAM_BYTES = 2 << 30
"""Most memory that the per-token Gram matrices of a profile may take."""
CHUNK_BYTES = 1 << 28
"""Most memory for the outputs of all experts that are held at once."""
CHUNK_TOKENS = 1024
"""Outputs are held only where so many tokens find room; matrix products of fewer are slow, and running the chosen experts again is not."""


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

    Every expert runs on every token, once where `CHUNK_BYTES` hold what they give, else the chosen ones twice. In fp32 the routed output is
    made of that, so that the pass costs a forward and E/k - 1 times its routed experts; in 16 bits they run by themselves as well, so that
    later layers see what they see in use. Sums over H are taken in the model's precision, at least fp32, which is that of the summands;
    sums over tokens in float64. Memory beside the sums is O(tokens of a batch x (I + H)) and at most `CHUNK_BYTES`.

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
    with torch.no_grad(), reading(base, meter.see):
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

    def see(self, site: Site, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Add the real tokens of one layer's forward; returns the routed output [T, H], zeros at all others."""
        real = self.real.to(x.device).nonzero().flatten()
        routed = torch.zeros_like(x)
        rows = CHUNK_BYTES // (x.element_size() * site.num_experts * x.shape[1])
        held = self.gram or rows >= CHUNK_TOKENS
        start = self.before
        for part in real.split(max(1, rows) if held else max(1, len(real))):
            routed[part] = self._add(site, start, x[part], index[part], weight[part].double(), held).to(x.dtype)
            start += len(part)
        return routed

    def _add(self, site: Site, start: int, x: Tensor, index: Tensor, weight: Tensor, held: bool) -> Tensor:
        """Add tokens `start`, `start` + 1, ... of the pass, outputs `held` or not; returns R with the model's own weights."""
        layer, experts, precise = self.slot[site.path], range(site.num_experts), torch.promote_types(x.dtype, torch.float32)
        kept = x.new_empty(len(experts), *x.shape) if held else None  # [E, T, H]

        def output(number: int, rows: Tensor | slice) -> Tensor:
            return (self.base.family.expert(site, number)(x[rows]) if kept is None else kept[number, rows]).to(precise)

        own = index.clamp(max=site.num_experts)  # whatever stands behind the experts is counted in a column that is dropped
        columns = torch.zeros(len(x), site.num_experts + 1, dtype=torch.float64, device=x.device)
        chosen, mass = columns.scatter(1, own, 1.0)[:, :-1], columns.scatter_add(1, own, weight)[:, :-1]
        unit = normalised(weight)
        if kept is None:
            full = _routed(x, index, unit.to(precise), output, experts)
        else:
            full = x.new_zeros(x.shape, dtype=precise)
            shares = columns.scatter_add(1, own, unit).to(precise)
            for number in experts:
                kept[number] = self.base.family.expert(site, number)(x)
                full.addcmul_(output(number, slice(None)), shares[:, number, None])
        if site.identity:
            full += (unit * (index >= site.num_experts)).sum(-1, keepdim=True).to(precise) * x
        norms, dots = torch.empty(2, len(experts), len(x), dtype=precise, device=x.device)
        for number in experts:
            out = output(number, slice(None))
            norms[number], dots[number] = torch.linalg.vector_norm(out, dim=-1), torch.linalg.vecdot(full, out)
        norm, dot = norms.T.double(), dots.T.double()
        scale, full_sq = weight.sum(-1), full.norm(dim=-1).double().square()  # raw R(x) = scale * normalised R(x)
        sums = (norm.square(), dot, scale[:, None] * dot, chosen, mass, mass * norm)
        self.per_expert[:, layer] += torch.stack([each.sum(0) for each in sums]).cpu()
        self.full[:, layer] += torch.stack((full_sq.sum(), (scale.square() * full_sq).sum())).cpu()
        if self.gram and kept is not None:
            tokens = slice(start, start + len(x))
            outputs = kept.transpose(0, 1).to(precise)  # [T, E, H]
            self.token_scores[layer, tokens] = self.base.family.scores(site, x, index, weight).float().cpu()
            self.token_dot[layer, tokens] = dot.cpu()
            self.token_gram[layer, tokens] = (outputs @ outputs.mT).float().cpu()
        return scale[:, None] * full

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


def _routed(x: Tensor, index: Tensor, weight: Tensor, output: Callable[[int, Tensor | slice], Tensor], experts: range) -> Tensor:
    """R [T, H] in the precision of `weight` [T, k]: the weighted outputs of the chosen experts `index` [T, k]."""
    total = x.new_zeros(x.shape, dtype=weight.dtype)
    for number in experts:
        token, place = torch.where(index == number)
        if len(token):
            total.index_add_(0, token, weight[token, place, None] * output(number, token))
    return total

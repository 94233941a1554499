"""Noise from secrets: normal, by name, the same again, and readable by nobody else."""

from __future__ import annotations

import hashlib
import math
import os
import stat
from fractions import Fraction

import numpy as np
import pytest
import torch

from fedgraft.transforms import noise
from fedgraft.transforms.noise import SECRET, Noise, drawn, keep, kept, seeded


def test_numbers_are_the_inverse_distribution_of_shake_256():
    """By hand for the first of a stream: 52 of its 64 bits and a half, through the standard library's normal distribution."""
    from statistics import NormalDist

    word = int.from_bytes(hashlib.shake_256((3).to_bytes(8, "big") + b"key" + b"sum\x1f7").digest(8), "little")
    at = ((word >> 12) + 0.5) / 2**52
    assert Noise(b"key").uniform(1, "sum", 7)[0] == at
    assert float(Noise(b"key").normal((1,), "sum", 7)) == pytest.approx(NormalDist().inv_cdf(at), rel=1e-12)


def test_numbers_are_standard_normal():
    """Of 200,000: mean within 5 / sqrt(n) of 0, variance within 5 sqrt(2 / n) of 1, Kolmogorov's distance below 1.95 / sqrt(n)."""
    from scipy.stats import kstest

    found = seeded(0).normal((400, 500), "x")
    count = found.numel()
    assert found.dtype == torch.float64
    assert abs(float(found.mean())) < 5 / count**0.5
    assert abs(float(found.var()) - 1) < 5 * (2 / count) ** 0.5
    assert kstest(found.flatten().numpy(), "norm").statistic < 1.95 / count**0.5


def by_hand(words: list[int], variance: int) -> int | None:
    """Canonne, Kamath and Steinke's Algorithm 3 for one candidate, in exact fractions but for the two exponentials."""
    scale = math.isqrt(variance) + 1
    rest, runs, laplace, gaussian = words
    if rest >= 2**64 - 2**64 % scale or Fraction(laplace >> 1, 2**63) >= math.exp(-(rest % scale) / scale):
        return None
    size = rest % scale + scale * sum(runs < int(math.exp(-length) * 2.0**64) for length in range(1, 43))
    negative = laplace % 2 == 1
    if negative and size == 0:
        return None
    away = Fraction(size) - Fraction(variance, scale)
    stays = Fraction(gaussian >> 1, 2**63) < math.exp(-float(away * away / (2 * variance)))
    return (-size if negative else size) if stays else None


@pytest.mark.parametrize("variance", [1, 7, 10**6 + 3, 10**21])
def test_whole_numbers_are_those_of_the_algorithm_one_by_one(variance):
    content = hashlib.shake_256((3).to_bytes(8, "big") + b"key" + b"sum\x1f0").digest(4 * 8 * (5 * 8 // 2 + 16))
    words = np.frombuffer(content, "<u8").reshape(4, -1).T.tolist()
    kept_by_hand = [number for column in words if (number := by_hand(column, variance)) is not None]
    assert Noise(b"key").whole(8, variance, "sum").tolist() == kept_by_hand[:8]


def test_whole_numbers_are_discrete_gaussian():
    """Of 100,000: chi-square against exp(-k^2 / 2 v) / sum where 5 are due or more; the variance within 5 sqrt(2 / n); in several goes."""
    count = 100_000
    for variance in (1, 4, 30):
        found = seeded(0).whole(count, variance, "x")
        assert found.dtype == np.int64
        ks = np.arange(-80, 81)
        due = np.exp(-(ks**2) / (2 * variance))
        due *= count / due.sum()
        frequent = due >= 5
        counts = np.array([np.count_nonzero(found == k) for k in ks])
        statistic = float(((counts - due)[frequent] ** 2 / due[frequent]).sum())
        freedom = int(frequent.sum()) - 1
        assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)
        assert counts[~frequent].sum() < 30
    for variance in (10**10, 10**20):  # where neighbours are as good as equally probable, also their last digits
        found = seeded(0).whole(count, variance, "x")
        assert abs((found.astype(float) ** 2).mean() / variance - 1) < 5 * (2 / count) ** 0.5
        assert abs(found.astype(float).mean() / variance**0.5) < 5 / count**0.5
        assert abs(np.count_nonzero(found % 2) / count - 0.5) < 5 / (2 * count**0.5)


def test_many_whole_numbers_are_drawn_in_parts(monkeypatch):
    monkeypatch.setattr(noise, "AT_ONCE", 64)
    found = seeded(0).whole(1000, 100, "x")
    assert len(found) == 1000
    assert np.array_equal(found[:100], seeded(0).whole(100, 100, "x")[:100])
    assert len({tuple(found[at : at + 20]) for at in range(0, 1000, 20)}) == 50
    assert seeded(0).whole(0, 100, "x").tolist() == []


def test_streams_of_other_names_or_secrets_are_others():
    sources = [(seeded(0), 1), (seeded(0), 2), (seeded(1), 1), (drawn(), 1), (seeded(0).below("b"), 1), (seeded(0, "b"), 1)]
    streams = [source.normal((64,), "a", number) for source, number in sources]
    assert len({tuple(stream.tolist()) for stream in streams}) == len(streams)
    assert torch.equal(seeded(0).normal((64,), "a", 1), streams[0])
    assert not np.isclose(np.corrcoef(streams[0], streams[1])[0, 1], 1)


def test_the_ends_of_the_interval_are_never_drawn(monkeypatch):
    for byte in (b"\x00", b"\xff"):
        monkeypatch.setattr(Noise, "_bytes", lambda self, count, *stream, byte=byte: byte * count)
        assert 0 < Noise(b"").uniform(1)[0] < 1
        assert Noise(b"").normal((1,)).isfinite().all()


def test_a_secret_is_kept_for_its_owner_alone_and_never_shown(tmp_path):
    assert kept(tmp_path / "run") is None
    own = drawn()
    keep(tmp_path / "run", own)
    assert kept(tmp_path / "run") == own
    assert own.secret.hex() not in repr(own)
    if os.name == "posix":
        assert stat.S_IMODE((tmp_path / "run" / SECRET).stat().st_mode) == 0o600
    assert len({drawn().secret for _ in range(8)}) == 8
    assert noise.seeded(3).seed("x") < 2**63

"""Noise from secrets: normal, by name, the same again, and readable by nobody else."""

from __future__ import annotations

import hashlib
import os
import stat

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

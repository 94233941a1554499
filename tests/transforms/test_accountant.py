"""Epsilon: the library's own, at settings that textbooks have, and by hand where that is possible."""

from __future__ import annotations

import builtins
import math

import pytest

from fedgraft.transforms.accountant import check_installed, epsilon

pytest.importorskip("opacus", reason="extra privacy")

TEXTBOOK = [
    # (noise multiplier, rate, steps, delta)
    (1.1, 256 / 60_000, 60 * 60_000 // 256, 1e-5),  # MNIST of the TensorFlow Privacy tutorial: 60 epochs of batches of 256
    (4.0, 0.01, 10_000, 1e-5),  # Abadi et al. 2016, section 3.2: q = 0.01, sigma = 4, 10,000 steps: about 1.26
    (1.0, 1.0, 10, 1e-6),  # the Gaussian mechanism ten times, without sampling
]


@pytest.mark.parametrize(("multiplier", "rate", "steps", "delta"), TEXTBOOK)
@pytest.mark.filterwarnings("ignore:Optimal order")
def test_epsilon_is_the_librarys_own(multiplier, rate, steps, delta):
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    for _ in range(steps):
        accountant.step(noise_multiplier=multiplier, sample_rate=rate)
    assert epsilon(noise_multiplier=multiplier, rate=rate, steps=steps, delta=delta) == accountant.get_epsilon(delta)


def test_epsilon_is_what_the_papers_say():
    """Abadi et al. state (1.26, 1e-5); the conversion of 2020 gives a little less. Without sampling: the minimum over orders by hand."""
    assert epsilon(noise_multiplier=4.0, rate=0.01, steps=10_000, delta=1e-5) == pytest.approx(1.26, abs=0.35)
    orders = [1 + at / 10 for at in range(1, 100)] + list(range(12, 64))
    hand = min(10 * a / 2 - (math.log(1e-6) + math.log(a)) / (a - 1) + math.log((a - 1) / a) for a in orders)
    assert epsilon(noise_multiplier=1.0, rate=1.0, steps=10, delta=1e-6) == pytest.approx(hand, rel=1e-12)


def test_epsilon_grows_with_rounds_and_rate_and_falls_with_noise():
    def found(noise_multiplier=1.0, rate=0.1, steps=100):
        return epsilon(noise_multiplier=noise_multiplier, rate=rate, steps=steps, delta=1e-5)

    assert found(steps=0) == 0
    assert found(noise_multiplier=0) == math.inf
    assert found(steps=50) < found() < found(steps=200)
    assert found(rate=0.05) < found() < found(rate=1.0)
    assert found(noise_multiplier=2.0) < found()


def test_without_the_library_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def refusing(name, *rest, **options):
        if name.startswith("opacus"):
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", refusing)
    with pytest.raises(ValueError, match=r"pip install 'fedgraft\[privacy\]'"):
        check_installed()
    assert epsilon(noise_multiplier=0, rate=1, steps=3, delta=1e-5) == math.inf, "without noise there is nothing to compute"

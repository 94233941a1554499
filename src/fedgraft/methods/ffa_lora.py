"""FFA-LoRA (Sun et al. 2024, arXiv 2403.12313, section 3): A stays as it was drawn, only B is trained and shared."""

from __future__ import annotations

from fedgraft.methods.method import Method
from fedgraft.training.personal_rules import around


def build() -> Method:
    """With A the same on every client and fixed, the mean of B A is the mean of B times A, so averaging is exact.

    Every client draws A from the run's seed, so it never travels. A pair has out x rank trained parameters; compare with other methods at
    equal trainable parameters by raising `lora.rank` (to twice theirs on square projections).
    """
    return Method(personal=_drawn, frozen=_drawn, local=around(_drawn))


def _drawn(key: str) -> bool:
    return key.endswith(".A")

"""How long training takes: its FLOPs by what this machine's matrix products run at, measured in a fraction of a second."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from fedgraft.account.take import Account

PROBE_SECONDS = 0.2
SIDE = {"cpu": 768, "cuda": 4096}
"""Rows and columns of the probe's matrices."""
SHARE = 0.5
"""Of the probe's rate that training reaches, small products, softmax and norms included; measured with the embedded base on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Seconds of a run's phases, evaluation left out; an order of magnitude, on a machine that does nothing else."""

    rate: float
    """FLOPs per second of a large matrix product."""
    selection: float
    """Choosing experts, all clients together; once."""
    round: float
    """Training of one round, all its clients one after another."""
    rounds: int

    @property
    def total(self) -> float:
        """Seconds of selection and all rounds."""
        return self.selection + self.rounds * self.round


def probe_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of a matrix product here."""
    side = SIDE.get(device.type, SIDE["cpu"])
    left, right = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    left @ right  # warm up
    _wait(device)
    began, times = time.perf_counter(), 0
    while (taken := time.perf_counter() - began) < PROBE_SECONDS or times == 0:
        left @ right
        _wait(device)
        times += 1
    return 2 * side**3 * times / max(taken, 1e-9)


def forecast(account: Account, rate: float, *, clients: int, per_round: int, rounds: int, tokens: float, calibration: int) -> Forecast:
    """Seconds to expect.

    A frozen matrix costs one product forward and one backward (towards its input), checkpointing a further one forward; a trained one costs
    one more, for its own gradient.

    Args:
        account: what is trained.
        rate: FLOPs per second of a matrix product.
        clients: of the run.
        per_round: clients that train in a round.
        rounds: of the run.
        tokens: that a client trains on in a round, padding included.
        calibration: tokens that a client chooses its experts with; 0 without selection.
    """
    compute = account.compute
    products = 2 + account.work.checkpointing
    per_token = products * compute.grafted + compute.adapters + compute.graft
    reached = rate * SHARE
    return Forecast(
        rate=rate,
        selection=clients * calibration * (compute.base + compute.selection) / reached,
        round=account.passes * per_round * tokens * per_token / reached,
        rounds=rounds,
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""The recipe section `federation`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeInt

from fedgraft.aggregation.robust import Mean, MergeSettings
from fedgraft.settings import Section


class FederationSettings(Section):
    """Rounds, participation and how replies are merged; the defaults are the paper's, in which nobody is ever missing."""

    rounds: int = Field(default=100, ge=0)
    """Communication rounds."""
    clients_per_round: int | None = Field(default=None, ge=1)
    """Clients sampled in each round, without replacement; empty: all."""
    merge: MergeSettings = Mean()
    """How many replies become one: the method's own mean, or a rule that withstands faulty clients and counts each once. `trimmed_mean`
    cuts the share `trim` of the clients from each end of every number; `krum` takes the update nearest to its neighbours and
    `multi_krum` the mean of the `keep` best (empty: all but `faulty` + 2), with `faulty` clients to withstand; `norm_bounded` scales
    longer updates down to `bound`."""
    norm_limit: float | None = Field(default=None, gt=0)
    """Largest Euclidean norm of a client's change of all shared leaves; a reply with a longer one is lost by name (empty: any)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability that a sampled client cannot be reached in a round; it isn't asked and doesn't train."""
    deadline: float | None = Field(default=None, gt=0)
    """Simulated seconds the coordinator waits in a round; a later client has trained and keeps what it learnt, but its reply is lost."""
    step_seconds: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (1.0, 4.0)
    """Simulated seconds that an optimiser step takes on the fastest and on the slowest client; drawn log-uniformly for each client."""
    jitter: float = Field(default=0.0, ge=0)
    """Standard deviation of the logarithm of a client's speed from round to round."""
    join: NonNegativeInt | dict[str, NonNegativeInt] = 0
    """First round, counted from 0, that a client can be asked in: by name (the others from the start), or a number up to which each draws
    its own."""

    def clients_of(self, count: int) -> int:
        """Clients sampled in a round from so many."""
        return min(self.clients_per_round or count, count)

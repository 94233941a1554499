"""The client's half of all transforms, in their order: train (by rows), clip, noise, leave out what is not told, compress; or mask.

Under masks a change is clipped and noised as the whole numbers that are masked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedgraft.transforms import noise
from fedgraft.transforms.client_privacy import clipped
from fedgraft.transforms.compression import CompressionSettings, compressed
from fedgraft.transforms.example_privacy import by_rows
from fedgraft.transforms.noise import Noise
from fedgraft.transforms.privacy import ClientPrivacy, ExamplePrivacy, NoPrivacy, Question, discreet
from fedgraft.transforms.secure_aggregation.client import masked_questions
from fedgraft.transforms.secure_aggregation.contribution import Contribution
from fedgraft.transforms.secure_aggregation.settings import NoSecureAggregation, SecureAggregationSettings


@dataclass(frozen=True, kw_only=True)
class Sending:
    """What clients of one process send in a run."""

    privacy: NoPrivacy | ClientPrivacy | ExamplePrivacy
    compression: CompressionSettings
    secure: SecureAggregationSettings
    seed: int
    """The recipe's."""
    memories: Path
    """Folder of the client memories, beside which a client's secret lies."""
    discreet: bool
    """The coordinator is somebody else: noise is secret, and figures are not told unasked."""

    def questions(self, questions: Mapping[str, Question], weight: Callable[[int], int] | None) -> dict[str, Question]:
        """All that a client can be asked, by name, with replies as they are sent.

        Args:
            questions: with replies as the method makes them.
            weight: as `Merge.weight`.
        """
        train, masked = questions["train"], not isinstance(self.secure, NoSecureAggregation)
        if isinstance(self.privacy, ExamplePrivacy):
            train = by_rows(self.privacy, self.noise_of, train)
        if isinstance(self.privacy, ClientPrivacy) and not masked:
            train = clipped(self.privacy, self.noise_of, train)
        told = discreet(self.privacy, {**questions, "train": train}, measured=not self.discreet)
        sent = {**told, "train": compressed(self.compression, told["train"])}
        contribution = Contribution.of(self.privacy, self.noise_of) if masked else None
        return masked_questions(self.secure, sent, weight, self.memories.parent, contribution)  # the outermost, so nothing comes after

    def noise_of(self, client: str) -> Noise:
        """A client's own noise: of a secret beside its memory, or of the recipe's seed."""
        if not self.discreet and (isinstance(self.privacy, NoPrivacy) or not self.privacy.secret):
            return noise.seeded(self.seed, "client", client)
        own = noise.kept(self.memories / client)
        if own is None:
            own = noise.drawn()
            noise.keep(self.memories / client, own)
        return own

    @property
    def hides_rows(self) -> bool:
        """How many rows there are is not told either."""
        return self.discreet and isinstance(self.privacy, ClientPrivacy)

    def digest(self, client: str, rows: str) -> str:
        """The digest of a client's rows, by which it is known again; salted where nobody may compare it with that of rows he guesses."""
        return self.noise_of(client).below("digest", rows).secret.hex() if self.hides_rows else rows

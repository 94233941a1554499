"""The client's half: it makes keys, hands out shares of its secrets, masks what it sends, and opens shares of others, each once a round.

Secrets lie in a file of their own and not in the client's memory, since a memory goes back with a coordinator that went back to its last
commit: a mask could be used twice then, and both shares of one client be opened. A round that is begun again begins with new keys, whose
masks cancel like the old ones, so the sum does not depend on them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from fedgraft import files, seeds
from fedgraft.bundle import Bundle
from fedgraft.training.client import Client
from fedgraft.training.fit import NotFiniteError
from fedgraft.transforms.secure_aggregation.contribution import Contribution
from fedgraft.transforms.secure_aggregation.primitives import agreed, commitment, key_pair, scalar_of, seal, split, unseal
from fedgraft.transforms.secure_aggregation.settings import (
    KEYS,
    MASKED,
    SHARES,
    TRAIN,
    UNMASK,
    SecAggPlus,
    SecureAggregationSettings,
)
from fedgraft.transforms.secure_aggregation.vector import Vector, as_leaves, flattened, mask, quantised, rounded, vector_of
from fedgraft.tree import Tree, count, subtract

Question: TypeAlias = Callable[[Client, Bundle], Bundle]
FOLDER = "secure-aggregation"


def masked_questions(
    settings: SecureAggregationSettings,
    questions: dict[str, Question],
    weight: Callable[[int], int] | None,
    folder: Path,
    contribution: Contribution | None = None,
) -> dict[str, Question]:
    """The questions to a client, `train` with a masked reply and with those that come with it; without secure aggregation the same ones.

    Args:
        settings: of the run.
        questions: by name; `train` is as it is asked without masks, all other transforms included.
        weight: what a client of so many training rows counts in the merge.
        folder: where secrets may lie, on the client's side.
        contribution: how changes are clipped and noised before they are masked; then all clients weigh the same.
    """
    if not isinstance(settings, SecAggPlus):
        return questions
    assert weight is not None, "a merge without weights is refused"
    half = ClientHalf(settings, weight, folder / FOLDER, questions[TRAIN], contribution)
    others = {name: half.after_the_round(question) for name, question in questions.items()}
    return others | {KEYS: half.keys, SHARES: half.shares, TRAIN: half.masked, UNMASK: half.unmask}


@dataclass(frozen=True)
class ClientHalf:
    """Answers the questions of a round in their order, and none twice with the same secrets."""

    settings: SecAggPlus
    weight: Callable[[int], int]
    folder: Path
    train: Question
    contribution: Contribution | None = None

    def keys(self, client: Client, package: Bundle) -> Bundle:
        """Make two pairs of keys, for masks and for shares; the public ones. Secrets from before are dropped."""
        (mask_key, mask_public), (share_key, share_public) = key_pair(), key_pair()
        public = [mask_public, share_public]
        self._write(client, {**self._opened(client), "private": [mask_key, share_key], "public": {client.name: public}}, KEYS, package)
        return Bundle(facts={"public_keys": public})

    def shares(self, client: Client, package: Bundle) -> Bundle:
        """Share the private key of the masks and the seed of a mask of its own, each share sealed for one neighbour.

        Raises:
            ValueError: the neighbours are too few for the threshold or not told apart by their keys, or the client's own keys were changed.
        """
        held, name = self._held(client, KEYS, package), client.name
        public, threshold = _by_name(package, "public_keys"), int(str(package.facts.get("threshold")))
        keys = {key for pair in public.values() if isinstance(pair, list) and len(pair) == 2 for key in map(str, pair)}
        if public.get(name) != held["public"][name] or len(keys) != 2 * len(public):
            raise ValueError(f"client {name!r}: its own public keys were changed on the way, or two clients have the same ones")
        if not max(2, len(public) / 2 + 0.5) <= threshold <= len(public) or threshold < (self.settings.threshold or 2):
            raise ValueError(f"client {name!r}: a threshold of {threshold} does not go with {len(public)} clients")
        if self.contribution is not None and threshold < self.contribution.least:
            raise ValueError(
                f"client {name!r}: sums of {threshold} clients would lack noise, of which {self.contribution.least} have shares"
            )
        seed, (mask_key, share_key) = os.urandom(32), held["private"]
        parts = {
            other: {"from": name, "to": other, "round": held["round"], "seed": part_of_seed, "key": part_of_key}
            for other, part_of_seed, part_of_key in zip(
                sorted(public),
                split(seed, threshold, len(public)),
                split(scalar_of(mask_key), threshold, len(public)),
                strict=True,
            )
        }
        sealed = {other: seal(agreed(share_key, public[other][1]), part) for other, part in parts.items() if other != name}
        self._write(client, {**held, "public": public, "threshold": threshold, "seed": seed.hex(), "own": parts[name]}, SHARES, package)
        return Bundle(facts={"sealed_shares": sealed, "commitment": commitment(seed)})

    def masked(self, client: Client, package: Bundle) -> Bundle:
        """The reply of `train` with masked numbers in the place of leaves, and without how many rows the client has.

        Raises:
            ValueError: too few of the neighbours are still there, or one is none.
            NotFiniteError: a leaf holds numbers that are not finite; nothing was masked.
        """
        held = self._held(client, SHARES, package)
        peers = _names(package, "peers")
        if not peers <= held["public"].keys() - {client.name} or len(peers) + 1 < held["threshold"]:
            raise ValueError(f"client {client.name!r}: masks with {', '.join(sorted(peers)) or 'nobody'} are fewer than agreed, or others")
        reply = self.train(client, package)
        change = _change(client.name, package, reply)
        vector = self._vector(client, change, held["round"])
        vector += mask(bytes.fromhex(held["seed"]), count(change), self.settings)
        for peer in sorted(peers):
            vector = paired(vector, client.name, peer, agreed(held["private"][0], held["public"][peer][0]), self.settings)
        self._write(client, {**held, "peers": sorted(peers)}, TRAIN, package)  # before it is sent, so that no mask is used twice
        leaves = as_leaves(vector, {key: tuple(leaf.shape) for key, leaf in change.items()}, self.settings)
        facts = {name: fact for name, fact in reply.facts.items() if name != "examples"}
        return Bundle(trees={MASKED: leaves}, facts={**facts, "masked_counts": vector.counts.tolist()})

    def unmask(self, client: Client, package: Bundle) -> Bundle:
        """Open one share for each neighbour: of its seed where its vector is in the sum, of its key where it is not. Drops all secrets.

        Raises:
            ValueError: both are asked for one client, the sum is of too few, or it is another one of a round whose sum was opened.
        """
        held, name = self._held(client, TRAIN, package), client.name
        sent, dropped = _names(package, "sent"), _names(package, "dropped")
        if sent & dropped:  # with both, the coordinator could take every mask off one client's vector
            raise ValueError(
                f"client {name!r}: both shares of {', '.join(sorted(sent & dropped))} are asked for, which would open its change"
            )
        if sent | dropped != {name, *held["peers"]} or name not in sent or len(sent) < held["threshold"]:
            raise ValueError(f"client {name!r}: the sum is of too few clients, or of others than masks were made for; it stays closed")
        before = held.get("opened", {})
        if before.get("round") == held["round"] and before["sent"] != sorted(sent):
            raise ValueError(
                f"client {name!r}: another sum of this round was opened, and their difference tells of a client; start a new run"
            )
        parts = {name: held["own"], **self._unsealed(client, held, _by_name(package, "sealed_shares"))}
        opened = {other: parts[other]["seed" if other in sent else "key"] for other in sorted(sent | dropped)}
        self._keep(client, {"opened": {"round": held["round"], "sent": sorted(sent)}})  # before it is sent, so that nothing is opened twice
        return Bundle(facts={"opened_shares": opened})

    def after_the_round(self, question: Question) -> Question:
        """Another question, before which secrets of a round that was not opened are dropped."""

        def asked(client: Client, package: Bundle) -> Bundle:
            if "stage" in self._read(client):
                self._keep(client, self._opened(client))
            return question(client, package)

        return asked

    def _vector(self, client: Client, change: Tree, number: int) -> Vector:
        """What is masked: the rounded change times its weight; or clipped, rounded and noised, when how many were cut is not told."""
        settings, rng = self.settings, seeds.numpy_rng(client.seed, "secure_aggregation.rounding", number, client.name)
        if self.contribution is None:
            return quantised(change, self.weight(client.examples), settings, rng)
        flat = flattened(change)
        self.contribution.check(settings.step, len(flat))
        steps = rounded(self.contribution.shortened(flat, settings.step), settings, rng)
        return vector_of(self.contribution.noised(steps, settings.step, client.name, number), 1, 0, settings)

    def _unsealed(self, client: Client, held: dict[str, Any], sealed: dict[str, Any]) -> dict[str, dict[str, Any]]:
        parts = {}
        for other in held["peers"]:
            part = unseal(agreed(held["private"][1], held["public"][other][1]), str(sealed.get(other, "")))
            if (part["from"], part["to"], part["round"]) != (other, client.name, held["round"]):
                raise ValueError(f"client {client.name!r}: a share that should be of {other!r} is of another client or round")
            parts[other] = part
        return parts

    def _path(self, client: Client) -> Path:
        return self.folder / f"{client.name}.json"

    def _opened(self, client: Client) -> dict[str, Any]:
        held = self._read(client)
        return {"opened": held["opened"]} if "opened" in held else {}

    def _read(self, client: Client) -> dict[str, Any]:
        path = self._path(client)
        return dict(files.parse_json(files.read_text(path))) if path.exists() else {}

    def _held(self, client: Client, stage: str, package: Bundle) -> dict[str, Any]:
        """The secrets, if the last question of this round was `stage`."""
        held = self._read(client)
        if (held.get("stage"), held.get("round")) != (stage, package.facts.get("round")):
            raise ValueError(
                f"client {client.name!r}: it is not where this question comes in a round; secrets serve once, begin with new keys"
            )
        return held

    def _write(self, client: Client, held: dict[str, Any], stage: str, package: Bundle) -> None:
        self._keep(client, {**held, "stage": stage, "round": package.facts.get("round")})

    def _keep(self, client: Client, held: dict[str, Any]) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        files.write_json(self._path(client), held)


def paired(vector: Vector, name: str, peer: str, key: bytes, settings: SecAggPlus) -> Vector:
    """The vector of a client with the mask that it shares with a peer, which the one adds and the other subtracts."""
    common = mask(key, len(vector.words), settings)
    return vector + common if name > peer else vector - common


def _change(name: str, package: Bundle, reply: Bundle) -> Tree:
    """What training has changed of the shared leaves.

    Raises:
        NotFiniteError: it is not finite; a sum would hide that.
    """
    assert reply.trees.keys() == {"shared"}, "a method that sends more than its shared leaves is refused"
    change = subtract(reply.tree("shared"), package.tree("shared"))
    for key, leaf in change.items():
        if not leaf.isfinite().all():
            raise NotFiniteError(f"client {name!r}: leaf {key!r} holds numbers that are not finite")
    return change


def _names(package: Bundle, fact: str) -> set[str]:
    return set(_strings(package.facts.get(fact)))


def _strings(value: Any) -> Iterable[str]:
    return [str(one) for one in value] if isinstance(value, list) else []


def _by_name(package: Bundle, fact: str) -> dict[str, Any]:
    value: Any = package.facts.get(fact)
    return value if isinstance(value, dict) else {}

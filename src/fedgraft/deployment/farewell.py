"""A site's leave of its federation: a statement that its key signs, which the coordinator checks and acts on at once.

Flower has no such message: a node cannot take back its own registration. The coordinator gives out a challenge, over TLS; the site signs
its name, the federation's certificate and the challenge. So a statement cannot be forged without the site's key, carried over from another
federation that knows the same key, or used a second time.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime

from fedgraft import files
from fedgraft.data.partition import SAFE_NAME
from fedgraft.deployment import keys
from fedgraft.deployment.federation import Federation, remove_site

PATH = "/fedgraft/leave"
LIFE = 60.0  # seconds that a challenge holds
DONE, REPEATED = "left", "has left before"


def statement(site: str, authority: bytes, challenge: str) -> bytes:
    """What a site signs to leave the federation of this certificate (`ca.pem`)."""
    return f"fedgraft: site {site} leaves the federation {keys.fingerprint(authority)}\n{challenge}\n".encode()


def signed(site: str, authority: bytes, challenge: str, key: bytes) -> bytes:
    """The whole message, signed with a site's private key."""
    signature = keys.sign(key, statement(site, authority, challenge))
    return json.dumps({"site": site, "challenge": challenge, "signature": signature.hex()}).encode()


@dataclass
class Farewell:
    """The coordinator's end. Challenges hold for one process, one use and `LIFE` seconds."""

    federation: Federation
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    used: set[str] = field(default_factory=set)
    """Challenges with which a site has left; only who holds a key can add to them."""

    def hear(self, body: bytes) -> tuple[int, str]:
        """HTTP status and answer: a fresh challenge to who says nothing, else what became of the statement."""
        if not body:
            return 200, self._challenge(time.time())
        try:
            values = files.parse_json(body)
            site, challenge, signature = str(values["site"]), str(values["challenge"]), bytes.fromhex(values["signature"])
        except (ValueError, KeyError, TypeError):
            return 400, "this is no statement of a site that leaves; use the fedgraft version of the coordinator"
        if not SAFE_NAME.fullmatch(site):
            return 400, "this is no name of a site"
        if challenge in self.used or not self._holds(challenge):
            return 403, "the statement is too old, or was used before; repeat the command"
        return self._leave(site, challenge, signature)

    def _leave(self, site: str, challenge: str, signature: bytes) -> tuple[int, str]:
        authority = self.federation.certificate
        assert authority is not None
        said = statement(site, authority, challenge)
        key = self.federation.sites().get(site)
        if key is not None and keys.is_signed(key, said, signature):
            self.used.add(challenge)
            note = {"site": site, "key": key.decode(), "time": datetime.now(UTC).isoformat(timespec="seconds")}
            proof = {"said": said.decode(), "signature": signature.hex()}
            files.write_json(self.federation.folder / "removed" / f"{site}-{secrets.token_hex(4)}.left.json", {**note, **proof})
            remove_site(self.federation, site)
            return 200, DONE
        if any(keys.is_signed(old, said, signature) for old in self._departed(site)):
            return 200, REPEATED
        return 403, f"no site {site!r} with this key is let in, so nothing was changed"

    def _departed(self, site: str) -> list[bytes]:
        """The keys with which a site of this name has left."""
        notes = (self.federation.folder / "removed").glob(f"{site}-*.left.json")
        return [str(files.parse_json(note.read_bytes())["key"]).encode() for note in notes]

    def _challenge(self, now: float) -> str:
        head = f"{int(now)}.{secrets.token_hex(16)}"
        return f"{head}.{self._sum(head)}"

    def _holds(self, challenge: str) -> bool:
        """Whether this process gave it out, and not long ago."""
        head, _, told = challenge.rpartition(".")
        stamp = head.partition(".")[0]
        return hmac.compare_digest(told.encode(), self._sum(head).encode()) and 0 <= time.time() - int(stamp) <= LIFE

    def _sum(self, head: str) -> str:
        return hmac.new(self.secret, head.encode(), hashlib.sha256).hexdigest()

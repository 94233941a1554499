"""The cryptography of secure aggregation: Flower's key agreement, encryption and secret sharing, and masks of full strength.

Masks are ChaCha20 key streams. Flower's own generator (`pseudo_rand_gen`) folds a key to 32 bits before it draws, so that whoever has a
masked vector could try all masks of a pair.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fedgraft.files import parse_json

SCALAR = 48  # bytes of a private key of Flower's curve, SECP384R1


def key_pair() -> tuple[str, str]:
    """(private, public), of the operating system's randomness, as PEM."""
    from flwr.supercore.primitives.asymmetric import generate_key_pairs, private_key_to_bytes, public_key_to_bytes

    private, public = generate_key_pairs()
    return private_key_to_bytes(private).decode(), public_key_to_bytes(public).decode()


def public_of(private: str) -> str:
    """The public key that belongs to a private one.

    Raises:
        ValueError: it is no key.
    """
    from flwr.supercore.primitives.asymmetric import bytes_to_private_key, public_key_to_bytes

    return public_key_to_bytes(bytes_to_private_key(private.encode()).public_key()).decode()


def scalar_of(private: str) -> bytes:
    """The number that a private key is, which is shared in the place of its six times longer PEM."""
    from flwr.supercore.primitives.asymmetric import bytes_to_private_key

    return bytes_to_private_key(private.encode()).private_numbers().private_value.to_bytes(SCALAR, "big")


def private_of(scalar: bytes) -> str:
    """The inverse of `scalar_of`.

    Raises:
        ValueError: it is no key's.
    """
    from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, derive_private_key
    from flwr.supercore.primitives.asymmetric import private_key_to_bytes

    return private_key_to_bytes(derive_private_key(int.from_bytes(scalar, "big"), SECP384R1())).decode()


def agreed(private: str, public: str) -> bytes:
    """The 32 bytes that two clients have in common, each by its own private and the other's public key.

    Raises:
        ValueError: one is no key of the curve in use.
    """
    from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
    from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key

    return base64.urlsafe_b64decode(generate_shared_key(bytes_to_private_key(private.encode()), bytes_to_public_key(public.encode())))


def seal(key: bytes, content: Mapping[str, Any]) -> str:
    """JSON that only who has the key can read or change."""
    from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt

    return encrypt(base64.urlsafe_b64encode(key), json.dumps(content).encode()).decode()


def unseal(key: bytes, sealed: str) -> dict[str, Any]:
    """The inverse of `seal`.

    Raises:
        ValueError: it was sealed with another key, or changed.
    """
    from cryptography.fernet import InvalidToken
    from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt

    try:
        return dict(parse_json(decrypt(base64.urlsafe_b64encode(key), sealed.encode())))
    except InvalidToken:
        raise ValueError("a sealed share cannot be opened; it was sealed for another key, or changed on the way") from None


def split(secret: bytes, threshold: int, count: int) -> list[str]:
    """Shamir's shares: any `threshold` of the `count` recover the secret, fewer say nothing of it."""
    from flwr.common.secure_aggregation.crypto.shamir import create_shares

    return [share.hex() for share in create_shares(secret, threshold, count)]


def join(shares: Sequence[str]) -> bytes:
    """The secret of enough shares.

    Raises:
        ValueError: they are of no secret.
    """
    from flwr.common.secure_aggregation.crypto.shamir import combine_shares

    return combine_shares([bytes.fromhex(share) for share in shares])


def commitment(secret: bytes) -> str:
    """By which a recovered secret of 32 random bytes is known to be the right one."""
    return hashlib.sha256(b"fedgraft secure aggregation\n" + secret).hexdigest()


def stream(key: bytes, length: int) -> bytes:
    """The first bytes of a key stream; a key makes one and is never used again."""
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

    return Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(length))

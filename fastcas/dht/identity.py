"""A node's identity: an Ed25519 key; the id is the hash of the public key, so ids cannot be chosen freely.

Signed texts begin with their purpose, so that a signature for one cannot be used for another.
"""

from __future__ import annotations

import hashlib
import secrets

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

__all__ = ["Identity", "challenge_text", "id_of", "metadata_text", "verify"]

PUBLIC_SIZE = 32
SIGNATURE_SIZE = 64


def id_of(public: bytes) -> bytes:
    """Return the 20-byte node id of a public key."""
    return hashlib.sha256(b"fc1:id" + public).digest()[:20]


class Identity:
    """A key pair. Cost: 46 us to sign, 136 us to verify."""

    def __init__(self, seed: bytes | None = None) -> None:
        """Use a 32-byte seed, or a new random one."""
        key = Ed25519PrivateKey.from_private_bytes(seed if seed is not None else secrets.token_bytes(32))
        self._key = key
        self.public: bytes = key.public_key().public_bytes_raw()
        self.node_id = id_of(self.public)

    def sign(self, text: bytes) -> bytes:
        """Return the 64-byte signature of `text`."""
        return self._key.sign(text)


def verify(public: bytes, signature: bytes, text: bytes) -> bool:
    """Whether `signature` is `public`'s for `text`."""
    if len(public) != PUBLIC_SIZE or len(signature) != SIGNATURE_SIZE:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, text)
    except (InvalidSignature, ValueError):
        return False
    return True


def challenge_text(nonce: bytes, node_id: bytes, observed: bytes, net_id: bytes) -> bytes:
    """Return what a pong signs: the asker's nonce and address as seen, in this network."""
    return b"fc1:ping" + nonce + node_id + len(observed).to_bytes(1) + observed + net_id


def metadata_text(key: bytes, seq: int, expires: int, value: bytes) -> bytes:
    """Return what a metadata record signs; `expires` is Unix time in seconds."""
    return b"fc1:meta" + key + seq.to_bytes(8) + expires.to_bytes(8) + value

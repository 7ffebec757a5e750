"""Every SHA-256 kernel against NIST's CAVP vectors, byte-oriented (SHA256ShortMsg, SHA256LongMsg, SHA256Monte).

The files are those of the CAVS 11 example set, as the package cryptography_vectors carries them.
"""

import hashlib
from pathlib import Path

import cryptography_vectors
import pytest

from fastcas.hashing import Sha256, digest_many, kernels, sha256

FOLDER = Path(cryptography_vectors.__file__).parent / "hashes" / "SHA2"


def fields(name: str) -> list[tuple[str, str]]:
    """The `key = value` lines of a response file, in order."""
    pairs = []
    for line in (FOLDER / name).read_text(encoding="ascii").splitlines():
        key, equals, value = line.partition(" = ")
        if equals and not key.startswith(("#", "[")):
            pairs.append((key, value))
    return pairs


def messages(name: str) -> list[tuple[bytes, bytes]]:
    """(message, digest) of each case; NIST writes the empty message as Len = 0 and Msg = 00."""
    values = [value for _, value in fields(name)]
    cases = zip(values[::3], values[1::3], values[2::3], strict=True)
    return [(bytes.fromhex(text)[: int(bits) // 8], bytes.fromhex(digest)) for bits, text, digest in cases]


SHORT = messages("SHA256ShortMsg.rsp")
LONG = messages("SHA256LongMsg.rsp")


@pytest.fixture(params=kernels())
def kernel(request):
    return request.param


def test_vector_files_are_whole():
    assert [len(message) for message, _ in SHORT] == list(range(65))
    assert len(LONG) == 64
    assert max(len(message) for message, _ in LONG) == 6400
    assert len(fields("SHA256Monte.rsp")) == 1 + 2 * 100


@pytest.mark.parametrize("cases", [SHORT, LONG], ids=["ShortMsg", "LongMsg"])
def test_every_message_alone(kernel, cases):
    for message, digest in cases:
        assert sha256(message, kernel=kernel) == digest, f"{len(message)} B"


def test_all_messages_at_once_in_any_lane(kernel):
    """Each rotation puts every message into another lane, beside others and after others."""
    cases = SHORT + LONG
    for shift in range(16):
        rotated = cases[shift:] + cases[:shift]
        assert digest_many([message for message, _ in rotated], kernel=kernel) == [digest for _, digest in rotated]


def test_every_short_message_in_every_two_pieces(kernel):
    for message, digest in SHORT:
        for cut in range(len(message) + 1):
            assert Sha256(kernel=kernel).update(message[:cut]).update(message[cut:]).digest() == digest, f"cut {cut}"


def test_long_message_in_every_two_pieces(kernel):
    for message, digest in LONG[:3]:
        for cut in range(len(message) + 1):
            assert Sha256(kernel=kernel).update(message[:cut]).update(message[cut:]).digest() == digest, f"cut {cut}"


def test_long_message_from_every_midstate(kernel):
    for message, digest in LONG[::7]:
        state = Sha256(kernel=kernel)
        for at in range(0, len(message), 64):
            resumed = Sha256(state.midstate(), at, kernel=kernel).update(message[at:])
            assert resumed.digest() == digest, f"{len(message)} B from {at}"
            if at + 64 <= len(message):
                state.update(message[at : at + 64])


def test_monte_carlo(kernel):
    """100 times 1000 digests, each of the three before it (SHAVS, section 6.4)."""
    (_, seed), *rest = fields("SHA256Monte.rsp")
    wanted = [bytes.fromhex(value) for key, value in rest if key == "MD"]
    digest = bytes.fromhex(seed)
    for number, want in enumerate(wanted):
        a = b = c = digest
        for _ in range(1000):
            a, b, c = b, c, sha256(a + b + c, kernel=kernel)
        digest = c
        assert digest == want, f"COUNT = {number}"


def test_monte_carlo_in_lanes(kernel):
    """Twenty Monte Carlo chains from different seeds advance side by side; hashlib tells where they end."""
    (_, seed), *rest = fields("SHA256Monte.rsp")
    starts = [bytes.fromhex(seed), *(bytes.fromhex(value) for key, value in rest[:38] if key == "MD")]
    a = b = c = starts
    for _ in range(1000):
        a, b, c = b, c, digest_many([x + y + z for x, y, z in zip(a, b, c, strict=True)], kernel=kernel)
    assert c[:19] == starts[1:]  # NIST's next digest is where the one before leads
    last = starts[-1]
    p = q = r = last
    for _ in range(1000):
        p, q, r = q, r, hashlib.sha256(p + q + r).digest()
    assert c[19] == r

"""The peer book and the address policy."""

from __future__ import annotations

import ipaddress

import pytest

from fastcas.ids import PeerAddr
from fastcas.peers.book import PARK_AFTER, PARK_S, PeerBook
from fastcas.peers.discovery import PeerHint
from fastcas.peers.policy import AddressPolicy, is_loopback, own_networks

A, B, C = PeerAddr("10.0.0.1", 9000), PeerAddr("10.0.0.2", 9000), PeerAddr("10.0.0.3", 9000)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_failures_pause_a_peer_longer_each_time_and_success_forgives() -> None:
    clock = Clock()
    book = PeerBook(clock)
    assert book.is_usable(A)
    pauses = [book.note_failure(A) for _ in range(PARK_AFTER)]
    assert pauses == [0.5, 1.0, PARK_S]
    assert not book.is_usable(A)
    clock.now += PARK_S
    assert book.is_usable(A)
    book.note_success(A, 1000, 0.5)
    entry = book.get(A)
    assert entry is not None
    assert (entry.failures, entry.rate_Bps, entry.n_bytes) == (0, 2000.0, 1000)
    book.note_success(A, 1000, 1.0)
    assert entry.rate_Bps == 1700.0
    book.note_success(A, 0, 0.0)
    assert entry.rate_Bps == 1700.0


def test_ban_has_a_reason_and_an_end() -> None:
    clock = Clock()
    book = PeerBook(clock)
    assert book.ban_reason(A) is None
    book.ban(A, "wrong bytes for chunk 3fa9c1d2", for_s=10.0)
    assert book.ban_reason(A) == "wrong bytes for chunk 3fa9c1d2"
    assert book.banned() == {A: "wrong bytes for chunk 3fa9c1d2"}
    assert not book.is_usable(A)
    clock.now += 10.0
    assert book.is_usable(A)
    assert book.banned() == {}


def test_rank_puts_fast_peers_first_then_failing_ones_and_leaves_out_the_unusable() -> None:
    book = PeerBook(Clock())
    book.note_success(B, 100, 1.0)
    book.note_success(A, 1000, 1.0)
    assert book.rank([C, B, A, B]) == [A, B, C]
    book.ban(A, "lied")
    assert book.rank([C, B, A]) == [B, C]
    book.add(PeerHint("c" * 40, C.ip, C.port, "dht"))
    assert [e.addr for e in book.with_capacity()] == [B, C]


def test_book_is_bounded_and_forgets_bans_last() -> None:
    book = PeerBook(Clock(), max_peers=10)
    liar = PeerAddr("10.9.9.9", 1)
    book.ban(liar, "lied")
    for number in range(100):
        book.add(PeerHint(None, f"10.0.1.{number}", 9000, "dht"))
    assert len(book) == 10
    assert book.ban_reason(liar) == "lied"
    for number in range(20):
        book.ban(PeerAddr(f"10.0.2.{number}", 1), "lied")
    assert len(book) == 10
    assert book.ban_reason(PeerAddr("10.0.2.19", 1)) == "lied"


@pytest.mark.parametrize(
    "ip",
    [
        "0.0.0.0", "0.1.2.3", "169.254.169.254", "224.0.0.1", "255.255.255.255", "100.64.0.1", "192.0.0.8",
        "198.18.0.1", "240.0.0.1", "203.0.113.9", "fe80::1", "ff02::1", "::", "::ffff:8.8.8.8", "64:ff9b::808:808",
        "2002:808:808::1", "2001:0:1::1", "2001:db8::1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "fd00::1",
        "127.0.0.1", "::1", "localhost", "8.8.8.8 ", "8.8.8", "",
    ],
)  # fmt: skip
def test_policy_refuses_reserved_foreign_private_and_named_addresses(ip: str) -> None:
    assert AddressPolicy(own=()).refusal(ip, 9000, giver_ip="8.8.8.8") is not None


def test_policy_accepts_public_own_and_allowed_addresses() -> None:
    own = (ipaddress.ip_network("10.1.2.0/24"), ipaddress.ip_network("192.0.2.0/24"))
    policy = AddressPolicy(own=own)
    assert policy.refusal("8.8.8.8", 9000) is None
    assert policy.refusal("2a00::1", 9000) is None
    assert policy.refusal("10.9.9.9", 9000) is None  # this host is in 10/8
    assert policy.refusal("192.0.2.7", 9000) is None  # its own prefix, though a documentation net
    assert policy.refusal("192.168.1.1", 9000) is not None
    assert AddressPolicy(own=(), allow_private=True).refusal("192.168.1.1", 9000) is None
    assert policy.refusal("127.0.0.1", 9000, giver_ip="127.0.0.9") is None
    assert policy.refusal("::1", 9000, giver_ip="::1") is None
    assert policy.refusal("127.0.0.1", 9000) is not None
    assert [policy.refusal("8.8.8.8", port) is None for port in (0, 80, 1023, 1024, 65535, 65536)] == [
        False, False, False, True, True, False,
    ]  # fmt: skip
    assert AddressPolicy(own=(), low_ports=frozenset({80})).refusal("8.8.8.8", 80) is None
    assert policy.usable([("8.8.8.8", 9000), ("8.8.8.8", 1)]) == [("8.8.8.8", 9000)]
    assert [policy.is_local(ip) for ip in ("127.0.0.5", "10.1.2.9", "10.1.3.9", "8.8.8.8", "x")] == [
        True, True, False, False, False,
    ]  # fmt: skip


def test_own_networks_are_real_prefixes_without_loopback() -> None:
    for network in own_networks():
        assert not network.is_loopback
    assert is_loopback("127.1.2.3")
    assert not is_loopback("name")

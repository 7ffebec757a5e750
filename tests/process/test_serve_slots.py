"""Upload slots, their queue and "busy": the engine in this process, so that nothing happens between two looks."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from fastcas.errors import UsageError
from fastcas.table import Bucket
from tests.process.test_serve_engine import REQUEST, Served, served
from tests.support.serve_rig import content

pytestmark = pytest.mark.slow

MIB = 1 << 20
SWARM = b"/swarm/" + b"ab" * 32


def peer(target: bytes, name: bytes = b"ab" * 20) -> bytes:
    return b"GET %s HTTP/1.1\r\nHost: a\r\nFastcas-Peer: %s\r\n\r\n" % (target, name)


def chunk(digest: bytes) -> bytes:
    return b"/chunks/" + digest.hex().encode()


def read(s: Served, sock: socket.socket) -> tuple[int, dict[str, str], int]:
    """Read one response while the engine runs; return status, fields and length of the body."""
    pieces: list[bytes] = []

    def is_whole() -> bool:
        s.read_until_closed(sock, pieces)
        head, end, body = b"".join(pieces).partition(b"\r\n\r\n")
        return bool(end) and (b"Content-Length: %d\r\n" % len(body) in head + b"\r\n" or b" 204 " in head[:13])

    s.until(is_whole, "response")
    head, _, body = b"".join(pieces).partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    return int(lines[0].split()[1]), fields, len(body)


def test_next_waits_for_a_slot_and_keeps_its_place(tmp_path: Path) -> None:
    with served(tmp_path, upload_slots=1) as s:
        clients = []
        for number in range(4):
            clients.append(s.client(peer(SWARM + b"/next", b"%d" % number)))
            s.until(lambda n=number: len(s.parked) + s.count("peer_queued") == n + 1, "one more")
        assert [p.peer for p in s.parked] == [b"0"]
        for number in range(4):
            s.until(lambda n=number: len(s.parked) == n + 1, "its turn")
            assert s.parked[number].peer == b"%d" % number
            assert s.engine.respond(s.parked[number].handle, 204)
            assert read(s, clients[number])[0] == 204
        assert s.count("peer_busy") == 0


def test_others_are_served_while_peers_wait(tmp_path: Path) -> None:
    with served(tmp_path, upload_slots=1) as s:
        digest = s.store.add_chunks(content(MIB), MIB)[0]
        s.client(peer(SWARM + b"/next"))
        waiting = s.client(peer(chunk(digest)))
        s.until(lambda: len(s.parked) == 1 and s.count("peer_queued") == 1, "slot taken")
        other = s.client(b"GET %s HTTP/1.1\r\nHost: a\r\n\r\n" % chunk(digest))
        assert read(s, other)[::2] == (200, MIB)
        polling = s.client(peer(SWARM))
        s.until(lambda: len(s.parked) == 2, "polls take no slot")
        absent = s.client(peer(b"/chunks/" + b"00" * 32))
        assert read(s, absent)[0] == 404
        assert s.count("peer_queued") == 1
        s.engine.respond(s.parked[0].handle, 204)
        assert read(s, waiting)[::2] == (200, MIB)
        polling.close()


def test_slot_of_a_peer_that_does_not_read_goes_to_the_next(tmp_path: Path) -> None:
    with served(tmp_path, upload_slots=1) as s:
        big, small = s.store.add_chunks(content(16 * MIB + 1000), 16 * MIB)
        deaf = s.client(peer(chunk(big)))
        s.until(lambda: s.engine.statistics()["sending"] == 1, "blocked")
        second = s.client(peer(chunk(small)))
        assert read(s, second)[::2] == (200, 1000)
        assert (s.count("slot_lost"), s.count("peer_queued")) == (1, 1)
        assert read(s, deaf)[::2] == (200, 16 * MIB)  # it goes on without its slot


def test_busy_when_more_waits_than_the_uplink_sends_in_a_tenth_of_a_second(tmp_path: Path) -> None:
    bucket = Bucket.create(MIB)
    with served(tmp_path, upload_slots=4, bucket_fd=bucket.fd) as s:
        digest, small = s.store.add_chunks(content(MIB + 5000), MIB)
        first = s.client(peer(chunk(digest)))
        s.until(lambda: s.engine.statistics()["sending"] == 1, "the first is being sent")
        second = s.client(peer(chunk(small)))
        status, fields, length = read(s, second)
        assert (status, fields["retry-after"], "connection" in fields) == (503, "0", False)
        assert length == len(b"busy\n")
        second.setblocking(True)
        second.sendall(REQUEST)  # the connection stays open
        second.setblocking(False)
        assert read(s, second)[0] == 200
        second.setblocking(True)
        second.sendall(peer(SWARM + b"/next"))
        s.until(lambda: len(s.parked) == 1, "NEXT is never refused")
        plain = s.client(b"GET %s HTTP/1.1\r\nHost: a\r\n\r\n" % chunk(small))
        assert read(s, plain)[0] == 200  # nor is anybody without the field
        assert s.count("peer_busy") == 1
        assert read(s, first)[::2] == (200, MIB)
        again = s.client(peer(chunk(small)))
        assert read(s, again)[0] == 200
    bucket.close()


def test_dead_ones_leave_queue_and_slots(tmp_path: Path) -> None:
    with served(tmp_path, upload_slots=2) as s:
        for _ in range(3):
            holders = [s.client(peer(SWARM + b"/next")) for _ in range(2)]
            s.until(lambda: s.engine.statistics()["connections"] == 2, "slots taken")
            before = s.count("peer_queued")
            waiting = [s.client(peer(SWARM + b"/next")) for _ in range(5)]
            s.until(lambda n=before: s.count("peer_queued") == n + 5, "queued")
            for sock in (*waiting[1:4], *holders, waiting[0], waiting[4]):
                sock.close()

            def are_gone() -> bool:
                for parked in s.parked:  # one whose turn came with its end is parked, and finds out when it is answered
                    s.engine.respond(parked.handle, 204)
                s.parked.clear()
                return s.engine.statistics()["connections"] == 0

            s.until(are_gone, "all gone")
            assert s.engine.statistics()["parked"] == 0
        sock = s.client(peer(SWARM + b"/next"))
        s.until(lambda: len(s.parked) == 1, "slots are free")
        assert s.engine.respond(s.parked[0].handle, 204)
        assert read(s, sock)[0] == 204


def test_pipelined_requests_of_a_peer_come_back_in_order(tmp_path: Path) -> None:
    with served(tmp_path, upload_slots=1) as s:
        hashes = s.store.add_chunks(content(20 * 3000), 3000)
        last = s.store.chunks[hashes[-1]]
        s.client(peer(SWARM + b"/next"))
        s.until(lambda: len(s.parked) == 1, "slot taken")
        socks = [s.client(b"".join(peer(chunk(d)) for d in hashes)) for _ in range(3)]
        s.until(lambda: s.count("peer_queued") == 3, "all wait")
        assert s.engine.respond(s.parked[0].handle, 204)
        got: dict[socket.socket, bytearray] = {sock: bytearray() for sock in socks}

        def is_done() -> bool:
            for sock in socks:
                pieces: list[bytes] = []
                s.read_until_closed(sock, pieces)
                got[sock] += b"".join(pieces)
            return all(data.count(b"HTTP/1.1 200 OK") == 20 and data.endswith(last) for data in got.values())

        s.until(is_done, "all answered")
        for data in got.values():
            places = [data.index(s.store.chunks[d]) for d in hashes]
            assert places == sorted(places)


def test_too_many_slots_are_refused(tmp_path: Path) -> None:
    with served(tmp_path) as s, pytest.raises(UsageError):
        type(s.engine)(s.listener.fileno(), s._on_flags, upload_slots=65)


def test_however_busy_a_request_is_let_in_now_and_then(tmp_path: Path) -> None:
    bucket = Bucket.create(MIB)
    with served(tmp_path, upload_slots=4, bucket_fd=bucket.fd) as s:
        big, small = s.store.add_chunks(content(16 * MIB + 1000), 16 * MIB)
        s.client(peer(chunk(big)))
        s.until(lambda: s.engine.statistics()["sending"] == 1, "sixteen seconds' worth is being sent")
        s.client(peer(SWARM + b"/next"))
        s.until(lambda: len(s.parked) == 1, "the last one let in wants little")
        other = s.client(peer(chunk(small)))
        statuses = [read(s, other)[0]]
        while statuses[-1] == 503:
            other.setblocking(True)
            other.sendall(peer(chunk(small)))
            other.setblocking(False)
            statuses.append(read(s, other)[0])
        assert (statuses[0], statuses[-1]) == (503, 200)
        assert s.engine.statistics()["sending"] == 1  # still
    bucket.close()

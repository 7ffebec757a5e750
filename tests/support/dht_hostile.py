"""What a hostile network says: valid datagrams of every kind, caught in a small network, and mutations of them.

`caught()` returns the samples; `Mutator` makes datagrams from them, the same ones for the same seed. As a program it is
the attacker: `python -m tests.support.dht_hostile PORT PER_S SEED` sends as many mutated datagrams as each line of its
input says to a node on loopback from many addresses, answers with a line, and keeps in step with the node: after every
batch it waits for the answer to a good request.
"""

from __future__ import annotations

import asyncio
import functools
import random
import socket
import sys
import time
from typing import Any

import msgpack

from fastcas.dht.provided import keys_of
from fastcas.dht.wire import REPLY, REQUEST, encode
from tests.support.virtual_net import Address, VirtualNet, run

NAMES = ("ping", "fn", "gp", "gs", "gm", "ap", "as", "pm", "wd")
PER_KIND = 24
N_SOURCES = 400
BATCH = 200
HEADS = (
    b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\x01", b"\xc8\xff\xff\x01", b"\xc1", b"\xd9\x04\xff\xfe\xfd\xfc", b"\xcb" + b"\xff" * 8,
    b"\xd3\x80" + bytes(7), b"\xcf" + b"\xff" * 8, b"\xd6\xff" + bytes(4), b"\xc7\x0c\xff" + b"\xff" * 12,
)  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1 << 63, (1 << 64) - 1, 1.5, "", "x" * 16, "x" * 17, b"", bytes(1), bytes(7), bytes(20),
    bytes(21), b"\xff" * 26, bytes(1100), [], [[]], [[[[]]]], [0] * 64, [b"x"] * 65, {}, {"a": 1},
)  # fmt: skip


@functools.cache
def caught() -> dict[str, list[bytes]]:
    """Return valid datagrams by name; those of replies are called like their requests with a "+"."""
    samples: dict[str, list[bytes]] = {}
    asked: dict[bytes, str] = {}

    def tap(source: Address, target: Address, data: bytes) -> None:
        if data[0] == REQUEST:
            name = asked[data[1:21]] = msgpack.unpackb(data[21:])[0]
        else:
            name = asked[data[1:21]] + "+"
        kept = samples.setdefault(name, [])
        if len(kept) < PER_KIND:
            kept.append(data)

    async def body(net: VirtualNet) -> None:
        net.taps.append(tap)
        nodes = await net.grow(12)
        rng = random.Random(5)
        files = [rng.randbytes(32) for _ in range(4)]
        hashes = rng.randbytes(32 * 300)
        for node in nodes[1:4]:
            await node.announcer.announce_files([(file, 700) for file in files])
            await node.announcer.put_metadata(files[0], "a name", 77, bytes(32))
            await node.announcer.announce_chunks(keys_of(hashes))
        for node in nodes[5:9]:
            await node.finder.find_file(files[0], 16, 5.0, lambda peers: None)
            await node.finder.get_metadata(files[0], 5.0)
            await node.finder.find_chunks(hashes, 4, 5.0, lambda news: None)
        await nodes[1].announcer.withdraw(files[:1])
        await nodes[2].close()

    run(body)
    missing = {name + mark for name in NAMES for mark in ("", "+")} - samples.keys()
    assert not missing, f"no sample of {missing}"
    return samples


class Mutator:
    """Makes hostile datagrams from samples."""

    def __init__(self, seed: int, samples: dict[str, list[bytes]]) -> None:
        self.rng = random.Random(seed)
        self.samples = samples
        self.names = sorted(samples)
        self.ways = (
            self._flip, self._truncate, self._insert, self._splice, self._head, self._nest, self._swap, self._noise,
            self._resize,
        )  # fmt: skip

    def datagram(self) -> bytes:
        """Return one mutated datagram, at most 9,000 bytes."""
        data = self.rng.choice(self.samples[self.rng.choice(self.names)])
        for _ in range(self.rng.choice((1, 1, 1, 2, 3))):
            data = self.rng.choice(self.ways)(data)
        return data

    def elements(self, name: str) -> list[Any]:
        """Return the elements of a reply to `name` after its head, some of them replaced."""
        body = msgpack.unpackb(self.rng.choice(self.samples[name + "+"])[21:])[3:]
        for _ in range(self.rng.choice((1, 1, 2))):
            if body:
                at = self.rng.randrange(len(body))
                value = body[at]
                if isinstance(value, bytes) and self.rng.random() < 0.5:
                    body[at] = self.rng.randbytes(self.rng.choice((len(value), 26, 38, 52, self.rng.randrange(300))))
                else:
                    body[at] = self.rng.choice(ODD)
        return body[: self.rng.randrange(len(body) + 1)] if self.rng.random() < 0.1 else body

    def _flip(self, data: bytes) -> bytes:
        out = bytearray(data)
        for _ in range(self.rng.choice((1, 1, 2, 8))):
            if out:
                out[self.rng.randrange(len(out))] = self.rng.randrange(256)
        return bytes(out)

    def _truncate(self, data: bytes) -> bytes:
        return data[: self.rng.randrange(len(data) + 1)]

    def _insert(self, data: bytes) -> bytes:
        at = self.rng.randrange(len(data) + 1)
        return data[:at] + self.rng.randbytes(self.rng.choice((1, 2, 4, 30))) + data[at:]

    def _splice(self, data: bytes) -> bytes:
        other = self.rng.choice(self.samples[self.rng.choice(self.names)])
        return data[: self.rng.randrange(len(data) + 1)] + other[self.rng.randrange(len(other)) :]

    def _head(self, data: bytes) -> bytes:
        at = min(self.rng.choice((21, 22, self.rng.randrange(21, 80))), len(data))
        return data[:at] + self.rng.choice(HEADS) + data[at:]

    def _nest(self, data: bytes) -> bytes:
        return data[:21] + self.rng.choice((b"\x91", b"\x92\xa2fn", b"\x81", b"\xdc\x00\x01")) * self.rng.randrange(390)

    def _swap(self, data: bytes) -> bytes:
        try:
            body = msgpack.unpackb(data[21:])
        except ValueError:
            return data
        row = body
        if isinstance(body, list) and len(body) == 2 and isinstance(body[1], list) and self.rng.random() < 0.9:
            row = body[1]
        if not isinstance(row, list) or not row:
            return data
        row[self.rng.randrange(len(row))] = self.rng.choice(ODD)
        return data[:21] + bytes(msgpack.packb(body))

    def _noise(self, data: bytes) -> bytes:
        return bytes((self.rng.randrange(2),)) + self.rng.randbytes(self.rng.randrange(1300))

    def _resize(self, data: bytes) -> bytes:
        return (data * 200)[: self.rng.choice((0, 1, 20, 21, 22, 1199, 1200, 1201, 1400, 9000))]


class Attacker:
    """Sends mutated datagrams to 127.0.0.1, at most `per_s` a second, in step with the node."""

    def __init__(self, port: int, per_s: float, seed: int) -> None:
        self.mutator = Mutator(seed, caught())
        self.address = ("127.0.0.1", port)
        self.per_s = per_s
        self.sources = []
        for number in range(N_SOURCES):
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.bind((f"127.66.{number // 250}.{number % 250 + 1}", 0))
            sock.setblocking(False)
            self.sources.append(sock)
        self.pace = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.pace.settimeout(0.2)

    def send(self, count: int) -> None:
        """Send so many; the node has taken them when this returns."""
        good = encode(REQUEST, b"p" * 20, ["fn", [1, 1, b"P" * 20, b"", bytes(20), 1]])
        begin = time.monotonic()
        for start in range(0, count, BATCH):
            for _ in range(min(BATCH, count - start)):
                try:
                    self.mutator.rng.choice(self.sources).sendto(self.mutator.datagram(), self.address)
                except BlockingIOError:
                    continue
            while True:
                self.pace.sendto(good, self.address)
                try:
                    if self.pace.recv(2000)[:1] == bytes((REPLY,)):
                        break
                except TimeoutError:
                    continue
            time.sleep(max(0.0, begin + (start + BATCH) / self.per_s - time.monotonic()))


class EvilNode(asyncio.DatagramProtocol):
    """Signs nothing right and answers every request with mutated elements under a good head."""

    def __init__(self, mutator: Mutator) -> None:
        self.mutator = mutator
        self.n_answered = 0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        if data[0] != REQUEST:
            return
        name = msgpack.unpackb(data[21:])[0]
        observed = socket.inet_aton(addr[0]) + addr[1].to_bytes(2)
        reply = b"\x01" + data[1:21] + bytes(msgpack.packb([0, observed, b"t" * 8, *self.mutator.elements(name)]))
        if self.mutator.rng.random() < 0.3:
            reply = reply[:21] + self.mutator._flip(reply[21:])
        self.n_answered += 1
        self.transport.sendto(reply, addr)


if __name__ == "__main__":
    attacker = Attacker(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
    print("ready", flush=True)
    for line in sys.stdin:
        attacker.send(int(line))
        print("sent", flush=True)

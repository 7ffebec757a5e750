"""A network in virtual time: many DHT nodes in one process, no sockets, no waiting, the same run for the same seed.

`VirtualLoop` is an event loop whose clock jumps to the next timer; `VirtualNet` carries datagrams with a log-normal
delay, loses some, and drops those to hosts that are down. `run` runs a coroutine in a fresh network.
"""

from __future__ import annotations

import asyncio
import random
import selectors
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest.mock import patch

from fastcas.dht import identity, protocol, records
from fastcas.dht.server import FcServer
from fastcas.peers.policy import AddressPolicy

T = TypeVar("T")
Address = tuple[str, int]
DHT_PORT = 8468
DATA_PORT = 9000
WALL_ZERO = 1_800_000_000.0


class _JumpingSelector(selectors.SelectSelector):
    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("virtual time: everybody waits and no timer is set")
        self.loop.now += max(timeout, 0.0)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop that never waits: `time` moves to the next timer at once."""

    def __init__(self) -> None:
        self.now = 1000.0
        selector = _JumpingSelector()
        selector.loop = self
        super().__init__(selector)
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self.now

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        """Run `func` at once: a thread would take real time."""
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as exc:  # noqa: BLE001 - it is the caller's
            future.set_exception(exc)
        return future


class VirtualTransport(asyncio.DatagramTransport):
    """One host's socket."""

    def __init__(self, net: VirtualNet, address: Address, protocol: asyncio.DatagramProtocol) -> None:
        super().__init__()
        self.net = net
        self.address = address
        self.protocol = protocol
        self.is_up = True

    def sendto(self, data: Any, addr: Any = None) -> None:
        if self.is_up:
            self.net.carry(self.address, addr, bytes(data))

    def close(self) -> None:
        self.is_up = False
        self.net.hosts.pop(self.address, None)

    def is_closing(self) -> bool:
        return not self.is_up

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self.address if name == "sockname" else default


class VirtualNet:
    """The wires between the hosts. Delays in seconds, one way; `loss` is a share of all datagrams."""

    def __init__(
        self, loop: VirtualLoop, *, seed: int = 1, median_s: float = 0.040, sigma: float = 0.5, loss: float = 0.0
    ) -> None:
        self.loop = loop
        self.rng = random.Random(seed)
        self.hosts: dict[Address, VirtualTransport] = {}
        self.median_s = median_s
        self.sigma = sigma
        self.loss = loss
        self.count: Counter[str] = Counter()
        self.largest = 0
        self.nodes: list[FcServer] = []
        self.taps: list[Callable[[Address, Address, bytes], None]] = []

    def open(
        self,
        loop: asyncio.AbstractEventLoop,
        protocol: asyncio.DatagramProtocol,
        ip: str,
        port: int,
        on_lost: Callable[[OSError], None],
    ) -> VirtualTransport:
        """Stand in for `fastcas.dht.udp.open_udp`."""
        transport = VirtualTransport(self, (ip, port), protocol)
        self.hosts[ip, port] = transport
        return transport

    def carry(self, source: Address, target: Address, data: bytes) -> None:
        self.count["datagrams"] += 1
        self.count["bytes"] += len(data) + 28
        self.largest = max(self.largest, len(data))
        for tap in self.taps:
            tap(source, target, data)
        if self.loss and self.rng.random() < self.loss:
            self.count["lost"] += 1
            return
        delay_s = self.median_s * self.rng.lognormvariate(0.0, self.sigma)
        self.loop.call_later(delay_s, self._deliver, source, target, data)

    def _deliver(self, source: Address, target: Address, data: bytes) -> None:
        host = self.hosts.get(target)
        if host is None:
            self.count["to_dead"] += 1
        else:
            host.protocol.datagram_received(data, source)

    # --- nodes ---

    async def node(
        self, number: int, *, serves: bool = True, ip: str | None = None, key: int | None = None, **options: Any
    ) -> FcServer:
        """Return a listening node at 10.x.x.x:8468 (or `ip`) with an identity that depends on `key or number` only."""
        server = FcServer(
            seed=random.Random(f"node {key or number}").randbytes(32),
            policy=AddressPolicy(own=(), allow_private=True),
            open_transport=self.open,
            wall=lambda: WALL_ZERO + self.loop.now,
            rng=random.Random(f"choices {number}"),
            **options,
        )
        self.nodes.append(server)
        ip = ip or f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
        await server.listen(DHT_PORT, ip)
        if serves:
            server.announcer.set_data_port(DATA_PORT)
        return server

    async def grow(self, n: int) -> list[FcServer]:
        """Return `n` nodes that joined through the first one, a few at a time."""
        nodes = [await self.node(number + 1) for number in range(n)]
        nodes[0].start()
        for start in range(1, n, 10):
            for node in nodes[start : start + 10]:
                node.start([address_of(nodes[0])])
            await asyncio.sleep(1.0)
        await asyncio.sleep(5.0)
        return nodes

    def kill(self, nodes: list[FcServer]) -> None:
        """Let nodes vanish without a word."""
        for node in nodes:
            node.stop()


def address_of(node: FcServer) -> Address:
    """Return the UDP address of a virtual node."""
    transport = next(iter(node._transports.values()))
    assert isinstance(transport, VirtualTransport)
    return transport.address


def true_nearest(nodes: list[FcServer], target: int, k: int) -> list[bytes]:
    """Return the ids of the `k` nodes that really are nearest to a target."""
    ids: list[bytes] = [node.identity.node_id for node in nodes]
    return sorted(ids, key=lambda node_id: int.from_bytes(node_id) ^ target)[:k]


@contextmanager
def known_signatures() -> Iterator[None]:
    """Let nodes believe a signature that one of this process's keys has just made, without the arithmetic.

    Any other one is verified as ever: the answers are the same, a network takes a third less time.
    """
    made: set[tuple[bytes, bytes, bytes]] = set()
    sign = identity.Identity.sign

    def sign_and_remember(self: identity.Identity, text: bytes) -> bytes:
        signature = sign(self, text)
        made.add((self.public, signature, text))
        return signature

    def verify(public: bytes, signature: bytes, text: bytes) -> bool:
        seen = (public, signature, text)
        if seen in made:
            made.remove(seen)
            return True
        return identity.verify(public, signature, text)

    with (
        patch.object(identity.Identity, "sign", sign_and_remember),
        patch.object(protocol, "verify", verify),
        patch.object(records, "verify", verify),
    ):
        yield


def run(body: Callable[[VirtualNet], Coroutine[Any, Any, T]], **options: Any) -> T:
    """Run `body(net)` in a fresh virtual network and return its result; all nodes are stopped at the end."""
    with known_signatures(), asyncio.Runner(loop_factory=VirtualLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, VirtualLoop)
        net = VirtualNet(loop, **options)
        return runner.run(_bounded(net, body))


async def _bounded(net: VirtualNet, body: Callable[[VirtualNet], Coroutine[Any, Any, T]]) -> T:
    try:
        return await body(net)
    finally:
        for node in net.nodes:
            node.stop()
        await asyncio.sleep(0)

"""`DhtProcess`: a DHT process of our own in client mode, for who has no node: it asks and publishes, never routes.

Owns the child (`python -m fastcas.dht --channel FD`), the channel to it and the two rings. The child ends by
itself when the channel closes, so nothing is left behind however this process ends.
"""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from fastcas.errors import FastCASError, NetworkError, PortInUse
from fastcas.peers.ring_discovery import RingDiscovery
from fastcas.table import Channel, Ring

__all__ = ["DhtProcess"]

log = logging.getLogger(__name__)

START_S = 10.0  # a Python start-up on a busy machine
END_S = 2.0


class DhtProcess:
    """A DHT client process. `async with DhtProcess(bootstrap) as dht: dht.discovery …`.

    `contacts` after `start` says how many nodes answered; 0 although bootstrap nodes were given means that the
    bootstrap failed (`require_contacts` raises then). The process goes on trying in the background.
    """

    def __init__(
        self, bootstrap: Sequence[tuple[str, int]] = (), *, host: str = "0.0.0.0", network_key: bytes | None = None
    ) -> None:
        """Prepare; nothing runs before `start`."""
        self._bootstrap = [(str(h), int(p)) for h, p in bootstrap]
        self._host = host
        self._network_key = network_key
        self._child: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._discovery: RingDiscovery | None = None
        self._first: asyncio.Future[dict[str, Any]] | None = None
        self.contacts = 0
        self.node_id: str | None = None
        self.port = 0

    @property
    def discovery(self) -> RingDiscovery:
        """The backend; only after `start`."""
        if self._discovery is None:
            raise NetworkError("DHT process: not started")
        return self._discovery

    @property
    def is_alive(self) -> bool:
        """Whether the child runs."""
        return self._child is not None and self._child.poll() is None

    async def __aenter__(self) -> DhtProcess:
        """Start."""
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Close."""
        await self.close()

    async def start(self) -> None:
        """Start the child and join the network; a second call does nothing.

        Raises:
            NetworkError: The child did not start within 10 s or said why it cannot.
        """
        if self._child is not None:
            return
        try:
            await self._start()
        except BaseException:
            await self.close()
            raise

    async def _start(self) -> None:
        loop = asyncio.get_running_loop()
        mine, theirs = Channel.pair()
        self._channel = mine
        try:
            self._child = _spawn(theirs.fileno())
        finally:
            theirs.close()
        requests, answers = Ring.create(), Ring.create()
        self._discovery = RingDiscovery(requests, answers)
        self._first = loop.create_future()
        mine.attach_to(loop, self._on_message, self._on_eof)
        mine.send(
            {
                "op": "start", "host": self._host, "port": 0, "port_required": False, "data_port": 0,
                "bootstrap": [list(peer) for peer in self._bootstrap], "seed": None, "state_path": None,
                "client": True, "network_key": self._network_key,
            },
            [requests.memfd, requests.eventfd, answers.memfd, answers.eventfd],
        )  # fmt: skip
        try:
            async with asyncio.timeout(START_S):
                message = await self._first
        except TimeoutError:
            raise NetworkError(f"DHT process: not ready within {START_S:.0f} s") from None
        if message.get("op") != "ready":
            kind: type[FastCASError] = PortInUse if message.get("error") == "port_in_use" else NetworkError
            raise kind(f"DHT process: {message.get('message', 'ended before it was ready')}")
        self.port = int(message["port"])
        self.node_id = str(message["node_id"])
        if self._bootstrap:
            self.contacts = await self._discovery.bootstrap(self._bootstrap)

    def require_contacts(self) -> None:
        """Raise when bootstrap nodes were given and none answered.

        Raises:
            NetworkError: "DHT bootstrap failed", naming the addresses.
        """
        if self._bootstrap and not self.contacts:
            shown = ", ".join(f"{host}:{port}" for host, port in self._bootstrap[:4])
            raise NetworkError(f"DHT bootstrap failed: no answer from {shown}; static peers still work")

    def _on_message(self, message: dict[str, Any], fds: list[int]) -> None:
        if self._first is not None and not self._first.done():
            self._first.set_result(message)

    def _on_eof(self) -> None:
        if self._first is not None and not self._first.done():
            self._first.set_result({"op": "failed", "message": "ended before it was ready"})
        else:
            log.warning("DHT process ended; static peers still work")

    async def close(self) -> None:
        """End the child within 2 s, by force if it must be; idempotent."""
        discovery, channel, child = self._discovery, self._channel, self._child
        self._discovery = self._channel = None
        if discovery is not None:
            await discovery.close()
        if channel is not None:
            channel.detach()
            channel.close()
        if child is None:
            return
        try:
            await asyncio.to_thread(child.wait, END_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _spawn(channel_fd: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "fastcas.dht", "--channel", str(channel_fd)]
    try:
        return subprocess.Popen(command, pass_fds=[channel_fd], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    except OSError as exc:
        raise NetworkError(f"DHT process: cannot be started: {exc}") from exc

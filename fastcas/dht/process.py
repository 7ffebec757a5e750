"""The DHT process: `python -m fastcas.dht --channel FD`. Messages: see the parent's side of the channel.

Owns the event loop (uvloop) and the order of life: wait for `start`, bind, say `ready` (or `failed` and exit),
serve rings and messages until the channel ends, then withdraw, save and exit within 2 s. Never touches a file but
the state file it was told.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvloop

from fastcas.config import ANNOUNCE_POLICIES
from fastcas.dht.budgets import ANNOUNCE_RATE_BPS
from fastcas.dht.server import FcServer
from fastcas.dht.service import DhtService, snapshot_keys
from fastcas.errors import FastCASError, LocalProtocolError, PortInUse, UsageError
from fastcas.limits import CHILD_LINGER_S
from fastcas.table import Channel, Ring, read_keys

__all__ = ["DhtMain", "main"]

log = logging.getLogger(__name__)

Message = dict[str, Any]


class DhtMain:
    """One DHT process around one channel. `run` returns the exit code."""

    def __init__(self, channel: Channel) -> None:
        """Serve the parent at the other end of `channel`."""
        self._channel = channel
        self._inbox: asyncio.Queue[tuple[Message, list[int]] | None] = asyncio.Queue()
        self._server: FcServer | None = None
        self._service: DhtService | None = None

    def stop(self) -> None:
        """End cleanly, as if the parent had closed the channel."""
        self._inbox.put_nowait(None)

    async def run(self) -> int:
        """Serve until the channel ends; return the exit code."""
        loop = asyncio.get_running_loop()
        self._channel.attach_to(loop, lambda message, fds: self._inbox.put_nowait((message, fds)), self.stop)
        code = 0
        try:
            while (entry := await self._inbox.get()) is not None:
                message, fds = entry
                try:
                    await self._take(message, fds)
                except FastCASError as exc:
                    if self._server is not None:
                        log.error("message %s refused: %s", message.get("op"), exc)
                        continue
                    error = "port_in_use" if isinstance(exc, PortInUse) else type(exc).__name__
                    self._channel.send({"op": "failed", "error": error, "message": str(exc)})
                    code = exc.exit_code if isinstance(exc, PortInUse) else 1
                    break
                finally:
                    for fd in fds:
                        os.close(fd)
        finally:
            await self._close()
        return code

    async def _close(self) -> None:
        try:
            async with asyncio.timeout(CHILD_LINGER_S - 0.2):
                if self._service is not None:
                    await self._service.close()
                if self._server is not None:
                    await self._server.close()
        except TimeoutError:
            log.warning("leaving took too long; others will see our records expire")
        self._channel.detach()
        self._channel.close()

    async def _take(self, message: Message, fds: Sequence[int]) -> None:
        match message:
            case {"op": "start"} if self._server is None:
                await self._start(message, fds)
            case {"op": "keys"} if self._server is not None and len(fds) == 1:
                view = read_keys(fds[0])
                keys = snapshot_keys(view)
                view.release()
                self._server.announcer.set_snapshot(keys)
            case {"op": "data_port", "port": int(port)} if self._server is not None and 0 <= port <= 65535:
                self._server.announcer.set_data_port(port)
            case _:
                raise LocalProtocolError(f"DHT process: unexpected message {str(message.get('op'))[:32]!r}")

    async def _start(self, message: Message, fds: Sequence[int]) -> None:
        match message:
            case {
                "host": str(host),
                "port": int(port),
                "port_required": bool(port_required),
                "data_port": int(data_port),
                "bootstrap": list(bootstrap),
                "seed": bytes() | None as seed,
                "state_path": str() | None as state_path,
                "client": bool(client),
                "network_key": bytes() | None as network_key,
            } if len(fds) == 4 and 0 <= port <= 65535 and 0 <= data_port <= 65535:
                pass
            case _:
                raise LocalProtocolError("DHT process: malformed start message")
        announce, rate_Bps = message.get("announce", "auto"), message.get("announce_rate_Bps", ANNOUNCE_RATE_BPS)
        if announce not in ANNOUNCE_POLICIES or not isinstance(rate_Bps, int) or rate_Bps < 1:
            raise LocalProtocolError("DHT process: malformed start message")
        if seed is not None and len(seed) != 32:
            raise LocalProtocolError(f"DHT process: seed: expected 32 B, got {len(seed)} B")
        server = FcServer(
            seed=seed,
            state_path=Path(state_path) if state_path is not None else None,
            is_client=client,
            network_key=network_key,
            announce=announce,
            announce_rate_Bps=rate_Bps,
        )
        try:
            await server.listen(port, host)
        except PortInUse as exc:
            if port_required:
                raise
            log.warning("%s; taking any other", exc)
            await server.listen(0, host)
        self._server = server
        server.announcer.set_data_port(data_port)
        requests = Ring.attach(fds[0], fds[1])
        self._service = DhtService(server, requests, Ring.attach(fds[2], fds[3]))
        self._service.attach()
        server.start([(str(peer[0]), int(peer[1])) for peer in bootstrap])
        self._channel.send({"op": "ready", "port": server.port, "node_id": server.node_id})


async def _run(channel: Channel) -> int:
    process = DhtMain(channel)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, process.stop)
    # Ctrl-C reaches the whole terminal group; our parent decides and closes the channel.
    loop.add_signal_handler(signal.SIGINT, lambda: None)
    return await process.run()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the process; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m fastcas.dht", description="DHT process of a fastcas node")
    parser.add_argument("--channel", type=int, required=True, metavar="FD", help="inherited end of a channel")
    options = parser.parse_args(arguments)
    logging.basicConfig(
        level=os.environ.get("FASTCAS_LOG", "WARNING").upper(), format="%(asctime)s %(name)s %(levelname)s %(message)s"
    )
    logging.getLogger("rpcudp").setLevel(logging.CRITICAL)
    try:
        channel = Channel.from_fd(options.channel)
    except UsageError as exc:
        sys.stderr.write(f"fastcas.dht: {exc}\n")
        return exc.exit_code
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(channel))

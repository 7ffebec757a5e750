"""One worker process: uvloop, the engine, the channel to the parent.

Starts with the `start` message and its descriptors, says `ready`, serves until `drain` is done, the parent is gone
or SIGTERM. Owns its event loop and everything that it was handed. Light by design: no numpy, no cryptography.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
from typing import Any

import msgpack
import uvloop

from fastcas.errors import FastCASError, LocalProtocolError
from fastcas.limits import (
    BLOBS_OPEN_MAX,
    CONNECTIONS_PER_SOURCE,
    CONNECTIONS_PER_WORKER,
    DRAIN_S,
    PER_SOURCE_MIN,
    RESERVED_FDS,
    TICK_S,
    UPLOAD_SLOTS,
    UPLOAD_SLOTS_MIN,
)
from fastcas.serve._engine import DRAINED, Engine, Gone, Sent, Withdrawn
from fastcas.serve.swarm import SwarmService
from fastcas.table._shared import Counters, GivenBoard, HaveLog, Ring
from fastcas.table.channel import Channel
from fastcas.table.snapshot import read_swarm

__all__ = ["Worker", "run_worker"]

log = logging.getLogger(__name__)

START_FDS = 5  # listener, counters, events ring memfd, events ring eventfd, given board; with a limit, its bucket


class Worker:
    """The process's state; `run` is its life."""

    def __init__(self, channel: Channel) -> None:
        """Serve what the parent at the other end of `channel` says."""
        self._channel = channel
        self._loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self._done = asyncio.Event()
        self._engine: Engine | None = None
        self._swarm: SwarmService | None = None
        self._events: Ring | None = None
        self._counters: Counters | None = None
        self._slot = 0
        self._board: GivenBoard | None = None
        self._fds: list[int] = []
        self._tick: asyncio.TimerHandle | None = None
        self._draining = False
        self._drained = False

    async def run(self) -> None:
        """Serve until the end; returns when everything is closed."""
        self._channel.attach_to(self._loop, self._on_message, self._done.set)
        self._loop.add_signal_handler(signal.SIGTERM, self.drain)
        try:
            await self._done.wait()
        finally:
            self._close()

    def drain(self) -> None:
        """Finish what was asked for, then end; at most 30 s."""
        if self._draining:
            return
        self._draining = True
        self._loop.call_later(DRAIN_S, self._finish_drain)
        if self._engine is None or self._swarm is None:
            self._finish_drain()
            return
        self._engine.drain()
        self._swarm.close()  # the long polls' answers are their connections' last ones
        self._engine.tick()

    def _finish_drain(self) -> None:
        if self._drained:
            return
        self._drained = True
        with contextlib.suppress(FastCASError, OSError):
            self._channel.send({"op": "drained"})
        self._done.set()

    def _close(self) -> None:
        if self._tick is not None:
            self._tick.cancel()
        if self._swarm is not None:
            self._swarm.close()
        if self._engine is not None:
            self._loop.remove_reader(self._engine.fileno())
            self._engine.close()
        for shared in (self._events, self._counters, self._board):
            if shared is not None:
                shared.close()
        self._channel.close()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    # --- the parent's messages ---

    def _on_message(self, message: dict[str, Any], fds: list[int]) -> None:
        handler = {
            "start": self._on_start,
            "table": self._on_table,
            "have": self._on_have,
            "have_end": self._on_have_end,
            "swarm": self._on_swarm,
            "drain": self._on_drain,
        }.get(str(message.get("op")))
        try:
            if handler is None:
                raise LocalProtocolError(f"message {message.get('op')!r}: unknown, ignored")
            handler(message, fds)
        except (FastCASError, OSError, KeyError, TypeError, IndexError) as exc:
            log.error("message not carried out op=%s error=%s", message.get("op"), exc)
            if self._engine is None:  # without a start there is nothing to live for
                self._done.set()
        finally:
            for fd in fds:  # every object made from them has its own duplicate
                os.close(fd)

    def _on_start(self, message: dict[str, Any], fds: list[int]) -> None:
        if self._engine is not None:
            raise LocalProtocolError("message start: came twice, ignored")
        config = message["config"]
        expected = START_FDS + bool(config.get("max_upload"))
        if len(fds) != expected:
            raise LocalProtocolError(f"message start: expected {expected} descriptors, got {len(fds)}")
        listener, counters, ring_memfd, ring_eventfd, board = fds[:START_FDS]
        workers = max(1, int(message["workers"]))
        self._slot = int(message["index"])
        self._counters = Counters.attach(counters)
        self._events = Ring.attach(ring_memfd, ring_eventfd)
        self._board = GivenBoard.attach(board)
        self._fds.append(os.dup(listener))
        engine = Engine(
            self._fds[-1],
            self._on_flags,
            counters_fd=counters,
            counter_slot=self._slot,
            send_path=config.get("send_path", "auto"),
            bucket_fd=fds[START_FDS] if len(fds) > START_FDS else -1,
            upload_slots=_share(UPLOAD_SLOTS, workers, UPLOAD_SLOTS_MIN),
            max_per_source=_share(CONNECTIONS_PER_SOURCE, workers, PER_SOURCE_MIN),
            own_prefixes=config.get("own_prefixes", ()),
            max_connections=_connections_max(),
        )
        self._engine = engine
        self._swarm = SwarmService(engine, self._loop, str(message["node_id"]), self._report, self._board)
        self._loop.add_reader(engine.fileno(), engine.run)
        self._on_tick()
        self._channel.send({"op": "ready"})

    def _on_table(self, message: dict[str, Any], fds: list[int]) -> None:
        engine, swarm = self._started()
        engine.set_table(fds[0], int(message["number"]))
        swarm.table_changed()

    def _on_have(self, message: dict[str, Any], fds: list[int]) -> None:
        self._started()[1].add_log(HaveLog.attach(fds[0]))

    def _on_have_end(self, message: dict[str, Any], fds: list[int]) -> None:
        self._started()[1].end_log(message["manifest_hash"])

    def _on_swarm(self, message: dict[str, Any], fds: list[int]) -> None:
        self._started()[1].set_swarm(read_swarm(fds[0]))

    def _on_drain(self, message: dict[str, Any], fds: list[int]) -> None:
        self.drain()

    def _started(self) -> tuple[Engine, SwarmService]:
        if self._engine is None or self._swarm is None:
            raise LocalProtocolError("message before start, ignored")
        return self._engine, self._swarm

    # --- the engine's queues ---

    def _on_flags(self, flags: int) -> None:
        engine, swarm = self._started()
        for event in engine.take_events():
            if isinstance(event, Sent):
                swarm.sent(event.handle, event.ok)
            elif isinstance(event, Gone):
                swarm.gone(event.handle)
            elif isinstance(event, Withdrawn):
                log.warning("blob withdrawn blob=%d reason=%s", event.blob, event.reason)
                self._report({"op": "withdraw", "blob": event.blob, "reason": event.reason})
        for parked in engine.take_parked():
            swarm.answer(parked)
        if flags & DRAINED:
            self._finish_drain()

    def _on_tick(self) -> None:
        if self._engine is None or self._done.is_set():
            return
        self._tick = self._loop.call_later(TICK_S, self._on_tick)
        self._engine.tick()
        if self._counters is not None and self._swarm is not None:
            self._swarm.tick()
            self._counters.set(self._slot, "next_given", self._swarm.n_given)
            self._counters.set(self._slot, "next_lost", self._swarm.n_lost)

    def _report(self, message: dict[str, Any]) -> None:
        if self._events is not None and not self._events.push(msgpack.packb(message)):
            log.warning("events ring full, message dropped op=%s", message["op"])


def _share(total: int, workers: int, at_least: int) -> int:
    """Return one worker's part of a limit of the node; the kernel does not spread connections evenly."""
    return max(-(-total // workers), min(total, at_least))


def _connections_max() -> int:
    """Take all descriptors that we may have; return how many of them connections get."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY:
        return CONNECTIONS_PER_WORKER
    return max(min(CONNECTIONS_PER_WORKER, soft - BLOBS_OPEN_MAX - RESERVED_FDS), 16)


def run_worker(channel_fd: int) -> int:
    """Be a worker: serve on the channel at `channel_fd` until the end. Returns the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the supervisor decides
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)

    async def main() -> None:
        await Worker(Channel.from_fd(channel_fd)).run()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
    return 0

"""The supervisor: binds, spawns, watches, relays, handles signals; does nothing else, so that nothing else fails.

Owns the lock on the storage folder, the listeners, the counters, the given board and every child process. A dead
child is replaced: at once if it had served, else after 0.1 s doubled to 5 s. A dead worker's listener stays open
here and goes to its replacement with the connections queued in it. Signals: TERM and INT drain (30 s; a second one
ends at once), HUP replaces the workers one by one. Children end by themselves when their channel does.
`python -m fastcas.node.supervisor --config JSON [--owner-fd N]` is how the library starts one: its stdout is then
one JSON object instead of the ready line, and it ends within 2 s after the pipe N does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from fastcas.config import NodeConfig
from fastcas.errors import FastCASError, LocalProtocolError, UsageError
from fastcas.limits import BACKOFF_MAX_S, BACKOFF_MIN_S, CHILD_LINGER_S, DRAIN_S, HUNG_AFTER_S, WORKERS_MAX
from fastcas.node import wire
from fastcas.node.child import BackOff, Child
from fastcas.node.listeners import open_listeners, probe_udp
from fastcas.node.relay import Relay
from fastcas.peers.policy import own_networks
from fastcas.table import Bucket, Counters, GivenBoard, Ring

__all__ = ["Supervisor", "run_supervisor"]

log = logging.getLogger(__name__)

Message = dict[str, Any]
START_S = 30.0  # a child that is not ready by then never will be
WATCH_S = 1.0  # how often heartbeats are looked at
CRASHES_REPORTED = 10  # this many early deaths in CRASH_WINDOW_S are reported, and fatal before the first ready
CRASH_WINDOW_S = 60.0
OWN_PREFIXES_MAX = 16  # what a worker's engine takes
AGENT_SLOT = 2 * WORKERS_MAX  # workers use 0 .. 2 * WORKERS_MAX - 1: old and new while they are replaced
N_SLOTS = AGENT_SLOT + 1


class Seat:
    """One worker position: its listener outlives the processes that sit there."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.child: Child | None = None
        self.back_off = BackOff(BACKOFF_MIN_S, BACKOFF_MAX_S)
        self.early_deaths: deque[float] = deque(maxlen=CRASHES_REPORTED)


class Supervisor:
    """One node's processes. `run()` returns the exit status of the command."""

    def __init__(
        self, config: NodeConfig, lock_fd: int, report: Callable[[Message], None], *, owner_fd: int | None = None
    ) -> None:
        self._config = config
        self._lock_fd = lock_fd
        self._report = report
        self._owner_fd = owner_fd
        self._owner_gone = False
        self._seats: list[Seat] = []
        self._listen_host = config.host
        self._port = 0
        self._agent: Child | None = None
        self._dht: Child | None = None
        self._drainers: set[Child] = set()
        self._workers_relay = Relay()
        self._dht_relay = Relay()
        self._slots_used: dict[int, list[Ring]] = {}
        self._dht_rings: list[Ring] = []
        self._back_offs = {"agent": BackOff(BACKOFF_MIN_S, BACKOFF_MAX_S), "dht": BackOff(BACKOFF_MIN_S, BACKOFF_MAX_S)}
        self._facts: Message = {}
        self._identity: Message | None = None
        self._dht_port: int | None = None
        self._network_key: bytes | None = None
        self._n_chunks = 0
        self._is_announced = False
        self._stop_reason: FastCASError | None = None
        self._stopping = False
        self._rolling = False
        self._roll_again = False  # HUP came while the workers were being replaced
        self._pending_starts: dict[int, Any] = {}
        self._timers: set[asyncio.TimerHandle] = set()

    # ---- life cycle ----

    async def run(self) -> int:
        """Start everything, stay until told to stop, end everything; return the exit status."""
        self._loop = asyncio.get_running_loop()
        self._done = asyncio.Event()
        self._changed = asyncio.Event()
        self._counters = Counters.create(N_SLOTS)
        self._given = GivenBoard.create()
        rate_Bps = self._config.max_upload_rate()
        self._bucket = Bucket.create(rate_Bps) if rate_Bps else None
        for number, handler in (
            (signal.SIGTERM, self._on_stop_signal),
            (signal.SIGINT, self._on_stop_signal),
            (signal.SIGHUP, self._on_replace_signal),
        ):
            self._loop.add_signal_handler(number, handler)
        if self._owner_fd is not None:
            self._loop.add_reader(self._owner_fd, self._on_owner_gone)
        try:
            self._open_ports()
            self._start_agent()
            self._call_later(WATCH_S, self._watch)
            await self._done.wait()
        except FastCASError as error:
            self._stop_reason = self._stop_reason or error
        finally:
            await self._end_children()
            self._close()
        if self._stop_reason is not None:
            raise self._stop_reason
        return 0

    def _open_ports(self) -> None:
        config = self._config
        self._network_key = config.read_network_key()
        if not config.no_dht and config.dht_port_required:
            probe_udp(config.host, config.dht_port)
        if config.workers:
            self._open_seats(config.host, config.port, config.workers)

    def _open_seats(self, host: str, port: int, count: int) -> None:
        listeners = open_listeners(host, port, count)
        self._listen_host = host
        self._port = listeners[0].getsockname()[1]
        self._seats = [Seat(listener) for listener in listeners]

    def _close(self) -> None:
        for timer in self._timers:
            timer.cancel()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self._loop.remove_signal_handler(number)
        if self._owner_fd is not None:
            self._loop.remove_reader(self._owner_fd)
        for seat in self._seats:
            seat.listener.close()
        self._workers_relay.close()
        self._dht_relay.close()
        for rings in (*self._slots_used.values(), self._dht_rings):
            for ring in rings:
                ring.close()
        self._counters.close()
        self._given.close()
        if self._bucket is not None:
            self._bucket.close()

    async def _end_children(self) -> None:
        """Drain the workers, let the agent withdraw while the DHT process lives, then end whatever is left."""
        self._stopping = True
        drain_s = CHILD_LINGER_S / 2 if self._owner_gone else DRAIN_S
        deadline = time.monotonic() + drain_s
        for child in self._workers():
            self._drain(child)
        if self._agent is not None:
            self._agent.send({"op": "stop"})
        await self._wait_until(lambda: self._agent is None and not self._workers(), deadline)
        if self._dht is not None:
            self._dht.hang_up()
        for child in self._children():
            child.hang_up()
        await self._wait_until(lambda: not self._children(), time.monotonic() + CHILD_LINGER_S)
        for child in self._children():
            log.warning("child does not end, killed child=%s pid=%d", child.name, child.pid)
            child.kill()
        await self._wait_until(lambda: not self._children(), time.monotonic() + CHILD_LINGER_S)

    async def _wait_until(self, condition: Callable[[], bool], deadline: float) -> None:
        while not condition() and (left := deadline - time.monotonic()) > 0:
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)

    def _stop(self, reason: FastCASError | None = None) -> None:
        if reason is not None and self._stop_reason is None:
            self._stop_reason = reason
        self._done.set()

    # ---- signals ----

    def _on_stop_signal(self) -> None:
        if self._done.is_set():
            for child in self._children():
                child.kill()
        self._stop()

    def _on_owner_gone(self) -> None:
        assert self._owner_fd is not None
        if not os.read(self._owner_fd, 64):
            self._loop.remove_reader(self._owner_fd)
            self._owner_gone = True
            self._stop()

    def _on_replace_signal(self) -> None:
        if self._rolling:
            self._roll_again = True
        elif not self._stopping:
            self._rolling = True
            self._replace_next(0)

    def _replace_next(self, index: int) -> None:
        """Replace the worker of seat `index` and go on with the next once the old one is drained."""
        if self._stopping or index >= len(self._seats):
            self._rolling = False
            if self._roll_again:
                self._roll_again = False
                self._on_replace_signal()
            return
        seat = self._seats[index]
        old = seat.child
        if old is None or not old.is_ready:
            self._replace_next(index + 1)
            return
        log.info("replacing worker seat=%d pid=%d", index, old.pid)
        new = self._start_worker(seat)

        def step() -> None:
            if new.is_ready and old.status is None:
                self._drain(old)
            if old.status is not None or (new.status is not None and seat.child is not new):
                self._replace_next(index + 1)
            else:
                self._call_later(0.05, step)

        self._call_later(0.05, step)

    # ---- children ----

    def _workers(self) -> list[Child]:
        return [seat.child for seat in self._seats if seat.child is not None] + list(self._drainers)

    def _children(self) -> list[Child]:
        return [child for child in (self._agent, self._dht) if child is not None] + self._workers()

    def _spawn(self, kind: str, module: str, slot: int = -1) -> Child:
        child = Child(kind, module, self._on_message, self._on_exit, slot=slot)
        log.info("started child=%s pid=%d", child.name, child.pid)
        return child

    def _start_agent(self) -> None:
        if self._agent is not None:
            return
        config = self._config
        self._agent = agent = self._spawn("agent", "fastcas.node.agent", AGENT_SLOT)
        agent.send(
            {"op": "start", "storage": config.storage_dir, "host": self._listen_host, "port": self._port,
             "label": config.node_id, "config": wire.config_to_map(config), "dht": not config.no_dht,
             "slot": AGENT_SLOT, "supervisor": os.getpid()},
            [self._lock_fd, self._counters.fd],
        )  # fmt: skip
        for child in self._workers():
            self._tell_agent_of_worker(child)
        if self._dht is not None and self._dht.is_ready:
            self._tell_agent_of_dht()
        self._tell_agent_state()

    def _fill_seat(self, seat: Seat) -> None:
        if seat.child is None and self._identity is not None:
            self._start_worker(seat)

    def _start_worker(self, seat: Seat) -> Child:
        """Start a worker on a seat; the one that sits there goes on serving until it is drained."""
        assert self._identity is not None
        slot = next(number for number in range(AGENT_SLOT) if number not in self._slots_used)
        for gauge in ("active", "epoch_safe", "epoch_table"):
            self._counters.set(slot, gauge, 0)
        ring = Ring.create()
        self._slots_used[slot] = [ring]
        if seat.child is not None:
            self._drainers.add(seat.child)
        seat.child = child = self._spawn("worker", "fastcas.serve", slot)
        config = self._config
        child.send(
            {"op": "start", "index": slot, "workers": len(self._seats), "node_id": self._identity["node_id"],
             "config": {"send_path": config.send_path, "max_upload": config.max_upload_rate(),
                        "own_prefixes": [str(network) for network in own_networks()[:OWN_PREFIXES_MAX]],
                        "node_label": config.node_id}},
            [seat.listener.fileno(), self._counters.fd, ring.memfd, ring.eventfd, self._given.fd,
             *([self._bucket.fd] if self._bucket else [])],
        )  # fmt: skip
        self._workers_relay.replay(child)
        self._tell_agent_of_worker(child)
        return child

    def _start_dht(self) -> None:
        if self._dht is not None or self._identity is None:
            return
        config = self._config
        for ring in self._dht_rings:
            ring.close()
        self._dht_rings = [Ring.create(), Ring.create()]
        self._dht = child = self._spawn("dht", "fastcas.dht")
        restart = self._dht_port is not None
        child.send(
            {"op": "start", "host": config.host, "port": self._dht_port if restart else config.dht_port,
             "port_required": config.dht_port_required, "data_port": self._port,
             "bootstrap": [[peer.ip, peer.port] for peer in config.bootstrap_peers()],
             "seed": self._identity["seed"], "state_path": os.path.join(config.storage_dir, "dht.state"),
             "client": False, "network_key": self._network_key, "announce": config.announce,
             "announce_rate_Bps": config.max_announce_rate()},
            self._dht_ring_fds(),
        )  # fmt: skip
        self._dht_relay.replay(child)

    def _dht_ring_fds(self) -> list[int]:
        return [fd for ring in self._dht_rings for fd in (ring.memfd, ring.eventfd)]

    def _drain(self, child: Child) -> None:
        if not child.is_draining:
            child.is_draining = True
            child.send({"op": "drain"})
            self._call_later(DRAIN_S, child.kill)

    # ---- messages ----

    def _tell_agent_of_worker(self, child: Child) -> None:
        if self._agent is not None and child.slot in self._slots_used:
            ring = self._slots_used[child.slot][0]
            message = {"op": "worker", "index": child.slot, "incarnation": child.pid, "pid": child.pid}
            self._agent.send(message, [ring.memfd, ring.eventfd])

    def _tell_agent_of_dht(self) -> None:
        if self._agent is not None and self._identity is not None:
            message = {"op": "dht", "port": self._dht_port, "node_id": self._identity["node_id"]}
            self._agent.send(message, self._dht_ring_fds())

    def _tell_agent_state(self) -> None:
        """Facts for `status`: which processes run, on which ports."""
        if self._agent is not None:
            workers = [
                {"pid": worker.pid, "slot": worker.slot, "ready": worker.is_ready, "draining": worker.is_draining}
                for worker in self._workers()
            ]
            self._agent.send(
                {"op": "state", "host": self._listen_host, "port": self._port, "dht_port": self._dht_port,
                 "dht_pid": self._dht.pid if self._dht else None, "workers": workers}
            )  # fmt: skip

    def _on_message(self, child: Child, message: Message, fds: list[int]) -> None:
        handler = _HANDLERS.get((child.kind, message.get("op")))
        try:
            if handler is None:
                raise KeyError("op")
            handler(self, child, message, fds)
        except (KeyError, TypeError, ValueError) as exc:
            log.error("unknown message child=%s op=%r problem=%s", child.name, message.get("op"), exc)
            for fd in fds:
                with contextlib.suppress(OSError):
                    os.close(fd)

    def _on_identity(self, child: Child, message: Message, fds: list[int]) -> None:
        self._identity = {"seed": message["seed"], "node_id": message["node_id"]}
        for seat in self._seats:
            self._try_start(partial(self._fill_seat, seat))
        if not self._config.no_dht:
            self._try_start(self._start_dht)

    def _on_agent_ready(self, child: Child, message: Message, fds: list[int]) -> None:
        child.is_ready = True
        self._n_chunks = message["chunks"]
        self._announce_if_ready()

    def _on_worker_ready(self, child: Child, message: Message, fds: list[int]) -> None:
        child.is_ready = True
        self._announce_if_ready()
        self._tell_agent_state()
        self._answer_starts()

    def _on_drained(self, child: Child, message: Message, fds: list[int]) -> None:
        child.hang_up()

    def _on_dht_ready(self, child: Child, message: Message, fds: list[int]) -> None:
        child.is_ready = True
        self._dht_port = message["port"]
        self._tell_agent_of_dht()
        self._announce_if_ready()
        self._tell_agent_state()

    def _on_failed(self, child: Child, message: Message, fds: list[int]) -> None:
        log.error("child failed child=%s error=%s: %s", child.name, message.get("error"), message.get("message"))
        if not self._is_announced:
            self._stop(wire.error_from_map(message))

    def _on_publish(self, child: Child, message: Message, fds: list[int]) -> None:
        if message["to"] == "workers":
            relay, running = self._workers_relay, self._workers()
        else:
            relay, running = self._dht_relay, [self._dht] if self._dht is not None else []
        relay.publish(running, message["key"], message["message"], fds, message["forward"])

    def _on_start_workers(self, child: Child, message: Message, fds: list[int]) -> None:
        request = message["id"]
        try:
            if self._seats:
                raise UsageError(f"start_server: this node serves already on port {self._port}")
            if not 1 <= message["workers"] <= WORKERS_MAX:
                raise UsageError(f"workers: expected 1..{WORKERS_MAX}, got {message['workers']}")
            self._open_seats(message["host"], message["port"], message["workers"])
        except FastCASError as error:
            child.send({"op": "reply", "id": request, "ok": False, **wire.error_to_map(error)})
            return
        self._pending_starts[request] = child
        for seat in self._seats:
            self._try_start(partial(self._fill_seat, seat))
        if self._dht is not None:
            self._dht.send({"op": "data_port", "port": self._port})

    def _answer_starts(self) -> None:
        if all(seat.child is not None and seat.child.is_ready for seat in self._seats):
            for request, child in self._pending_starts.items():
                child.send({"op": "reply", "id": request, "ok": True, "port": self._port})
            self._pending_starts.clear()

    def _on_agent_stop(self, child: Child, message: Message, fds: list[int]) -> None:
        self._stop()

    def _announce_if_ready(self) -> None:
        """Report that connections are accepted, once."""
        agent_ready = self._agent is not None and self._agent.is_ready
        dht_ready = self._config.no_dht or (self._dht is not None and self._dht.is_ready)
        workers_ready = all(seat.child is not None and seat.child.is_ready for seat in self._seats)
        if self._is_announced or not (agent_ready and dht_ready and workers_ready):
            return
        assert self._identity is not None
        self._is_announced = True
        self._facts = {
            "id": self._config.node_id or self._identity["node_id"], "node_id": self._identity["node_id"],
            "host": self._listen_host, "port": self._port, "workers": len(self._seats), "dht_port": self._dht_port,
            "storage": self._config.storage_dir, "chunks": self._n_chunks,
        }  # fmt: skip
        self._report(self._facts)

    # ---- exits and heartbeats ----

    def _on_exit(self, child: Child, status: int) -> None:
        self._changed.set()
        served = child.is_ready
        if not self._stopping and not child.is_draining:
            log.warning("child ended child=%s pid=%d status=%d", child.name, child.pid, status)
        if child.kind == "agent":
            self._agent = None
            self._pending_starts.clear()
            self._restart(self._back_offs["agent"], served, self._start_agent)
        elif child.kind == "dht":
            self._dht = None
            self._restart(self._back_offs["dht"], served, self._start_dht)
        else:
            self._worker_gone(child, served=served)
        if not served and not self._is_announced and child.kind != "worker" and status != 0:
            self._stop(LocalProtocolError(f"{child.name}: ended with status {status} before the node was ready"))
        self._tell_agent_state()

    def _worker_gone(self, child: Child, *, served: bool) -> None:
        self._drainers.discard(child)
        for ring in self._slots_used.pop(child.slot, []):
            ring.close()
        if self._agent is not None:
            self._agent.send({"op": "worker_gone", "index": child.slot})
        for seat in self._seats:
            if seat.child is child:
                seat.child = None
                if not served:
                    self._count_early_death(seat)
                self._restart(seat.back_off, served, partial(self._fill_seat, seat))
                return

    def _count_early_death(self, seat: Seat) -> None:
        now = time.monotonic()
        seat.early_deaths.append(now)
        if len(seat.early_deaths) == CRASHES_REPORTED and now - seat.early_deaths[0] <= CRASH_WINDOW_S:
            log.error("worker does not start deaths=%d window_s=%d", CRASHES_REPORTED, CRASH_WINDOW_S)
            seat.early_deaths.clear()
            error = LocalProtocolError(f"worker: died {CRASHES_REPORTED} times before it served")
            for request, child in self._pending_starts.items():
                child.send({"op": "reply", "id": request, "ok": False, **wire.error_to_map(error)})
            self._pending_starts.clear()
            if not self._is_announced:
                self._stop(error)

    def _restart(self, back_off: BackOff, served: bool, start: Callable[[], object]) -> None:
        delay_s = back_off.after_exit(served=served)
        if delay_s:
            self._call_later(delay_s, partial(self._try_start, start))
        else:
            self._try_start(start)

    def _try_start(self, start: Callable[[], object]) -> None:
        """Start a child unless the node ends; a machine that is out of processes gets another chance later."""
        if self._stopping or self._done.is_set():
            return
        try:
            start()
        except OSError as error:
            log.error("cannot start a child error=%s", error)
            self._call_later(BACKOFF_MAX_S, partial(self._try_start, start))

    def _watch(self) -> None:
        """Kill whoever has not turned its loop for 10 s, or does not get ready; its exit does the rest."""
        now = time.monotonic()
        for child in self._children():
            limit_s, last = START_S, child.started_at
            if child.kind == "agent" or (child.kind == "worker" and child.is_ready):
                limit_s, last = HUNG_AFTER_S, max(last, self._counters.get(child.slot, "heartbeat_ns") / 1e9)
            elif child.is_ready:
                continue
            if now - last > limit_s:
                log.error("child hangs, killed child=%s pid=%d", child.name, child.pid)
                child.kill()
        self._call_later(WATCH_S, self._watch)

    def _call_later(self, delay_s: float, callback: Callable[[], object]) -> None:
        def fire() -> None:
            self._timers.discard(handle)
            callback()

        handle = self._loop.call_later(delay_s, fire)
        self._timers.add(handle)


_HANDLERS: dict[tuple[str, Any], Callable[[Supervisor, Child, Message, list[int]], None]] = {
    ("agent", "identity"): Supervisor._on_identity,
    ("agent", "ready"): Supervisor._on_agent_ready,
    ("agent", "failed"): Supervisor._on_failed,
    ("agent", "publish"): Supervisor._on_publish,
    ("agent", "start_workers"): Supervisor._on_start_workers,
    ("agent", "stop"): Supervisor._on_agent_stop,
    ("worker", "ready"): Supervisor._on_worker_ready,
    ("worker", "drained"): Supervisor._on_drained,
    ("worker", "failed"): Supervisor._on_failed,
    ("dht", "ready"): Supervisor._on_dht_ready,
    ("dht", "failed"): Supervisor._on_failed,
}


def run_supervisor(config: NodeConfig, report: Callable[[Message], None], *, owner_fd: int | None = None) -> int:
    """Run a node in this process until it is told to stop; return the exit status.

    Args:
        config: Checked settings.
        report: Called once with the facts of the ready line.
        owner_fd: Read end of a pipe; the node ends within 2 s after the other end is closed.
    Raises:
        StoreLocked, PortInUse, PermissionDenied: Within 1 s, before anything was started.
        FastCASError: A child could not start.
    """
    from fastcas.node.folder import lock_folder

    lock_fd = lock_folder(config.root)
    try:
        return asyncio.run(Supervisor(config, lock_fd, report, owner_fd=owner_fd).run())
    finally:
        os.close(lock_fd)


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `python -m fastcas.node.supervisor`: JSON on stdout, for the library."""
    import argparse

    from fastcas.node.logs import set_up_logging

    parser = argparse.ArgumentParser(prog="fastcas.node.supervisor")
    parser.add_argument("--config", required=True)
    parser.add_argument("--owner-fd", type=int)
    options = parser.parse_args(arguments)
    set_up_logging()

    def report(facts: Message) -> None:
        sys.stdout.write(json.dumps(facts) + "\n")
        sys.stdout.flush()

    try:
        return run_supervisor(NodeConfig.from_json(options.config).check(), report, owner_fd=options.owner_fd)
    except FastCASError as error:
        report(wire.error_to_map(error))
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())

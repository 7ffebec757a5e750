"""Second processes for the tests of fastcas.table: `python -m tests.support.table_child ROLE CHANNEL_FD [ARGS]`."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastcas.table import Channel, GivenBoard, HaveLog, Ring, TableReader, read_keys

ROOT = Path(__file__).resolve().parents[2]
BUDGET_S = 30.0


@contextmanager
def child(role: str, *args: object) -> Iterator[tuple[Channel, subprocess.Popen[bytes]]]:
    """Start a role in a new process; gives our end of its channel. The process ends with the block."""
    ours, theirs = Channel.pair()
    command = [sys.executable, "-m", "tests.support.table_child", role, str(theirs.fileno()), *map(str, args)]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=ROOT)
    theirs.close()
    try:
        yield ours, process
    finally:
        ours.close()
        try:
            process.wait(BUDGET_S)
        finally:
            process.kill()
            process.wait()


def receive(channel: Channel, budget_s: float = BUDGET_S) -> tuple[dict[str, object], list[int]]:
    """Wait for the next message."""
    while True:
        received = channel.recv()
        if received is not None:
            return received
        if not select.select([channel], [], [], budget_s)[0]:
            raise TimeoutError(f"no message within {budget_s} s")


def _echo_fds(channel: Channel) -> None:
    """Read everything from each descriptor that comes, and send it back."""
    while True:
        message, fds = receive(channel)
        channel.send({"op": "read", "n": message["n"], "data": [os.read(fd, 100) for fd in fds]})
        for fd in fds:
            os.close(fd)


def _look(channel: Channel) -> None:
    """Look all keys of the latest keys snapshot up in the latest table, over and over, until told to stop.

    A key of a snapshot must be found in every table that comes after it, always.
    """
    reader: TableReader | None = None
    keys: memoryview | None = None
    rounds = misses = tables = 0
    while True:
        received = channel.recv()
        if received is not None:
            message, fds = received
            if message["op"] == "stop":
                break
            if message["op"] == "table":
                if reader is not None:
                    reader.close()
                reader = TableReader(fds[0])
                tables += 1
            else:
                keys = read_keys(fds[0])
            for fd in fds:
                os.close(fd)
            continue
        if reader is not None and keys is not None:
            misses += len(keys) // 32 - reader.lookup_many(keys)
            key = bytes(keys[:32])
            place = reader.lookup_chunk(key)
            misses += place != (key[0], int.from_bytes(key[1:5], "little"), 1 + key[5])
            rounds += 1
            if rounds == 1:
                channel.send({"op": "looking"})
    channel.send({"op": "done", "rounds": rounds, "misses": misses, "tables": tables})


def _echo_ring(channel: Channel) -> None:
    """Send every message of the first ring back on the second one, reversed, until an empty one comes."""
    _, fds = receive(channel)
    incoming, outgoing = Ring.attach(*fds[:2]), Ring.attach(*fds[2:])
    while True:
        if not select.select([incoming.eventfd], [], [], BUDGET_S)[0]:
            raise TimeoutError("no message on the ring")
        for message in incoming.drain():
            while not outgoing.push(message[::-1]):
                pass
            if not message:
                return


def _claim(channel: Channel, n: int, seed: int) -> None:
    """Claim chunks of one file until none is left, and say which."""
    _, fds = receive(channel)
    board = GivenBoard.attach(fds[0])
    claimed = []
    while (i := board.claim_from(b"m" * 32, n, 0, seed + 7919 * len(claimed))) is not None:
        claimed.append(i)
    channel.send({"op": "claimed", "chunks": claimed})


def _have(channel: Channel) -> None:
    """Follow a have log until it is complete; answer with what was seen step by step."""
    _, fds = receive(channel)
    log = HaveLog.attach(fds[0])
    seen: list[int] = []
    channel.send({"op": "following"})
    while len(seen) < log.n_total:
        seen += log.since(len(seen))
    channel.send({"op": "have", "seen": seen, "bits": log.bitfield()})


if __name__ == "__main__":
    roles = {"look": _look, "echo_fds": _echo_fds, "echo_ring": _echo_ring, "claim": _claim, "have": _have}
    try:
        with_channel = Channel.from_fd(int(sys.argv[2]))
        roles[sys.argv[1]](with_channel, *map(int, sys.argv[3:]))
        with_channel.close()
    except EOFError:
        sys.exit(0)

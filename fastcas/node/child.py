"""One child process of the supervisor: spawned by exec, watched through a pidfd, spoken to over a Channel.

Owns the process, its pidfd and our end of its channel. Knows nothing of what the child is for. A child's stdout
goes to our stderr: stdout belongs to the ready line.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from fastcas.errors import LocalProtocolError
from fastcas.table import Channel

__all__ = ["BackOff", "Child"]

log = logging.getLogger(__name__)

Message = dict[str, Any]


class BackOff:
    """Delays between starts of a child: none after it served, 0.1 s doubled to 5 s while it dies before that."""

    def __init__(self, first_s: float, last_s: float) -> None:
        self._first_s = first_s
        self._last_s = last_s
        self.failures = 0

    def after_exit(self, *, served: bool) -> float:
        """Count one exit and return the seconds to wait before the next start."""
        if served:
            self.failures = 0
            return 0.0
        delay_s = min(self._first_s * 2.0 ** min(self.failures, 16), self._last_s)
        self.failures += 1
        return float(delay_s)


class Child:
    """A running child. `on_message(child, message, fds)` owns the fds; `on_exit(child, status)` comes once, last.

    Attributes:
        kind: "agent", "dht" or "worker".
        pid: Process id.
        started_at: CLOCK_MONOTONIC seconds.
        is_ready: Set by the owner when the child said so.
        slot: Counter slot of the child, -1 = none.
    """

    def __init__(
        self,
        kind: str,
        module: str,
        on_message: Callable[[Child, Message, list[int]], None],
        on_exit: Callable[[Child, int], None],
        *,
        slot: int = -1,
    ) -> None:
        self.kind = kind
        self.slot = slot
        self.is_ready = False
        self.is_draining = False
        self.status: int | None = None
        self._on_message = on_message
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        ours, theirs = Channel.pair()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, "--channel", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=(theirs.fileno(),),
                process_group=0,  # a Ctrl-C in the terminal reaches the supervisor only
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self.pid = self._process.pid
        self.started_at = time.monotonic()
        self.channel: Channel | None = ours
        self._pidfd = os.pidfd_open(self.pid)
        self._loop.add_reader(self._pidfd, self._exited)
        ours.attach_to(self._loop, self._received, self._channel_ended)

    @property
    def name(self) -> str:
        """What logs call it."""
        return f"{self.kind} {self.slot}" if self.kind == "worker" else self.kind

    def send(self, message: Message, fds: Sequence[int] = ()) -> bool:
        """Queue a message; False if the child is gone or does not read. The fds stay the caller's."""
        if self.channel is None:
            return False
        try:
            self.channel.send(message, fds)
        except OSError:
            return False  # its exit is on the way through the pidfd
        except LocalProtocolError as error:
            log.error("message lost child=%s pid=%d error=%s", self.name, self.pid, error)
            return False
        return True

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if it still runs."""
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL; `on_exit` follows."""
        self.signal(signal.SIGKILL)

    def hang_up(self) -> None:
        """Close our end of the channel: the child ends by itself within 2 s."""
        if self.channel is not None:
            self.channel.detach()
            self.channel.close()
            self.channel = None

    def _received(self, message: Message, fds: list[int]) -> None:
        self._on_message(self, message, fds)

    def _channel_ended(self) -> None:
        self.hang_up()

    def _exited(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.status = self._process.wait()
        if self.channel is not None:
            self._drain_channel()
        self.hang_up()
        self._on_exit(self, self.status)

    def _drain_channel(self) -> None:
        # The last words of a child ("failed", "drained") may be readable at the same moment as its exit.
        with contextlib.suppress(EOFError, OSError):
            while self.channel is not None and (item := self.channel.recv()) is not None:
                self._received(*item)

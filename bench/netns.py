"""Rate-limited hosts on one machine: network namespaces that a bridge joins. Needs root and iproute2.

Each host has an address of its own and two token buckets, one for what it sends and one for what it gets. The bridge
lies in a namespace of its own, too, so nothing of the machine's network is touched. There is no delay (the kernels we
run on lack netem): round trips are what the buckets' queues make them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

PREFIX = "fcb"
BURST = "256kb"  # of a bucket
QUEUE = "100ms"  # what a bucket holds back before it drops
GONE_S = 5.0


@dataclass(frozen=True)
class Rates:
    """What one host may send and get, Mbit/s on the wire."""

    up: float
    down: float


@dataclass(frozen=True)
class Host:
    """A namespace and its address."""

    namespace: str
    ip: str
    bridge: str = ""  # the namespace in which the bridge's end of its link is: device pN of host N

    def command(self, argv: Sequence[str]) -> list[str]:
        """Return the command that runs `argv` there; it becomes that process itself, it has no parent in between."""
        return ["ip", "netns", "exec", self.namespace, *argv]

    def sent_bytes(self) -> int:
        """Bytes that left through the host's bucket, headers and all."""
        return int(_run(*self.command(["cat", "/sys/class/net/eth0/statistics/tx_bytes"])))


def why_not() -> str | None:
    """Return why no hosts can be made here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"{', '.join(missing)}: not installed (iproute2)" if missing else None


def _run(*argv: str, check: bool = True) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: exit {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line.startswith(PREFIX)]


def _remove(names: Sequence[str]) -> None:
    """Kill what runs in the namespaces and delete them."""
    deadline = time.monotonic() + GONE_S
    while time.monotonic() < deadline:
        pids = [int(pid) for name in names for pid in _run("ip", "netns", "pids", name, check=False).split()]
        if not pids:
            break
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    for name in names:
        _run("ip", "netns", "del", name, check=False)


def _remove_stale() -> None:
    """Remove what a bench that was killed left behind: the names carry its pid."""
    stale = []
    for name in _namespaces():
        pid = name[len(PREFIX) :].partition("-")[0]
        if pid.isdigit() and not os.path.exists(f"/proc/{pid}"):
            stale.append(name)
    _remove(stale)


@contextlib.contextmanager
def rate_limited_hosts(rates: Sequence[Rates]) -> Iterator[list[Host]]:
    """Make a host per entry, 10.77.0.1 and up; take them down again however the block ends.

    Raises:
        RuntimeError: A command failed; the message holds it.
    """
    _remove_stale()
    tag = f"{PREFIX}{os.getpid()}"
    bridge = f"{tag}-br"
    hosts = [Host(f"{tag}-{i}", f"10.77.0.{i + 1}", bridge) for i in range(len(rates))]
    try:
        _run("ip", "netns", "add", bridge)
        _run("ip", "-n", bridge, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", bridge, "link", "set", "br0", "up")
        for number, (host, rate) in enumerate(zip(hosts, rates, strict=True)):
            port = f"p{number}"
            _run("ip", "netns", "add", host.namespace)
            _run("ip", "link", "add", port, "netns", bridge, "type", "veth", "peer", "eth0", "netns", host.namespace)
            _run("ip", "-n", bridge, "link", "set", port, "master", "br0", "up")
            _run("ip", "-n", host.namespace, "addr", "add", f"{host.ip}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _run("ip", "-n", host.namespace, "link", "set", device, "up")
            for namespace, device, mbit in ((host.namespace, "eth0", rate.up), (bridge, port, rate.down)):
                _run("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", "rate", f"{mbit:g}mbit",
                     "burst", BURST, "latency", QUEUE)  # fmt: skip
        yield hosts
    finally:
        _remove([host.namespace for host in hosts] + [bridge])

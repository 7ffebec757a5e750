"""How long until N machines have a file that one of them had, against the least time in which that is possible?

Real nodes in rate-limited network namespaces: one seed, N leechers that know the seed's address and find each other
through it. All are asked for the file at the same moment. Figure: when the last leecher that lives has the file in its
place, verified, counted from the moment in which all leechers have the manifest (their part files exist), over

    max(F / u_s, F / min d, N * F / (u_s + sum u))

with file size F, the seed's and the leechers' uplinks u_s, u and downlinks d as the buckets are set; that no byte of a
header fits into this bound is part of the figure. Starting the processes and finding the manifest are printed apart.
"Seed sent" is what the seed's workers wrote of bodies, over F.

    python -m bench.swarm [--case NAME]... [--turns 1] [--no-libtorrent] [--timeline] [--folder DIR] [--json FILE]
                          [--check]

libtorrent runs in the same namespaces, told of all peers, its clock begins when all sessions are told to start.
The folder is on /dev/shm by default: the network is what is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.netns import Host, Rates, rate_limited_hosts, why_not
from bench.processes import tree_cpu_s
from bench.swarm_timeline import watch
from fastcas.errors import FastCASError
from fastcas.node.control_client import AsyncControlClient, ControlClient

ROOT = Path(__file__).resolve().parents[1]
# An installed program has its byte code; without it 68 processes compile the same modules at once.
ENV = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {"PYTHONPATH": str(ROOT)}
PORT = 9000
LOOK_S = 0.005
LIMIT_FACTOR = 8.0  # a run that takes so many bounds is given up
READY_S = 60.0

LIBTORRENT = r"""
import sys, time
import libtorrent as lt
role, ip, torrent, folder, peers, limit_s = sys.argv[1:7]
session = lt.session({"listen_interfaces": f"{ip}:6881", "enable_dht": False, "enable_lsd": False, "enable_upnp": False,
    "enable_natpmp": False, "enable_incoming_utp": False, "enable_outgoing_utp": False, "unchoke_slots_limit": 20,
    "connection_speed": 200, "allow_multiple_connections_per_ip": True})
params = lt.add_torrent_params()
params.ti = lt.torrent_info(torrent)
params.save_path = folder
if role == "seed":
    params.flags |= lt.torrent_flags.seed_mode
    handle = session.add_torrent(params)
print("ready", flush=True)
sys.stdin.readline()
if role != "seed":
    handle = session.add_torrent(params)
for peer in peers.split(","):
    if peer != ip:
        handle.connect_peer((peer, 6881))
end = time.time() + float(limit_s)
while role != "seed" and not handle.status().is_seeding and time.time() < end:
    time.sleep(0.02)
print(time.time() if role == "seed" or handle.status().is_seeding else "late", flush=True)
sys.stdin.readline()
print(handle.status().total_payload_upload, flush=True)
"""


@dataclass(frozen=True)
class Case:
    """One swarm: rates in Mbit/s; `slow` leechers have the uplink `slow_up`; `n_killed` die half-way."""

    name: str
    n: int
    mib: int
    up: float
    down: float
    wanted: float
    stretch: float
    slow: int = 0
    slow_up: float = 0.0
    n_killed: int = 0

    @property
    def size(self) -> int:
        """Of the file, bytes."""
        return self.mib << 20

    def rates(self) -> list[Rates]:
        """The seed's rates and the leechers'."""
        ups = [self.slow_up] * self.slow + [self.up] * (self.n - self.slow)
        return [Rates(self.up, self.down), *(Rates(up, self.down) for up in ups)]

    def bound_s(self) -> float:
        """The least time in which all leechers can have the file, seconds."""
        seed, *leechers = self.rates()
        bits = 8.0 * self.size
        total_up = seed.up + sum(host.up for host in leechers)
        return max(bits / seed.up, bits / min(host.down for host in leechers), self.n * bits / total_up) / 1e6


CASES = (
    Case("8", 8, 64, 100, 200, 1.25, 1.10),
    Case("4", 4, 128, 100, 100, 1.15, 1.07),
    Case("16", 16, 64, 50, 100, 1.3, 1.12),
    Case("two-slow", 8, 64, 100, 200, 1.35, 1.15, slow=2, slow_up=10),
    Case("half-slow", 8, 64, 100, 200, 1.35, 1.15, slow=4, slow_up=20),
    Case("killed", 10, 64, 100, 200, 1.35, 1.15, n_killed=2),
)
SEED_WANTED = 1.2  # bytes of the seed over the file's, case "8"


@dataclass
class Run:
    """One measured run. Times in seconds; cpu_share is that of the whole machine."""

    ratio: float
    last_s: float
    first_s: float
    seed_sent: float
    cpu_share: float
    start_s: float = 0.0
    discovery_s: float = 0.0
    from_request: float = 0.0
    busy: int = 0
    cpu_s: float = 0.0
    ends: list[float] = field(default_factory=list)


def busy_s() -> tuple[float, float]:
    """Return the seconds that the machine's processors were busy, and all of their seconds."""
    values = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    tick = os.sysconf("SC_CLK_TCK")
    return (sum(values) - values[3] - values[4]) / tick, sum(values) / tick


@contextlib.contextmanager
def nodes(hosts: list[Host], work: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """A node on every host, each with its storage folder in `work`; all accept connections."""
    start = "import sys; from fastcas.cli.node_command import main; sys.argv[0] = 'fastcas-node'; main()"
    running: list[subprocess.Popen[bytes]] = []
    try:
        for number, host in enumerate(hosts):
            store = work / f"store{number}"
            store.mkdir(exist_ok=True)
            command = [sys.executable, "-c", start, "--workers", "1", "--host", host.ip, "--port", str(PORT)]
            command += ["--no-dht", "--storage-dir", str(store)]
            with (store / "log").open("wb") as log:
                running.append(
                    subprocess.Popen(
                        host.command(command), stdout=subprocess.PIPE, stderr=log, env=ENV, start_new_session=True
                    )
                )
        for number, process in enumerate(running):
            assert process.stdout is not None
            line = process.stdout.readline()
            if b" ready: " not in line:
                raise SystemExit(f"bench: node {number} said {line!r}, its log is in {work / f'store{number}' / 'log'}")
        yield running
    finally:
        for process in running:
            process.terminate()
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            if process.stdout is not None:
                process.stdout.close()


class Fetching:
    """The leechers of one run, watched from one event loop."""

    def __init__(self, case: Case, work: Path, link: str, processes: list[subprocess.Popen[bytes]]) -> None:
        self.case = case
        self.link = link
        self.seed_ip = "10.77.0.1"
        self.stores = [work / f"store{number}" for number in range(1, case.n + 1)]
        self.outs = [work / f"out{number}" for number in range(1, case.n + 1)]
        self.processes = processes
        self.victims = set(range(case.n - case.n_killed, case.n))
        self.done = [0] * case.n
        self.parts: dict[int, float] = {}
        self.ends: dict[int, float] = {}
        self.asked_at = 0.0
        self._failed: list[str] = []

    async def run(self) -> None:
        """Ask all for the file at once; return when every one that lives has it."""
        clients = [await AsyncControlClient.connect(store) for store in self.stores]
        self.asked_at = time.monotonic()
        calls = [asyncio.ensure_future(self._get(number, client)) for number, client in enumerate(clients)]
        limit = self.asked_at + LIMIT_FACTOR * self.case.bound_s() + 10
        living = set(range(self.case.n)) - self.victims
        try:
            while not living <= self.ends.keys():
                self._look()
                if self._failed:
                    raise SystemExit("bench: " + "; ".join(self._failed))
                if time.monotonic() > limit:
                    raise SystemExit(f"bench: only {len(self.ends)} of {self.case.n} leechers finished in time")
                await asyncio.sleep(LOOK_S)
        finally:
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            for client in clients:
                await client.close()

    def _look(self) -> None:
        now = time.monotonic()
        for number, out in enumerate(self.outs):
            if number not in self.parts and (out.with_name(out.name + ".fastcas-part").exists() or out.exists()):
                self.parts[number] = now
            if number not in self.ends and number in self.parts and out.exists():
                self.ends[number] = now

    async def _get(self, number: int, client: AsyncControlClient) -> None:
        def progress(values: dict[str, Any]) -> None:
            self.done[number] = values["done"]
            if number in self.victims and 2 * values["done"] >= self.case.size:
                self._kill(number)

        out = self.outs[number]
        args = {"ref": self.link, "out": os.fsencode(out), "folder": os.fsencode(out.parent),
                "peers": [f"{self.seed_ip}:{PORT}"], "timeout_s": 60.0}  # fmt: skip
        try:
            await client.call("get", args, progress)
        except FastCASError as error:
            if number not in self.victims:
                self._failed.append(f"leecher {number}: {error}")

    def _kill(self, number: int) -> None:
        pending = [self.processes[number + 1].pid]
        while pending:
            pid = pending.pop()
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    pending += [int(child) for child in (task / "children").read_text().split()]
                os.kill(pid, signal.SIGKILL)


def seed_counters(store: Path) -> dict[str, int]:
    """Return the seed's counters, all workers together."""
    with ControlClient(store) as client:
        workers = client.call("status", {})["workers"]
    total: dict[str, int] = {}
    for worker in workers:
        for name, value in worker["counters"].items():
            total[name] = total.get(name, 0) + value
    return total


def run_fastcas(case: Case, folder: Path, *, timeline: bool = False) -> Run:
    """One run of one case; `timeline` prints which links were in use when."""
    with contextlib.ExitStack() as stack:
        work = Path(tempfile.mkdtemp(prefix="fastcas-swarm-", dir=folder))
        stack.callback(shutil.rmtree, work, ignore_errors=True)
        source = work / "source"
        make_file(source, case.size)
        stored = subprocess.run(
            [sys.executable, "-m", "fastcas", "store", str(source), "--in-place", "--json",
             "--storage-dir", str(work / "store0")],
            check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=ENV,
        ).stdout  # fmt: skip
        link = json.loads(stored)["link"]
        hosts = stack.enter_context(rate_limited_hosts(case.rates()))
        begun = time.monotonic()
        processes = stack.enter_context(nodes(hosts, work))
        start_s = time.monotonic() - begun
        fetching = Fetching(case, work, link, processes)
        cpu = [tree_cpu_s(process.pid) for process in processes]
        machine = busy_s()
        with watch(hosts, case.rates()) if timeline else contextlib.nullcontext() as seen:
            asyncio.run(fetching.run())
        busy, total = (now - before for now, before in zip(busy_s(), machine, strict=True))
        living = [p for i, p in enumerate(processes) if i - 1 not in fetching.victims]
        cpu_s = sum(tree_cpu_s(p.pid) for p in living) - sum(
            c for i, c in enumerate(cpu) if i - 1 not in fetching.victims
        )
        counters = seed_counters(work / "store0")
        for number in set(fetching.ends) - fetching.victims:
            compare(source, fetching.outs[number])
    clock = max(fetching.parts.values())
    if seen is not None:
        print(seen.text(clock, {number + 1: end for number, end in fetching.ends.items()}), flush=True)
    ends = sorted(end - clock for number, end in fetching.ends.items() if number not in fetching.victims)
    return Run(
        ratio=ends[-1] / case.bound_s(), last_s=ends[-1], first_s=ends[0],
        seed_sent=counters["bytes_sent"] / case.size, cpu_share=busy / total, start_s=start_s,
        discovery_s=clock - fetching.asked_at,
        from_request=(ends[-1] + clock - fetching.asked_at) / case.bound_s(),
        busy=counters.get("peer_busy", 0), cpu_s=cpu_s, ends=[round(end, 2) for end in ends],
    )  # fmt: skip


def run_libtorrent(case: Case, folder: Path) -> Run:
    """The same case with libtorrent."""
    import libtorrent as lt

    with contextlib.ExitStack() as stack:
        work = Path(tempfile.mkdtemp(prefix="fastcas-swarm-", dir=folder))
        stack.callback(shutil.rmtree, work, ignore_errors=True)
        (work / "out0").mkdir()
        make_file(work / "out0" / "source", case.size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            files = lt.file_storage()
            lt.add_files(files, str(work / "out0" / "source"))
            creator = lt.create_torrent(files, 256 << 10)
            lt.set_piece_hashes(creator, str(work / "out0"))
            (work / "torrent").write_bytes(lt.bencode(creator.generate()))
        (work / "peer.py").write_text(LIBTORRENT)
        hosts = stack.enter_context(rate_limited_hosts(case.rates()))
        limit_s = LIMIT_FACTOR * case.bound_s()
        peers: list[subprocess.Popen[str]] = []

        def end() -> None:
            for peer in peers:
                peer.kill()
                peer.wait()

        stack.callback(end)
        begun = time.monotonic()
        for number, host in enumerate(hosts):
            (work / f"out{number}").mkdir(exist_ok=True)
            argv = [sys.executable, "-W", "ignore", str(work / "peer.py"), "leech" if number else "seed", host.ip,
                    str(work / "torrent"), str(work / f"out{number}"), ",".join(h.ip for h in hosts),
                    str(limit_s)]  # fmt: skip
            peers.append(
                subprocess.Popen(
                    host.command(argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
                )
            )
        for peer in peers:
            assert peer.stdout is not None
            peer.stdout.readline()
        start_s = time.monotonic() - begun
        clock, machine = time.time(), busy_s()
        victims = peers[len(peers) - case.n_killed :] if case.n_killed else []
        for peer in peers:
            tell(peer)
        if victims:
            time.sleep(case.bound_s() / 2)
            for victim in victims:
                victim.kill()
        living = [peer for peer in peers[1:] if peer not in victims]
        lines = [peer.stdout.readline().strip() for peer in living if peer.stdout is not None]
        busy, total = (now - before for now, before in zip(busy_s(), machine, strict=True))
        ends = sorted(limit_s if line in ("late", "") else float(line) - clock for line in lines)
        tell(peers[0])
        assert peers[0].stdout is not None
        peers[0].stdout.readline()
        sent = int(peers[0].stdout.readline())
    return Run(
        ratio=ends[-1] / case.bound_s(), last_s=ends[-1], first_s=ends[0], seed_sent=sent / case.size,
        cpu_share=busy / total, start_s=start_s, ends=[round(end, 2) for end in ends],
    )  # fmt: skip


def tell(peer: subprocess.Popen[str]) -> None:
    """Let a libtorrent process go on."""
    assert peer.stdin is not None
    peer.stdin.write("\n")
    peer.stdin.flush()


def make_file(path: Path, size: int) -> None:
    """Write `size` bytes that are not in any other run's file."""
    generator = random.Random()
    with path.open("wb") as file:
        for at in range(0, size, 1 << 20):
            file.write(generator.randbytes(min(1 << 20, size - at)))


def compare(source: Path, copy: Path) -> None:
    """End the bench if a copy is not the source, byte for byte."""
    with source.open("rb") as ours, copy.open("rb") as theirs:
        while block := ours.read(1 << 20):
            if theirs.read(1 << 20) != block:
                raise SystemExit(f"bench: {copy} is not {source}")
        if theirs.read(1):
            raise SystemExit(f"bench: {copy} is longer than {source}")


def show(case: Case, runs: list[Run], others: list[Run]) -> bool:
    """Print a case's figures; return whether they are what is wanted."""
    ratio = statistics.median(run.ratio for run in runs)
    sent = statistics.median(run.seed_sent for run in runs)
    good = ratio <= case.wanted and (case.name != "8" or sent <= SEED_WANTED)
    extra = ""
    if case.slow:
        extra = f", {case.slow} with {case.slow_up:g} up"
    elif case.n_killed:
        extra = f", {case.n_killed} killed half-way"
    print(f"{case.name}: {case.n} leechers, {case.mib} MiB, {case.up:g} up, {case.down:g} down{extra}; "
          f"bound {case.bound_s():.2f} s")  # fmt: skip
    for name, group in (("fastcas", runs), ("libtorrent", others)):
        for run in group:
            line = (
                f"  {name:10} last {run.last_s:6.2f} s  first {run.first_s:6.2f} s  ratio {run.ratio:.3f}  "
                f"seed sent {run.seed_sent:.2f} F  machine {100 * run.cpu_share:3.0f} % busy  start {run.start_s:.1f} s"
            )
            if name == "fastcas":
                line += (
                    f"  manifest {run.discovery_s:.2f} s  ratio from the request {run.from_request:.3f}  "
                    f"seed busy {run.busy}x  CPU {run.cpu_s:.1f} s"
                )
            print(line)
    there = statistics.median(run.ratio for run in others) if others else None
    print(f"  ratio {ratio:.3f} (wanted {case.wanted}, stretch {case.stretch})"
          + (f", libtorrent {there:.2f}" if there else "") + f", seed sent {sent:.2f} F"
          + (f" (wanted {SEED_WANTED})" if case.name == "8" else "") + ("" if good else "  MISSED"),
          flush=True)  # fmt: skip
    return good


def _stop(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    """Run the cases; 0, or 1 when --check is given and a figure is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES])
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--no-libtorrent", action="store_true")
    parser.add_argument("--timeline", action="store_true", help="print which links were in use when")
    shared = Path("/dev/shm")
    parser.add_argument("--folder", type=Path, default=shared if shared.is_dir() else Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true", help="exit 1 when a figure is missed")
    options = parser.parse_args()
    if reason := why_not():
        print(f"bench.swarm: {reason}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _stop)
    with_libtorrent = not options.no_libtorrent
    if with_libtorrent:
        try:
            import libtorrent  # noqa: F401
        except ImportError:
            print("libtorrent: not installed (pip install libtorrent), left out")
            with_libtorrent = False
    results: dict[str, Any] = {}
    good = True
    for case in CASES:
        if options.case and case.name not in options.case:
            continue
        runs, others = [], []
        for _ in range(options.turns):
            runs.append(run_fastcas(case, options.folder, timeline=options.timeline))
            if with_libtorrent:
                others.append(run_libtorrent(case, options.folder))
        good &= show(case, runs, others)
        results[case.name] = {"fastcas": [asdict(r) for r in runs], "libtorrent": [asdict(r) for r in others]}
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    return 0 if good or not options.check else 1


if __name__ == "__main__":
    sys.exit(main())

"""What does a good client keep of its speed beside 1,000 slow ones, and when are those closed?

slowhttptest (Debian) attacks one worker that has the default limits: first with heads that never end (slowloris), then
with readers of a few bytes every 3 s (slow read). A good client (bench/load_client.c) fetches 64 KiB chunks over 16
connections: alone, for as long as the crowd is there, and beside a process that only burns as much CPU as slowhttptest
did. Worker and good client fill two cores, so that the attacker's own CPU is most of what is lost there; the ratio to
the burner says what the worker makes of the crowd. Turns of 1 s, medians. Prints the rates, how many slow connections
the worker held at most, and how long after their start the last was gone.

    python -m bench.slow_clients [--connections 1000] [--attacks slowloris,slowread]
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.processes import tree_cpu_s
from bench.serve import Target, build_client, make_chunks, run_load
from fastcas.limits import HEADER_DEADLINE_S, MIN_RATE_WINDOW_S, STALL_S
from tests.support.serve_rig import Rig

SIZE = 64 << 10
BIG = 8 << 20
TURNS_ALONE = 7
GOOD_CONNECTIONS = 16  # one alone mostly measures how long an idle processor takes to wake
MARGIN_S = 5.0
# options of slowhttptest, and the deadline after which nobody of the crowd may be left
ATTACKS = {
    "slowloris": (["-H", "-i", "5", "-x", "24"], HEADER_DEADLINE_S),
    "slowread": (
        ["-X", "-w", "1", "-y", "16", "-n", "3", "-z", "8", "-k", "1"],
        max(MIN_RATE_WINDOW_S, STALL_S) + STALL_S,
    ),
}


# takes the given share of one CPU, in steps of 10 ms
BURNER = """
import sys, time
share = float(sys.argv[1])
while True:
    begin, used = time.monotonic(), time.process_time()
    while time.process_time() - used < 0.01 * share:
        pass
    time.sleep(max(0.0, begin + 0.01 - time.monotonic()))
"""


class Attack:
    """One run: the rig, the good client and the crowd."""

    def __init__(self, folder: Path, n_connections: int) -> None:
        self._n = n_connections
        self._client = build_client(folder)
        (folder / "rig").mkdir()
        self.rig = Rig(folder / "rig")
        make_chunks(self.rig.store, folder, folder / "paths", SIZE, 256)
        make_chunks(self.rig.store, folder, folder / "big", BIG, 1)
        self.rig.publish()
        worker = self.rig.worker
        self._target = Target("fastcas", worker.port, worker.process.pid, folder / "paths")
        self._url = f"http://127.0.0.1:{worker.port}{(folder / 'big').read_text().strip()}"
        self._options = argparse.Namespace(connections=GOOD_CONNECTIONS, discard=False)

    def rate(self) -> float:
        """Requests per second of the good client over one turn."""
        figures = run_load(self._client, self._target, self._options, 1.0, SIZE)
        return float(figures["requests"] / figures["seconds"])

    def run(self, name: str) -> None:
        """Measure alone, beside the crowd until it is gone, and beside the burner; print one row."""
        options, deadline_s = ATTACKS[name]
        alone = [self.rate() for _ in range(TURNS_ALONE)]
        length_s = deadline_s + MARGIN_S
        command = ["slowhttptest", *options, "-c", str(self._n), "-r", str(self._n), "-l", str(int(length_s)),
                   "-u", self._url, "-v", "0"]  # fmt: skip
        begin = time.monotonic()
        crowd = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        beside: list[float] = []
        most, gone_s = 0, None
        try:
            while time.monotonic() - begin < length_s and gone_s is None:
                beside.append(self.rate())
                active = self.rig.worker.count("active")
                most = max(most, active)
                if most > self._n // 2 and active <= 1:
                    gone_s = time.monotonic() - begin
            crowd_cpu = tree_cpu_s(crowd.pid) / (time.monotonic() - begin)
        finally:
            crowd.terminate()
            crowd.wait(10)
        burner = subprocess.Popen([sys.executable, "-c", BURNER, str(crowd_cpu)])
        try:
            control = [self.rate() for _ in range(TURNS_ALONE)]
        finally:
            burner.kill()
            burner.wait()
        free, burned, during = (statistics.median(rates) for rates in (alone, control, beside))
        gone = "not all gone" if gone_s is None else f"all gone after {gone_s:.0f} s"
        print(
            f"{name:<10} good client alone {free:,.0f}/s, beside the crowd {during:,.0f}/s ({during / free:.0%}), "
            f"beside a burner of the attacker's {crowd_cpu:.2f} CPUs {burned:,.0f}/s: "
            f"keeps {during / burned:.0%} (target 90%)\n"
            f"{'':<10} {most:,} held, {gone} (deadline {deadline_s:.0f} s)"
        )


def main() -> None:
    """Parse the command line, attack, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", default=1000, type=int)
    parser.add_argument("--attacks", default=",".join(ATTACKS), type=lambda text: text.split(","))
    options = parser.parse_args()
    if shutil.which("slowhttptest") is None:
        raise SystemExit("bench: slowhttptest is not installed")
    for name in options.attacks:
        if name not in ATTACKS:
            raise SystemExit(f"bench: attack {name!r}: expected one of {', '.join(ATTACKS)}")
        with tempfile.TemporaryDirectory(prefix="fastcas-bench-") as folder:
            attack = Attack(Path(folder), options.connections)
            try:
                attack.run(name)
            finally:
                attack.rig.close()


if __name__ == "__main__":
    main()

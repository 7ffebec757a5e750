"""A node whose workers are killed, replaced, drained and crash at start while clients download: no download fails.

`make kill-workers` runs the kills 500 times under 200 connections (FASTCAS_WORKER_KILLS, FASTCAS_KILL_CLIENTS).
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.nodes import Node, free_port, run_fastcas, start_node
from tests.support.serve_faults import use_limits
from tests.support.waiting import child_of, is_running, wait_until

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("FASTCAS_WORKER_KILLS", "20"))
CLIENTS = int(os.environ.get("FASTCAS_KILL_CLIENTS", "50"))
SIZE = 1 << 20
CLIENT = Path(__file__).resolve().parents[1] / "support/download_clients.py"


class ServingNode:
    """A node of two workers with one file, and its admin port."""

    def __init__(self, node: Node, admin_port: int, folder: Path) -> None:
        self.node = node
        self._admin_port = admin_port
        content = random.Random(5).randbytes(SIZE)
        (folder / "file.bin").write_bytes(content)
        done = run_fastcas("store", str(folder / "file.bin"), "--storage-dir", str(node.storage))
        assert done.returncode == 0, done.stderr
        self.digest = hashlib.sha256(content).hexdigest()

    def workers(self) -> dict[int, dict[str, Any]]:
        """Return the workers that are ready and not draining, by pid."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self._admin_port, timeout=20)) as connection:
            connection.request("GET", "/status")
            status = json.loads(connection.getresponse().read())
        return {w["pid"]: w for w in status["workers"] if w["ready"] and not w["draining"] and is_running(w["pid"])}

    def wait_ready(self, but: set[int], budget_s: float = 30.0) -> dict[int, dict[str, Any]]:
        """Wait for two ready workers, none of them in `but`."""

        def look() -> dict[int, dict[str, Any]] | None:
            ready = self.workers()
            return ready if len(ready) == 2 and not but & set(ready) else None

        return wait_until(look, "two workers ready", budget_s)  # type: ignore[return-value]

    @contextlib.contextmanager
    def downloads(self, count: int) -> Iterator[dict[str, Any]]:
        """Let clients download meanwhile; the dict gets their figures at the end."""
        process = subprocess.Popen(
            [sys.executable, CLIENT, self.node.host, str(self.node.port), f"/files/{self.digest}", self.digest,
             str(count)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        figures: dict[str, Any] = {}
        try:
            before = self.bytes_sent()
            wait_until(lambda: self.bytes_sent() > before + count * SIZE, "all clients download")
            yield figures
            output, _ = process.communicate(timeout=120)
            figures.update(json.loads(output))
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()

    def bytes_sent(self) -> int:
        """Return what all workers sent."""
        return sum(worker["counters"]["bytes_sent"] for worker in self.workers().values())


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[ServingNode]:
    admin_port = free_port()
    with start_node(tmp_path / "storage", "--admin-port", str(admin_port), workers=2) as node:
        made = ServingNode(node, admin_port, tmp_path)
        made.wait_ready(set())
        yield made


def test_worker_kills_fail_no_download(serving: ServingNode) -> None:
    rng = random.Random(7)
    delays = []
    with serving.downloads(CLIENTS) as figures:
        for _ in range(KILLS):
            victim = rng.choice(sorted(serving.wait_ready(set())))
            os.kill(victim, signal.SIGKILL)
            begin = time.monotonic()
            serving.wait_ready({victim})
            delays.append(time.monotonic() - begin)
    delays.sort()
    print(
        f"{KILLS} kills under {CLIENTS} connections: {figures['downloads']} downloads of {SIZE} B, "
        f"{len(figures['failed'])} failed, {figures['retries']} retries; replaced after median "
        f"{delays[len(delays) // 2]:.2f} s, longest {delays[-1]:.2f} s"
    )
    assert figures["failed"] == []
    assert figures["downloads"] > 0


def test_hup_again_and_again_fails_no_request(serving: ServingNode) -> None:
    rounds = 20 if KILLS > 20 else 3
    with serving.downloads(CLIENTS) as figures:
        for _ in range(rounds - 1):
            before = set(serving.wait_ready(set()))
            serving.node.process.send_signal(signal.SIGHUP)
            serving.wait_ready(before)
        # one that comes while the workers are being replaced counts, too
        before = set(serving.wait_ready(set()))
        serving.node.process.send_signal(signal.SIGHUP)
        first = wait_until(lambda: set(child_of(serving.node.tree(), "fastcas.serve")) - before, "a replacement")
        serving.node.process.send_signal(signal.SIGHUP)
        serving.wait_ready(before | first)
    assert figures["failed"] == []
    # a drain finishes what was asked for: nothing is cut, so nothing is asked for again
    assert figures["retries"] == 0
    print(f"{rounds + 1} HUPs: {figures['downloads']} downloads, 0 failed, {figures['retries']} retries")


def test_term_finishes_what_was_asked_for(serving: ServingNode) -> None:
    answers: list[tuple[int, str]] = []

    def client() -> None:
        connection = http.client.HTTPConnection(serving.node.host, serving.node.port, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", f"/files/{serving.digest}")
            response = connection.getresponse()
            head = response.read(1000)  # the drain begins inside the answer
            started.release()
            go_on.wait(60)
            answers.append((response.status, hashlib.sha256(head + response.read()).hexdigest()))

    started, go_on = threading.Semaphore(0), threading.Event()
    threads = [threading.Thread(target=client) for _ in range(20)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert started.acquire(timeout=60)
    pids = serving.node.tree()
    serving.node.process.send_signal(signal.SIGTERM)
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert answers == [(200, serving.digest)] * len(threads)
    assert serving.node.stop() == 0
    wait_until(lambda: not any(map(is_running, pids)), "all processes gone")


def test_killed_supervisor_takes_its_children_along_under_load(serving: ServingNode) -> None:
    pids = serving.node.tree()
    with serving.downloads(10):
        os.kill(serving.node.process.pid, signal.SIGKILL)
        begin = time.monotonic()
        wait_until(lambda: not any(map(is_running, pids)), "no orphan", budget_s=10)
        print(f"children gone {time.monotonic() - begin:.2f} s after their supervisor")
    serving.node.process.wait()
    assert not any(map(is_running, pids))


def test_worker_that_crashes_at_start_backs_off_and_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    admin_port = free_port()
    broken = tmp_path / "broken"
    use_limits(monkeypatch, tmp_path, BACKOFF_MAX_S=0.2)
    hook = tmp_path / "sitecustomize.py"
    hook.write_text(
        f"{hook.read_text()}\nimport os, sys\n"
        f"if 'fastcas.serve' in sys.orig_argv and os.path.exists({str(broken)!r}):\n    os._exit(3)\n"
    )
    with start_node(tmp_path / "storage", "--admin-port", str(admin_port), workers=2) as node:
        made = ServingNode(node, admin_port, tmp_path)
        kept = set(made.wait_ready(set()))
        broken.touch()
        victim = sorted(kept)[0]
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: "worker does not start" in node.log_path.read_text(), "reported", budget_s=60)
        assert set(made.workers()) == kept - {victim}  # the others serve on
        starts = node.log_path.read_text().count("started child=worker")
        broken.unlink()
        made.wait_ready({victim})
        assert child_of(node.tree(), "fastcas.serve")
        assert 10 <= starts <= 20

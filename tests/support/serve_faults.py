"""Bad circumstances for a real worker: failing and short system calls, short deadlines, crowds of slow clients."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.serve_rig import BUDGET_S, ROOT, wait_until

SHORT_IO_SOURCE = Path(__file__).with_name("short_io.c")
SLOW_CLIENTS = Path(__file__).with_name("slow_clients.py")


def use_limits(monkeypatch: pytest.MonkeyPatch, folder: Path, **limits: float) -> None:
    """Let processes started from here on have other values in `fastcas.limits`."""
    lines = "".join(f"limits.{name} = {value!r}\n" for name, value in limits.items())
    (folder / "sitecustomize.py").write_text(f"from fastcas import limits\n{lines}")
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{ROOT}")


def use_short_io(monkeypatch: pytest.MonkeyPatch, folder: Path, *, short: int, eintr: int, seed: int) -> None:
    """Let processes started from here on transfer little: `short` and `eintr` of 1,000 calls."""
    library = folder / "short_io.so"
    flags = ["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, "-o", library, SHORT_IO_SOURCE, "-ldl"], check=True)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("SHORT_IO", f"{short} {eintr} {seed}")


@contextlib.contextmanager
def injected(pid: int, log: Path, *faults: str) -> Iterator[None]:
    """Let system calls of a running process fail: strace's `inject=` expressions, until the context ends."""
    calls = ",".join(fault.partition(":")[0] for fault in faults)
    command = ["strace", "-f", "-qq", "-o", str(log), "-e", f"trace={calls}"]
    command += [part for fault in faults for part in ("-e", f"inject={fault}")]
    tracer = subprocess.Popen([*command, "-p", str(pid)])

    def is_attached() -> bool:
        assert tracer.poll() is None, "strace did not attach"
        return f"TracerPid:\t{tracer.pid}\n" in Path(f"/proc/{pid}/status").read_text()

    try:
        wait_until(is_attached, "strace attached")
        yield
    finally:
        tracer.terminate()
        tracer.wait(BUDGET_S)


@contextlib.contextmanager
def slow_clients(kind: str, port: int, target: str, count: int) -> Iterator[subprocess.Popen[str]]:
    """Start `count` slow clients of a kind ("head", "stall", "trickle"); its stdout ends when all are closed."""
    process = subprocess.Popen(
        [sys.executable, SLOW_CLIENTS, kind, str(port), target, str(count)], stdout=subprocess.PIPE, text=True,
        env={name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LD_PRELOAD")},
    )  # fmt: skip
    assert process.stdout is not None
    try:
        yield process
    finally:
        process.kill()
        process.wait(BUDGET_S)
        process.stdout.close()


def cpu_s(pid: int) -> float:
    """Return utime + stime of one process, seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

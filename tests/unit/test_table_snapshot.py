"""Sealed snapshots of keys and swarms, and what importing fastcas.table costs."""

from __future__ import annotations

import mmap
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import msgpack
import pytest

from fastcas.errors import LocalProtocolError, UsageError
from fastcas.table import memfd, read_keys, read_swarm, write_keys, write_swarm
from tests.support.table_child import ROOT

SWARM: dict[bytes, Any] = {
    b"f" * 32: {"peers": [("ab" * 20, "10.0.0.1", 9000), ("cd" * 20, "::1", 65535)], "manifests": [b"m" * 32]},
    b"g" * 32: {"peers": [], "manifests": []},
}


def sealed(content: bytes) -> int:
    fd = memfd.create("test")
    os.write(fd, content)
    memfd.seal(fd, writable_by_others=False)
    return fd


def test_keys_come_back_sorted_without_repeats() -> None:
    rng = random.Random(1)
    keys = [rng.randbytes(32) for _ in range(500)]
    fd = write_keys([b"".join(keys[:300]), bytearray(), b"".join(keys[200:])])
    view = read_keys(fd)
    os.close(fd)
    assert bytes(view) == b"".join(sorted(keys))
    assert view.readonly
    empty = write_keys([])
    assert bytes(read_keys(empty)) == b""
    os.close(empty)
    with pytest.raises(UsageError, match="multiple of 32"):
        write_keys([bytes(33)])


def test_swarm_comes_back_equal() -> None:
    for swarm in (SWARM, {}):
        fd = write_swarm(swarm)
        assert read_swarm(fd) == swarm
        os.close(fd)
    listed = {b"f" * 32: {"peers": [["n", "10.0.0.1", 9000]], "manifests": [b"m" * 32]}}
    fd = write_swarm(listed)  # type: ignore[arg-type]
    assert read_swarm(fd)[b"f" * 32]["peers"] == [("n", "10.0.0.1", 9000)]
    os.close(fd)


@pytest.mark.parametrize("write", [lambda: write_keys([bytes(32)]), lambda: write_swarm(SWARM)])
def test_snapshots_are_sealed(write: Callable[[], int]) -> None:
    fd = write()
    for refused in (
        lambda: os.ftruncate(fd, 0),
        lambda: os.ftruncate(fd, 1 << 20),
        lambda: os.pwrite(fd, b"x", 0),
        lambda: mmap.mmap(fd, 0),
    ):
        with pytest.raises(PermissionError):
            refused()
    os.close(fd)


@pytest.mark.parametrize(
    "content", [b"", b"1234567", struct.pack("<Q", 1), struct.pack("<Q", 2) + bytes(32), b"\xff" * 40, bytes(40)]
)
def test_malformed_keys_are_refused(content: bytes) -> None:
    fd = sealed(content)
    with pytest.raises(LocalProtocolError):
        read_keys(fd)
    os.close(fd)


def with_length(body: bytes) -> bytes:
    return struct.pack("<Q", len(body)) + body


@pytest.mark.parametrize(
    "content",
    [
        b"",
        struct.pack("<Q", 1 << 63),
        struct.pack("<Q", 5) + msgpack.packb(SWARM),
        with_length(b"\xc1"),
        with_length(msgpack.packb([1])),
        with_length(msgpack.packb({b"short": {"peers": [], "manifests": []}})),
        with_length(msgpack.packb({b"f" * 32: 5})),
        with_length(msgpack.packb({b"f" * 32: {"peers": []}})),
        with_length(msgpack.packb({b"f" * 32: {"peers": [["n", "ip"]], "manifests": []}})),
        with_length(msgpack.packb({b"f" * 32: {"peers": [["n", "ip", 0]], "manifests": []}})),
        with_length(msgpack.packb({b"f" * 32: {"peers": [["n", "ip", True]], "manifests": []}})),
        with_length(msgpack.packb({b"f" * 32: {"peers": [[1, "ip", 9]], "manifests": []}})),
        with_length(msgpack.packb({b"f" * 32: {"peers": [], "manifests": [b"x"]}})),
    ],
)
def test_malformed_swarms_are_refused(content: bytes) -> None:
    fd = sealed(content)
    with pytest.raises(LocalProtocolError):
        read_swarm(fd)
    os.close(fd)


def test_malformed_swarms_are_not_written() -> None:
    for bad in ({b"x": {"peers": [], "manifests": []}}, {b"f" * 32: {"peers": [(None, "ip", 1)], "manifests": []}}):
        with pytest.raises(UsageError):
            write_swarm(bad)  # type: ignore[arg-type]


def test_what_could_still_shrink_is_refused() -> None:
    fd = memfd.create("unsealed", 8)
    for read in (read_keys, read_swarm):
        with pytest.raises(LocalProtocolError):
            read(fd)
    os.close(fd)
    read_end, write_end = os.pipe()
    for read in (read_keys, read_swarm):
        with pytest.raises(LocalProtocolError, match="memfd"):
            read(read_end)
    os.close(read_end)
    os.close(write_end)


def test_importing_the_package_stays_light() -> None:
    code = (
        "import sys, fastcas.table as t; t.TableOwner, t.Channel, t.Ring, t.write_keys\n"
        "heavy = {'numpy', 'cryptography', 'uvloop', 'kademlia', 'sqlite3'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert set(t.__all__) == {n for n in t.__all__ if getattr(t, n)}\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT, timeout=60)

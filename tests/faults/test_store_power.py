"""Power cuts: an ext4 on a loop device is shut down without flushing its journal, again and again, under a writer.

`FASTCAS_POWER_CUTS` says how often (`make power-cuts`: 60). What the store acknowledged before a cut is there and right
after it; nothing else needs a hand.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastcas.store import Store
from tests.support.store_rig import Mirror, followed, temps

ROOT = Path(__file__).parents[2]
CUTS = int(os.environ.get("FASTCAS_POWER_CUTS", "3"))
SEED = int(os.environ.get("FASTCAS_TEST_SEED", "1"))
IMAGE_B = 96 << 20
EXT4_IOC_SHUTDOWN = 0x8004587D
NOLOGFLUSH = 2
BIN = {**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}


def run(*words: object) -> None:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, env=BIN, check=False)
    assert done.returncode == 0, (words, done.stderr)


@contextlib.contextmanager
def mounted(image: Path, mount: Path) -> Iterator[None]:
    """Mount the image; taken away whatever happened to it."""
    run("mount", "-o", "loop", image, mount)
    try:
        yield
    finally:
        run("umount", mount)


def cut(mount: Path) -> None:
    """End the file system as a power cut does: what is not on the disk is lost, the journal's buffer, too."""
    fd = os.open(mount, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, EXT4_IOC_SHUTDOWN, struct.pack("I", NOLOGFLUSH))
    finally:
        os.close(fd)


def acknowledged(child: subprocess.Popen[bytes], mount: Path, chooser: random.Random) -> list[str]:
    """Let the child work for a random number of acknowledgements and a moment, cut, and return all of them."""
    assert child.stdout is not None
    wanted, data = chooser.randint(1, 25), b""
    while data.count(b"\n") < wanted and child.poll() is None:
        data += os.read(child.stdout.fileno(), 65536)
    select.select([], [], [], chooser.random() * 0.02)
    cut(mount)
    # The child meets errors from now on; what it says before its end was said by a call that came back without one.
    data += child.stdout.read()
    child.wait(30)
    return [line for line in data.decode().splitlines() if line]


def check_power_cuts(tmp_path: Path) -> None:
    image, mount = tmp_path / "image", tmp_path / "mount"
    mount.mkdir()
    with open(image, "wb") as file:
        file.truncate(IMAGE_B)
    run("mkfs.ext4", "-q", image)
    chooser = random.Random(SEED)
    kept: set[bytes] = set()
    total = 0
    began = time.monotonic()
    for number in range(CUTS):
        with mounted(image, mount):
            child = subprocess.Popen(
                [sys.executable, "-m", "tests.support.store_power_child", str(mount / "st"), str(SEED * 1000 + number)],
                cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            with child:
                lines = acknowledged(child, mount, chooser)
        for line in lines:
            word, value = line.split()
            if word == "hash":
                kept.add(bytes.fromhex(value))
                total += 1
            else:
                kept.discard(bytes.fromhex(value))
        with mounted(image, mount), Store.open(mount / "st", create=True) as store:
            assert temps(mount / "st") == []
            mirror: Mirror = followed(store)
            mirror.check()
            missing = kept - mirror.files.keys()
            assert not missing, f"cut {number}, seed {SEED}: {len(missing)} acknowledged files are gone"
            assert store.verify().is_clean
            for file_hash in list(kept):  # room for the next round
                if len(kept) > 30:
                    store.remove(file_hash)
                    kept.discard(file_hash)
            store.gc(lambda: None)
            mirror.check()
    assert total >= CUTS
    print(f"{CUTS} power cuts, {total} acknowledged files, 0 missing, {time.monotonic() - began:.0f} s")


if os.geteuid() == 0:  # mounting needs root

    @pytest.mark.slow
    def test_nothing_acknowledged_is_lost_in_a_power_cut(tmp_path: Path) -> None:
        check_power_cuts(tmp_path)

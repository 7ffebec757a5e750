"""Cuts the power of an ext4 on a loop device under a writing store, again and again, and checks the store after each.

usage: unshare -m python -m tests.support.store_power FOLDER CUTS SEED
In a mount namespace of its own: a namespace that somebody copies from ours would keep the dead file system alive.
Prints how many cuts there were and how many acknowledged files.
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

from fastcas.store import Store
from tests.support.store_rig import Mirror, followed, temps

ROOT = Path(__file__).parents[2]
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


def acknowledged(child: subprocess.Popen[bytes], mount: Path, chooser: random.Random) -> tuple[list[str], list[str]]:
    """Let the child work for a random number of acknowledgements and a moment, and cut.

    Returns:
        The lines that came before the cut, and those after it. The latter promise nothing: nobody hears of them when
        the power is gone, and an fsync that meets the end of its journal may still return 0.
    """
    assert child.stdout is not None
    pipe = child.stdout.fileno()
    wanted, before = chooser.randint(1, 25), b""
    while before.count(b"\n") < wanted and child.poll() is None:
        before += os.read(pipe, 65536)
    time.sleep(chooser.random() * 0.02)  # anywhere within the next call
    while select.select([pipe], [], [], 0)[0] and (more := os.read(pipe, 65536)):
        before += more
    cut(mount)
    after = child.stdout.read()
    child.wait(30)
    return before.decode().splitlines(), after.decode().splitlines()


def power_cuts(folder: Path, cuts: int, seed: int) -> int:
    """Return how many files were acknowledged; fails where one is missing."""
    image, mount = folder / "image", folder / "mount"
    mount.mkdir()
    with open(image, "wb") as file:
        file.truncate(IMAGE_B)
    run("mkfs.ext4", "-q", image)
    chooser = random.Random(seed)
    kept: set[bytes] = set()
    total = 0
    for number in range(cuts):
        with mounted(image, mount):
            child = subprocess.Popen(
                [sys.executable, "-m", "tests.support.store_power_child", str(mount / "st"), str(seed * 1000 + number)],
                cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            with child:
                before, after = acknowledged(child, mount, chooser)
        for line in before + after:
            word, value = line.split()
            if word == "gone":
                kept.discard(bytes.fromhex(value))
            elif line in before:
                kept.add(bytes.fromhex(value))
                total += 1
        with mounted(image, mount), Store.open(mount / "st", create=True) as store:
            assert temps(mount / "st") == []
            mirror: Mirror = followed(store)
            mirror.check()
            missing = kept - mirror.files.keys()
            assert not missing, f"cut {number}, seed {seed}: {len(missing)} acknowledged files are gone"
            assert store.verify().is_clean
            for file_hash in list(kept):  # room for the next round
                if len(kept) > 30:
                    store.remove(file_hash)
                    kept.discard(file_hash)
            store.gc(lambda: None)
            mirror.check()
    return total


if __name__ == "__main__":
    print(power_cuts(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))

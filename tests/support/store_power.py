"""Cuts the power of an ext4 on a loop device under a writing store, again and again, and checks the store after each.

usage: unshare -m python -m tests.support.store_power FOLDER CUTS SEED [bare]
In a mount namespace of its own: a namespace that somebody copies from ours would keep the dead file system alive.
`bare`: plain files take the store's place (store_power_bare.py), to see what ext4 itself keeps.

An acknowledgement counts if its stamp, taken after the call returned, is earlier than the moment before the ioctl that
cuts. Those from within the ioctl promise nothing: aborting the journal ends the running transaction unwritten, and an
fsync that looks for its transaction only after that finds none to wait for and returns 0 (jbd2_complete_transaction).
A real power cut ends the caller, too. Prints both counts.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fastcas.store import Store
from tests.support.store_power_bare import surviving
from tests.support.store_rig import Mirror, followed, temps

ROOT = Path(__file__).parents[2]
IMAGE_B = 96 << 20
EXT4_IOC_SHUTDOWN = 0x8004587D
NOLOGFLUSH = 2  # the power cut: 0 freezes the file system first, 1 flushes the journal
KEPT_MAX = 30  # files that stay from round to round
BIN = {**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}


@dataclass
class Count:
    """Acknowledgements of all rounds."""

    before: int = 0  # the cut; each is checked
    within: int = 0  # the cut or after it
    within_missing: int = 0

    def __str__(self) -> str:
        return f"{self.before} {self.within} {self.within_missing}"


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


def cut(mount: Path) -> int:
    """End the file system as a power cut does: what is not on the disk is lost, the journal's buffer, too.

    Returns:
        CLOCK_MONOTONIC just before, in nanoseconds.
    """
    fd = os.open(mount, os.O_RDONLY)
    try:
        flags = struct.pack("I", NOLOGFLUSH)
        at = time.monotonic_ns()
        fcntl.ioctl(fd, EXT4_IOC_SHUTDOWN, flags)
    finally:
        os.close(fd)
    return at


def acknowledged(child: subprocess.Popen[bytes], mount: Path, chooser: random.Random) -> tuple[list[list[str]], int]:
    """Let the child work for a random number of acknowledgements and a moment, and cut; returns its lines and when."""
    assert child.stdout is not None
    pipe = child.stdout.fileno()
    wanted, said = chooser.randint(1, 25), b""
    while said.count(b"\n") < wanted and child.poll() is None:
        said += os.read(pipe, 65536)
    time.sleep(chooser.random() * 0.02)  # anywhere within the next call
    at = cut(mount)
    said += child.stdout.read()
    child.wait(30)
    return [line.split() for line in said.decode().splitlines()], at


def check_store(root: Path, kept: set[str], number: int) -> set[str]:
    """Look at the store after a cut, and make room for the next; returns what it has."""
    with Store.open(root, create=True) as store:
        assert temps(root) == []
        mirror: Mirror = followed(store)
        mirror.check()
        here = {key.hex() for key in mirror.files}
        assert store.verify().is_clean
        for text in list(kept)[KEPT_MAX:]:
            store.remove(bytes.fromhex(text))
            kept.discard(text)
        store.gc(lambda: None)
        mirror.check()
    return here


def check_bare(root: Path, kept: set[str], number: int) -> set[str]:
    here = surviving(root)
    kept.clear()
    return here


def power_cuts(folder: Path, cuts: int, seed: int, *, bare: bool = False) -> Count:
    """Cut and check; fails where something is missing that was acknowledged before the cut."""
    program = "tests.support.store_power_bare" if bare else "tests.support.store_power_child"
    check: Callable[[Path, set[str], int], set[str]] = check_bare if bare else check_store
    image, mount = folder / "image", folder / "mount"
    mount.mkdir()
    with open(image, "wb") as file:
        file.truncate(IMAGE_B)
    run("mkfs.ext4", "-q", image)
    chooser = random.Random(seed)
    kept: set[str] = set()
    count = Count()
    for number in range(cuts):
        with mounted(image, mount):
            child = subprocess.Popen(
                [sys.executable, "-m", program, str(mount / "st"), str(seed * 1000 + number)],
                cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            with child:
                lines, at = acknowledged(child, mount, chooser)
        gone = {value for word, value, _ in lines if word == "gone"}
        before = {value for word, value, stamp in lines if word == "hash" and int(stamp) < at}
        within = {value for word, value, _ in lines if word == "hash"} - before
        count.before += len(before)
        count.within += len(within)
        kept = (kept | before) - gone
        with mounted(image, mount):
            expected = set(kept)
            here = check(mount / "st", kept, number)
        missing = expected - here
        assert not missing, f"cut {number}, seed {seed}: {len(missing)} acknowledged files are gone"
        count.within_missing += len(within - gone - here)
    return count


if __name__ == "__main__":
    print(power_cuts(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), bare=sys.argv[4:] == ["bare"]))

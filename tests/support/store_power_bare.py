"""Makes plain files durable without end on a mount that is about to lose its power: what ext4 itself keeps.

usage: python -m tests.support.store_power_bare FOLDER SEED
Each line on stdout is an acknowledgement: "hash NAME STAMP" (CLOCK_MONOTONIC, ns), after the file's fsync, its
folder's, and the fdatasync of a log to which its name was appended have returned 0, as for a blob and the catalog.
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

__all__ = ["surviving"]

LOG = "log"
SIZES = (3, 5_000, 70_000)
KEPT_B = 30 << 20  # the folder is emptied beyond that


def content(name: str, size: int) -> bytes:
    return random.Random(name).randbytes(size)


def surviving(folder: Path) -> set[str]:
    """Return the names of the whole files that the log has, and empty the folder."""
    here = set()
    log = folder / LOG
    logged = set(log.read_text().split()) if log.exists() else set()
    for path in folder.iterdir() if folder.is_dir() else ():
        data = path.read_bytes()
        if path.name in logged and len(data) in SIZES and data == content(path.name, len(data)):
            here.add(path.name)
        path.unlink()
    return here


def main() -> None:
    """Work until the disk is gone."""
    folder, seed = Path(sys.argv[1]), sys.argv[2]
    folder.mkdir(exist_ok=True)
    chooser = random.Random(seed)
    parent = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600, dir_fd=parent)
    os.fsync(parent)
    written = 0
    while written < KEPT_B:
        name = f"{chooser.getrandbits(64):016x}"
        data = content(name, chooser.choice(SIZES))
        written += len(data)
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=parent)
        assert os.pwrite(fd, data, 0) == len(data)
        os.fsync(fd)
        os.close(fd)
        os.fsync(parent)
        assert os.write(log, name.encode() + b"\n" * 1000) == len(name) + 1000
        os.fdatasync(log)
        os.write(1, b"hash %s %d\n" % (name.encode(), time.monotonic_ns()))


if __name__ == "__main__":
    main()

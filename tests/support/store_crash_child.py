"""Runs one store operation many times, each in a forked child that a fault hits one system call later.

Started under strace, which counts each kind of call of each process and strikes at the STRIKE-th of a kind. A child
for (kind, n) first makes STRIKE - n such calls on a descriptor that is not open, so that the fault meets the n-th
of the operation itself. The parent makes no such call. A kind is over after PATIENCE children in a row that came
through. Prints one line of JSON: [kind, n, exit status] of each child, in order.

usage: python -m tests.support.store_crash_child FOLDER OPERATION PATIENCE FIRST PASSED KIND…
FOLDER/1, FOLDER/2, … each hold a copy of one store for one child, and there are as many children at most;
FOLDER/input is what gets stored. FIRST, PASSED: of the first kind, the n to go on with, and how many came through in a
row before.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from fastcas.errors import FastCASError, StoreError
from fastcas.store import Store

STRIKE = int(os.environ.get("FASTCAS_STRIKE", "200"))
FOREIGN = 99  # exit status for an exception that is not ours
UNWILLING = 98  # the second try did not work
UNNAMED = 97  # the error does not name the store's folder
CLOSED = 1_000_000  # no process has this descriptor


def store_file(store: Store, given: Path) -> None:
    store.store_file(given / "new", chunk_size=16384, parity=(4, 2))


def store_tree(store: Store, given: Path) -> None:
    store.store_tree(given / "tree", chunk_size=16384)


def in_place(store: Store, given: Path) -> None:
    store.store_file(given / "new", chunk_size=16384, in_place=True)


def gc(store: Store, given: Path) -> None:
    store.gc(lambda: None)


def repair(store: Store, given: Path) -> None:
    store.verify(repair=True)


def migrate(store: Store, given: Path) -> None:
    left_out = store.migrate(given / "old").left_out
    if left_out:  # a file that cannot be written is left out with its reason, and the others are taken over
        raise StoreError("; ".join(reason for _, reason in left_out))


def remove(store: Store, given: Path) -> None:
    for row in store.files():
        if row.name.startswith("more"):
            store.remove(row.file_hash)


def evict(store: Store, given: Path) -> None:
    store.quota.set_limit(400_000)
    store.store_file(given / "new", chunk_size=16384)


def rebuild(store: Store, given: Path) -> None:
    store.close()
    Store.rebuild(store.root)


OPERATIONS = {
    call.__name__: call for call in (store_file, store_tree, in_place, gc, remove, repair, migrate, evict, rebuild)
}
KINDS: dict[str, Callable[[], object]] = {
    "pwrite64": lambda: os.pwrite(CLOSED, b"", 0),
    "pwritev2": lambda: os.pwritev(CLOSED, [b""], 0),
    "fsync": lambda: os.fsync(CLOSED),
    "fdatasync": lambda: os.fdatasync(CLOSED),
    "fallocate": lambda: os.posix_fallocate(CLOSED, 0, 1),
    "ftruncate": lambda: os.ftruncate(CLOSED, 0),
    "fchmod": lambda: os.fchmod(CLOSED, 0),
    "mkdirat": lambda: os.mkdir("x", dir_fd=CLOSED),
    "renameat": lambda: os.rename("x", "y", src_dir_fd=CLOSED, dst_dir_fd=CLOSED),
    "linkat": lambda: os.link("x", "y", src_dir_fd=CLOSED, dst_dir_fd=CLOSED, follow_symlinks=False),
    "unlink": lambda: os.unlink("/nonexistent/fastcas"),
    "unlinkat": lambda: os.unlink("x", dir_fd=CLOSED),
}


def attempt(root: Path, operation: str, given: Path) -> None:
    with Store.open(root, create=True) as store:
        OPERATIONS[operation](store, given)


def child(root: Path, given: Path, operation: str, kind: str, n: int) -> int:
    for _ in range(STRIKE - n):
        with contextlib.suppress(OSError):
            KINDS[kind]()
    try:
        attempt(root, operation, given)
    except FastCASError as exc:
        status = exc.exit_code if str(root) in str(exc) else UNNAMED
        if status == UNNAMED:
            traceback.print_exc()
    else:
        return 0
    try:
        attempt(root, operation, given)
    except FastCASError:
        traceback.print_exc()
        return UNWILLING
    return status


def main() -> None:
    folder, operation, patience = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    first, passed = int(sys.argv[4]), int(sys.argv[5])
    answers: list[tuple[str, int, int]] = []
    for kind in sys.argv[6:]:
        for n in range(first, STRIKE):
            root = folder / str(len(answers) + 1)
            if not root.exists():
                break
            pid = os.fork()
            if pid == 0:
                status = FOREIGN
                try:
                    status = child(root / "store", folder / "input", operation, kind, n)
                except BaseException:
                    traceback.print_exc()
                    raise
                finally:
                    os._exit(status)
            answers.append((kind, n, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
            passed = passed + 1 if answers[-1][2] == 0 else 0
            if passed == patience:
                break
        else:
            raise AssertionError(f"more than {STRIKE} calls of {kind}")
        if passed < patience:
            break
        first, passed = 1, 0
    print(json.dumps(answers))


if __name__ == "__main__":
    main()

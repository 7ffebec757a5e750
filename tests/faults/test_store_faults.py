"""Faults under the store: killed at every system call, disk full, failed fsync, short writes, vanished mounts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from fastcas.store import Store
from tests.support.store_crash_child import FOREIGN, KINDS, UNNAMED, UNWILLING
from tests.support.store_rig import Mirror, blob_files, check_replay, data_of, flip, followed, sha, temps

ROOT = Path(__file__).parents[2]
KEPT = data_of(150_000, 1)
NEW = data_of(90_000, 2)
DROPPED = data_of(70_000, 3)


MORE = 25  # files beside, so that gc, removal, migration and eviction make more calls
ROUND = 60  # children of one strace, and copies of the store at a time


def prepare(folder: Path, operation: str, n_more: int = 0) -> Path:
    """Make `input` in a folder, and one store with a file that must survive everything; returns where it is."""
    given = folder / "input"
    given.mkdir(parents=True)
    (given / "kept").write_bytes(KEPT)
    (given / "dropped").write_bytes(KEPT[:32768] + DROPPED)
    (given / "new").write_bytes(NEW)
    (given / "tree/sub").mkdir(parents=True)
    (given / "tree/sub/large").write_bytes(NEW)
    (given / "tree/small").write_bytes(b"small")
    (given / "old/hashed_files").mkdir(parents=True)
    for at in range(0, len(NEW), 50_000):
        (given / "old/hashed_files" / sha(NEW[at : at + 50_000]).hex()).write_bytes(NEW[at : at + 50_000])
    chunks = [sha(NEW[at : at + 50_000]).hex() for at in range(0, len(NEW), 50_000)]
    index = {sha(NEW).hex(): chunks}
    for number in range(n_more):
        more = data_of(20_000, 100 + number)
        (given / f"tree/m{number}").write_bytes(data_of(70_000, 100 + number))
        (given / "old/hashed_files" / sha(more).hex()).write_bytes(more)
        index[sha(more).hex()] = [sha(more).hex()]
    (given / "old/cas_index.json").write_text(json.dumps(index))
    base = folder / "base"
    with Store.open(base / "store", create=True) as store:
        dropped = store.store_file(given / "dropped", chunk_size=16384)
        kept = store.store_file(given / "kept", chunk_size=16384, parity=(4, 2))
        for number in range(n_more if operation in ("gc", "remove", "evict", "rebuild") else 0):
            (given / f"more{number}").write_bytes(data_of(60_000, 200 + number))
            doomed = store.store_file(given / f"more{number}", chunk_size=16384)
            if operation == "gc":
                (given / f"more{number}").write_bytes(data_of(60_000, 200 + number)[:32768] + b"kept")
                store.store_file(given / f"more{number}", chunk_size=16384)
                store.remove(bytes.fromhex(doomed.file_hash))
        if operation == "evict":
            store.pin(bytes.fromhex(kept.file_hash))
        if operation == "gc":
            store.remove(bytes.fromhex(dropped.file_hash))
        if operation == "repair":
            manifest = store.manifest(bytes.fromhex(kept.manifest_hash))
            assert manifest is not None
            for index_of_chunk in (5, 9):
                blob, offset, _ = store._core.catalog.extents_of(manifest.hash_of(index_of_chunk))[0]
                flip(os.fsdecode(store._core.path_of(blob)), offset)
    return base


def strike(
    folder: Path, operation: str, kinds: Sequence[str], effect: str, patience: int = 3, n_more: int = 0,
    first: int = 1, last: int = 1_000_000,
) -> list[int]:  # fmt: skip
    """Let a fault hit every call of these kinds, one operation on one fresh store each, and check every store.

    Args:
        first, last: Which calls of the first kind are struck; the round that has the last of them goes to its end.

    Returns:
        The exit statuses (negative: signal). The stores are made and checked ROUND at a time.
    """
    base = prepare(folder, operation, n_more)
    statuses: list[int] = []
    left, passed = list(kinds), 0
    while left and first <= last:
        for point in range(1, ROUND + 1):
            shutil.copytree(base, folder / str(point))
        answers = strike_round(folder, operation, left, effect, patience, first, passed)
        statuses += [status for _, _, status in answers]
        check(folder, answers, damaged=operation == "repair")
        for point in range(1, ROUND + 1):
            shutil.rmtree(folder / str(point))
        for kind, n, status in answers:
            left = left[left.index(kind) :]
            first, passed = n + 1, passed + 1 if status == 0 else 0
            if passed == patience:
                left, first, passed = left[1:], 1, 0
    return statuses


def strike_round(
    folder: Path, operation: str, kinds: Sequence[str], effect: str, patience: int, first: int, passed: int
) -> list[tuple[str, int, int]]:
    """Run one strace over the copies that are there; returns (kind, n, exit status) of each child."""
    struck = first + ROUND + 1
    inject = [part for kind in kinds for part in ("-e", f"inject={kind}:{effect}:when={struck}")]
    done = subprocess.run(
        ["strace", "-f", "-qqq", "-o", "/dev/null", "-e", f"trace={','.join(kinds)}", *inject,
         sys.executable, "-m", "tests.support.store_crash_child", str(folder), operation, str(patience), str(first),
         str(passed), *kinds],
        cwd=ROOT, env={**os.environ, "FASTCAS_STRIKE": str(struck)}, capture_output=True, text=True, timeout=110,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = [(kind, n, status) for kind, n, status in json.loads(done.stdout)]
    wrong = [answer for answer in answers if answer[2] in (FOREIGN, UNWILLING, UNNAMED)]
    assert not wrong, (wrong, done.stderr)
    return answers


def check(folder: Path, answers: Sequence[tuple[str, int, int]], *, damaged: bool) -> None:
    """CHK: no manual step, nothing published lost, nothing half there, no temps, and the operation works again."""
    for point, answer in enumerate(answers, 1):
        root = folder / str(point) / "store"
        with Store.open(root, create=True) as store:
            assert temps(root) == [], answer
            mirror = followed(store)
            if damaged:
                assert store.verify(repair=True).is_clean, answer
            mirror.check()
            kept = mirror.files.get(sha(KEPT))
            assert kept is not None, answer
            assert mirror.content(kept) == KEPT
            new = mirror.files.get(sha(NEW))
            assert new is None or mirror.content(new) == NEW
            stored = store.store_file(folder / "input" / "new", chunk_size=16384)
            assert mirror.content(bytes.fromhex(stored.manifest_hash)) == NEW
            store.gc(lambda: None)
            known = {row.path for row in store._core.catalog.blobs(0, 3)}
            assert {os.fsencode(path.relative_to(root)) for path in owned_files(root)} == known, answer
            assert store.verify().is_clean, answer
            check_replay(store, mirror)


def owned_files(root: Path) -> list[Path]:
    """Blobs and manifests on disk."""
    return [*blob_files(root), *root.glob("manifests/??/*")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "operation", ["store_file", "store_tree", "in_place", "gc", "remove", "repair", "migrate", "evict", "rebuild"]
)
def test_killed_at_every_call_needs_no_manual_step(tmp_path: Path, operation: str) -> None:
    statuses = strike(tmp_path, operation, list(KINDS), "signal=SIGKILL", 1, 1 if operation == "remove" else 0)
    assert set(statuses) == {-9, 0}
    assert statuses.count(0) == len(KINDS)
    assert statuses.count(-9) >= 15


if os.environ.get(
    "FASTCAS_KILL_POINTS"
):  # `make store-kill-points`; slices: -k gc-pwrite64, FASTCAS_KILL_RANGE="1 300"

    @pytest.fixture(scope="module")
    def proven() -> Iterator[Counter[str]]:
        """Kill points per operation, printed at the end."""
        counter: Counter[str] = Counter()
        yield counter
        each = ", ".join(f"{operation} {n}" for operation, n in counter.items())
        print(f"\n{counter.total()} kill points, nothing published was lost: {each}")

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", list(KINDS))
    @pytest.mark.parametrize("operation", ["store_tree", "gc", "remove", "migrate", "evict", "rebuild"])
    def test_killed_at_every_call_of_many_files(
        tmp_path: Path, operation: str, kind: str, proven: Counter[str]
    ) -> None:
        first, last = map(int, os.environ.get("FASTCAS_KILL_RANGE", "1 1000000").split())
        statuses = strike(tmp_path, operation, [kind], "signal=SIGKILL", 1, MORE, first, last)
        assert set(statuses) <= {-9, 0}
        proven[operation] += statuses.count(-9)


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["store_file", "store_tree", "gc", "repair", "migrate", "evict", "rebuild"])
def test_disk_full_at_every_write_is_said_and_passes(tmp_path: Path, operation: str) -> None:
    kinds = ["pwrite64", "pwritev2", "fallocate", "mkdirat"]
    statuses = strike(tmp_path, operation, kinds, "error=ENOSPC")
    assert set(statuses) == {0, 8}
    assert statuses.count(8) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["store_file", "store_tree", "repair", "migrate", "evict", "rebuild"])
def test_failed_fsync_publishes_nothing_and_is_not_retried(tmp_path: Path, operation: str) -> None:
    statuses = strike(tmp_path, operation, ["fsync", "fdatasync"], "error=EIO")
    assert set(statuses) == {0, 1}
    assert statuses.count(1) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["store_file", "gc", "migrate", "evict", "rebuild"])
def test_io_error_at_every_change_is_said_and_passes(tmp_path: Path, operation: str) -> None:
    kinds = ["pwrite64", "pwritev2", "ftruncate", "renameat", "linkat", "mkdirat", "unlinkat"]
    statuses = strike(tmp_path, operation, kinds, "error=EIO")
    assert set(statuses) == {0, 1}


@pytest.fixture(scope="module")
def short_write(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("short") / "short_write.so"
    source = ROOT / "tests/support/short_write.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.mark.parametrize(
    "operation", ["store_file", "store_tree", "in_place", "gc", "repair", "migrate", "evict", "rebuild"]
)
def test_short_and_interrupted_writes_are_continued(tmp_path: Path, operation: str, short_write: Path) -> None:
    shutil.copytree(prepare(tmp_path, operation, 2), tmp_path / "1")
    log = tmp_path / "log"
    environment = {
        **os.environ, "LD_PRELOAD": str(short_write), "SHORT_WRITE_LOG": str(log), "SHORT_WRITE_READS": "0",
        "FASTCAS_STRIKE": "2",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.store_crash_child", tmp_path, operation, "1", "1", "0", "fsync"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert json.loads(done.stdout) == [["fsync", 1, 0]], done.stderr
    assert log.stat().st_size > 10
    check(tmp_path, [("fsync", 1, 0)], damaged=False)


def in_namespace(script: str, *args: str) -> list[object]:
    """Run a Python script as root of its own mount namespace; returns the JSON that it prints."""
    enter = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-U", "-r", "-m"]
    done = subprocess.run(
        [*enter, sys.executable, "-c", script, *args], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    answer: list[object] = json.loads(done.stdout)
    return answer


FULL_DISK = """
import json, os, subprocess, sys
from pathlib import Path
from fastcas.errors import FastCASError
from fastcas.store import Store
mount = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "none", mount], check=True)
big, small = mount.parent / "big", mount.parent / "small"
big.write_bytes(os.urandom(20 << 20)); small.write_bytes(os.urandom(1 << 20))
out = []
with Store.open(mount / "st", create=True) as store:
    first = store.store_file(small, parity=(4, 2))
    for call in (store.store_file, lambda path: store.store_tree(path.parent / "tree")):
        (mount.parent / "tree").mkdir(exist_ok=True)
        big2 = mount.parent / "tree" / "big"
        if not big2.exists():
            os.link(big, big2)
        try:
            call(big)
            out.append("stored")
        except FastCASError as exc:
            out.append([type(exc).__name__, exc.exit_code, "hashed_files" in str(exc)])
    out.append(len(store.files()))
    out.append(store.verify().is_clean)
    out.append(sum(path.name.startswith(".tmp-") for path in (mount / "st").rglob("*")))
    room = os.statvfs(mount)
    filler = mount / "filler"
    filler.write_bytes(bytes(room.f_bavail * room.f_frsize - 4096))
    store.remove(bytes.fromhex(first.file_hash))
    out.append(store.gc(lambda: None).blobs_unlinked)
    filler.unlink()
    out.append(store.store_file(small).new_bytes)
print(json.dumps(out))
"""


def test_full_disk_is_said_and_space_can_be_freed_on_it(tmp_path: Path) -> None:
    (tmp_path / "mount").mkdir()
    full = ["StoreFull", 8, True]
    assert in_namespace(FULL_DISK, str(tmp_path / "mount")) == [full, full, 1, True, 0, 1, 1 << 20]


READ_ONLY = """
import json, os, subprocess, sys
from pathlib import Path
from fastcas.errors import FastCASError
from fastcas.store import Store
mount = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "none", mount], check=True)
given = mount.parent / "f"
given.write_bytes(os.urandom(100_000))
out = []

def attempt(call):
    try:
        call()
        out.append("done")
    except FastCASError as exc:
        out.append([type(exc).__name__, exc.exit_code, str(mount) in str(exc)])

with Store.open(mount / "st", create=True) as store:
    store.store_file(given)
subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
attempt(lambda: Store.open(mount / "st"))
attempt(lambda: Store.open(mount / "other", create=True))
subprocess.run(["mount", "-o", "remount,rw", mount], check=True)
store = Store.open(mount / "st")
subprocess.run(["umount", "-l", mount], check=True)
attempt(lambda: store.store_file(given))
store.close()
attempt(lambda: Store.open(mount / "st"))
print(json.dumps(out))
"""


def test_read_only_and_vanished_mounts_are_typed_errors(tmp_path: Path) -> None:
    (tmp_path / "mount").mkdir()
    out = in_namespace(READ_ONLY, str(tmp_path / "mount"))
    denied = ["PermissionDenied", 9, True]
    assert out[:2] == [denied, denied]
    assert out[2] == "done" or isinstance(out[2], list)
    assert out[3] == ["StoreNotFound", 3, True]


def test_unreadable_blob_is_damage_not_a_crash(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(data_of(100_000))
    with Store.open(tmp_path / "st", create=True) as store:
        stored = store.store_file(tmp_path / "f")
        blob_files(store.root)[0].unlink()
        fresh = Mirror()
        store.load(fresh)
        assert fresh.chunks == {}
        assert store.file(bytes.fromhex(stored.file_hash)) is not None

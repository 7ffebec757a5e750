"""A verification in slices: interrupted, resumed, with other work in between, and healed by what others give."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastcas.ids import short
from fastcas.limits import VERIFY_RESUME_S
from fastcas.metadata import Manifest
from fastcas.node.verifying import RepairPeers, Scrubber, run_scrub
from fastcas.store import Scrub, Store
from tests.support.store_rig import UNIT, check_replay, flip, followed, put


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", create=True) as opened:
        yield opened


def damage(store: Store, manifest: Manifest, *chunks: int) -> None:
    for index in chunks:
        blob, offset, length = store._core.catalog.extents_of(manifest.hash_of(index))[0]
        flip(Path(os.fsdecode(store._core.path_of(blob))), offset + length // 2)


def drive(scrub: Scrub, limit_B: int = 1) -> Scrub:
    while scrub.step(limit_B):
        pass
    scrub.close()
    return scrub


@pytest.mark.parametrize("n_steps", [0, 1, 2, 3, 7, 20])
def test_interrupted_scrub_goes_on_where_it_stopped(store: Store, tmp_path: Path, n_steps: int) -> None:
    _, manifest = put(store, tmp_path, 20, (4, 2))
    put(store, tmp_path, 3)
    damage(store, manifest, 1, 19, 21)
    first = store.scrub(repair=True, name="verify")
    for _ in range(n_steps):
        first.step(UNIT)
    first.close()
    second = drive(store.scrub(repair=True, name="verify"))
    healed = first.report.n_repaired
    assert second.report.resumed_bytes == first.report.bytes
    assert second.report.repaired_before == healed
    assert second.report.n_repaired == 3
    assert second.report.is_clean
    n_kept = 20 + 10 + 3
    # What was healed lies in a new blob, which is read, too, when the walk comes to it.
    assert n_kept <= second.report.chunks <= n_kept + 3
    assert store.verify().is_clean
    assert drive(store.scrub(name="verify")).report.resumed_bytes == 0


@pytest.mark.parametrize("reset", ["restart", "old", "garbage", "other"])
def test_what_resets_an_interrupted_scrub(store: Store, tmp_path: Path, reset: str) -> None:
    put(store, tmp_path, 20)
    first = store.scrub(name="verify")
    while first.report.chunks < 5:
        first.step(UNIT)
    first.close()
    state = json.loads(store.fact("scrub:verify") or b"")
    if reset == "old":
        state["saved_at"] = int(time.time() - VERIFY_RESUME_S - 1)
        store.remember("scrub:verify", json.dumps(state).encode())
    elif reset == "garbage":
        store.remember("scrub:verify", b'{"v": 1, "saved_at": "x"')
    name = "timer" if reset == "other" else "verify"
    report = drive(store.scrub(name=name, restart=reset == "restart")).report
    assert (report.chunks, report.resumed_bytes) == (20, 0)


def test_work_between_slices_is_no_damage(store: Store, tmp_path: Path) -> None:
    mirror = followed(store)
    _, manifest = put(store, tmp_path, 20, (4, 2))
    put(store, tmp_path, 30)
    scrub = store.scrub(repair=True)
    while scrub.report.chunks < 5:
        scrub.step(UNIT)
    store.remove(manifest.file_hash)
    store.gc(lambda: None)
    put(store, tmp_path, 7)
    report = drive(scrub, UNIT).report
    assert report.n_damaged == 0
    assert report.chunks >= 30 + 7
    check_replay(store, mirror)


def test_two_cuttings_of_a_linked_file_are_both_read(store: Store, tmp_path: Path) -> None:
    put(store, tmp_path, 16, in_place=True)
    store.store_file(tmp_path / "f16", in_place=True, chunk_size=4 * UNIT)
    assert drive(store.scrub()).report.chunks == 16 + 4


def test_lost_parity_is_remembered_until_it_is_back(store: Store, tmp_path: Path) -> None:
    _, manifest = put(store, tmp_path, 4, (4, 2))
    damage(store, manifest, 4, 5)
    assert [item.kind for item in store.verify().damages] == ["chunk", "chunk"]
    again = store.verify()
    assert {item.hash for item in again.damages} == {manifest.hash_of(4), manifest.hash_of(5)}
    assert {item.kind for item in again.damages} == {"missing"}
    assert store.verify(repair=True).is_clean
    assert store.verify().n_damaged == 0
    assert all(store.read_chunk(manifest.hash_of(i)) for i in range(manifest.n_total))


def test_lost_parity_of_a_removed_file_is_forgotten(store: Store, tmp_path: Path) -> None:
    _, manifest = put(store, tmp_path, 4, (4, 2))
    damage(store, manifest, 4)
    store.verify()
    store.remove(manifest.file_hash)
    store.gc(lambda: None)
    assert store.verify().n_damaged == 0


def test_chunks_lost_while_the_manifest_is_damaged_come_back_with_it(store: Store, tmp_path: Path) -> None:
    mirror = followed(store)
    data, manifest = put(store, tmp_path, 4, (4, 2))
    damage(store, manifest, 0, 5)
    text = manifest.manifest_hash.hex()
    flip(store.root / "manifests" / text[:2] / text, 70)
    assert not store.verify(repair=True).is_clean
    report = store.verify(repair=True, fetch={manifest.manifest_hash: manifest.data}.get)
    assert report.is_clean
    assert {(item.kind, item.repaired_by) for item in report.damages} == {("manifest", "peer"), ("missing", "parity")}
    assert mirror.content(mirror.files[manifest.file_hash]) == data
    check_replay(store, mirror)


def test_file_that_cannot_be_whole_is_not_offered_once_its_manifest_is_back(store: Store, tmp_path: Path) -> None:
    mirror = followed(store)
    _, manifest = put(store, tmp_path, 4)
    damage(store, manifest, 0)
    text = manifest.manifest_hash.hex()
    flip(store.root / "manifests" / text[:2] / text, 70)
    store.verify(repair=True)
    assert not store.verify(repair=True, fetch={manifest.manifest_hash: manifest.data}.get).is_clean
    assert [m.manifest_hash for m in store.incomplete()] == [manifest.manifest_hash]
    check_replay(store, mirror)
    assert mirror.files == {}


def test_one_loss_too_many_names_stripe_and_chunks(store: Store, tmp_path: Path) -> None:
    _, manifest = put(store, tmp_path, 12, (4, 2))
    lost = [4, 7, manifest.stripe(1)[1][0]]
    damage(store, manifest, *lost)
    report = store.verify(repair=True)
    assert report.n_damaged == 3 and report.n_repaired == 0
    for item in report.damages:
        assert f"stripe #1 of file {short(manifest.file_hash)}: 3 of 4 shards are left" in item.reason
        for index in lost:
            assert f"#{index} ({short(manifest.hash_of(index))})" in item.reason


def test_others_give_the_rest_of_a_stripe_and_parity_does_the_rest(store: Store, tmp_path: Path) -> None:
    """Chunks 0 to 2 are lost and nobody has 0 or 1; one of a stripe that never had parity here comes from a peer."""
    mirror = followed(store)
    data, manifest = put(store, tmp_path, 4, (4, 2))
    damage(store, manifest, 0, 1, 2)
    given = {manifest.hash_of(2): data[2 * UNIT : 3 * UNIT]}
    report = store.verify(repair=True, fetch=given.get)
    assert {item.hash: item.repaired_by for item in report.damages} == {
        manifest.hash_of(0): "parity", manifest.hash_of(1): "parity", manifest.hash_of(2): "peer",
    }  # fmt: skip
    assert mirror.content(manifest.manifest_hash) == data


def test_parity_that_was_never_here_is_asked_for(tmp_path: Path) -> None:
    """A file that was fetched has no parity here; others have, and not the chunk."""
    with Store.open(tmp_path / "one", create=True) as source:
        data, manifest = put(source, tmp_path, 4, (4, 2))
        parity = {manifest.hash_of(i): source.read_chunk(manifest.hash_of(i)) for i in (4, 5)}
    with Store.open(tmp_path / "two", create=True) as store:
        path = tmp_path / "fetched"
        path.write_bytes(data)
        store.register_linked(path, manifest, "fetched")
        info = path.stat()
        flip(path, 7)
        os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
        assert not store.verify(repair=True).is_clean
        asked: list[bytes] = []

        def fetch(key: bytes) -> bytes | None:
            asked.append(key)
            return parity.get(key)

        report = store.verify(repair=True, fetch=fetch)
        assert [(item.kind, item.repaired_by) for item in report.damages] == [("missing", "parity")]
        assert asked[0] == manifest.hash_of(0)
        assert store.read_chunk(manifest.hash_of(0)) == data[:UNIT]


@pytest.mark.parametrize("seed", range(3))
def test_any_m_chunks_of_every_stripe(store: Store, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    mirror = followed(store)
    data, manifest = put(store, tmp_path, 10 * 9 + 3, (10, 4))
    for number in range(manifest.n_stripes):
        members = [i for part in manifest.stripe(number) for i in part]
        damage(store, manifest, *rng.sample(members, min(4, len(members))))
    report = drive(store.scrub(repair=True), 4 * UNIT).report
    assert report.is_clean
    assert report.n_damaged == 4 * manifest.n_stripes
    assert {item.repaired_by for item in report.damages} == {"parity"}
    assert mirror.content(manifest.manifest_hash) == data
    assert store.verify().n_damaged == 0
    check_replay(store, mirror)


async def here(function: Any, *values: Any) -> Any:
    await asyncio.sleep(0)
    return function(*values)


def test_rate_pauses_as_long_as_it_must(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, tmp_path, 64)
    pauses: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        await real(0)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    asyncio.run(run_scrub(store.scrub(), here, rate_Bps=UNIT * 8))
    assert max(pauses) > 7  # 64 chunks at 8 a second; the faked pauses did not let time pass


def test_timer_heals_remembers_and_goes_on(store: Store, tmp_path: Path) -> None:
    _, manifest = put(store, tmp_path, 8, (4, 2))
    damage(store, manifest, 0, 5)
    changed: list[int] = []

    async def until(function: Any, times: int, **options: Any) -> None:
        """Run the timer until it has called a method of the store or of its scrub so often."""
        left, reached = times, asyncio.Event()

        async def run(called: Any, *values: Any) -> Any:
            nonlocal left
            result = await here(called, *values)
            left -= getattr(called, "__name__", "") == function
            if not left:
                reached.set()
            return result

        scrubber = Scrubber(store, run, RepairPeers, lambda: changed.append(1), start_s=0.0, **options)
        scrubber.start()
        async with asyncio.timeout(20):
            await reached.wait()
        await scrubber.close()

    def found() -> dict[str, int]:
        state: dict[str, int] = json.loads(store.fact("scrub-timer") or b"{}")
        return state

    asyncio.run(until("remember", 1, every_s=3600.0))
    assert "bytes" not in found()  # a new store waits its time
    asyncio.run(until("remember", 1, every_s=0.0))
    assert (found()["n_damaged"], found()["n_repaired"], changed) == (2, 2, [1])
    assert store.verify().n_damaged == 0
    asyncio.run(until("step", 1, every_s=0.0, rate_Bps=UNIT))
    assert store.fact("scrub:timer") is not None  # stopped in the middle
    asyncio.run(until("remember", 1, every_s=0.0))
    assert store.fact("scrub:timer") is None

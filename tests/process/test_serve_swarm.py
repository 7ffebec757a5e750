"""/swarm and /swarm/…/next over real workers: maps, long polls, NEXT across workers, reports of callers."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest

from fastcas.limits import NEXT_TRIALS_PER_SOURCE
from fastcas.metadata import Manifest
from fastcas.table import HaveLog, write_swarm
from tests.support.serve_rig import BUDGET_S, NODE_ID, Rig, content, manifest_of, read_response, rig, wait_until

pytestmark = pytest.mark.slow

CALLER = "cd" * 20
UNKNOWN = "0" * 64


def ask(sock: socket.socket, target: str, method: str = "GET") -> None:
    sock.sendall(f"{method} {target} HTTP/1.1\r\nHost: a\r\n\r\n".encode())


def swarm(made: Rig, manifest: Manifest, query: str = "") -> dict[str, Any]:
    """GET /swarm of a file; the answer must be a map."""
    with made.worker.connect() as sock:
        ask(sock, f"/swarm/{manifest.file_hash.hex()}{query}")
        status, fields, body = read_response(sock)
    assert (status, fields["content-type"]) == (200, "application/msgpack")
    answer = msgpack.unpackb(body)
    assert (answer["v"], answer["node_id"]) == (1, NODE_ID)
    return answer  # type: ignore[no-any-return]


def next_chunk(made: Rig, worker: int, manifest: Manifest, query: str = "") -> tuple[int, dict[str, str], bytes]:
    with made.workers[worker].connect() as sock:
        ask(sock, f"/swarm/{manifest.file_hash.hex()}/next?m={manifest.manifest_hash.hex()}{query}")
        return read_response(sock)


def prove(made: Rig, manifest: Manifest, peers: list[tuple[str, str, int]]) -> None:
    """Publish peers whose data ports answered, and wait until every worker knows them."""
    fd = write_swarm({manifest.file_hash: {"peers": peers, "manifests": []}})
    with open(fd, "rb"):
        for worker in made.workers:
            worker.channel.send({"op": "swarm"}, [fd])
    for worker in made.workers:

        def is_known(connect: Callable[[], socket.socket] = worker.connect) -> bool:
            with connect() as sock:
                ask(sock, f"/swarm/{manifest.file_hash.hex()}")
                return [tuple(p) for p in msgpack.unpackb(read_response(sock)[2])["peers"]] == peers

        wait_until(is_known, "snapshot in use")


def publish_log(made: Rig, manifest: Manifest) -> HaveLog:
    log = HaveLog.create(manifest.file_hash, manifest.manifest_hash, manifest.n_total)
    made.worker.channel.send(
        {"op": "have", "file_hash": manifest.file_hash, "manifest_hash": manifest.manifest_hash}, [log.fd]
    )
    return log


def bits(field: bytes, n: int) -> set[int]:
    return {i for i in range(n) if field[i // 8] & 0x80 >> i % 8}


def test_complete_file_says_all(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        manifest = made.store.add_file(content(200_000))
        made.publish()
        assert swarm(made, manifest)["manifests"] == [manifest.manifest_hash]
        answer = swarm(made, manifest, f"?m={manifest.manifest_hash.hex()}")
        assert (answer["all"], answer["g"]) == (True, manifest.n_total)
        assert "have" not in answer


def test_file_without_its_parity_says_which_bits(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        data = content(100_000)
        plain = manifest_of(data, 16384)
        n = plain.n_chunks
        parity = b"".join(hashlib.sha256(bytes([i])).digest() for i in range(-(-n // 4) * 2))
        manifest = Manifest(plain.file_hash, plain.size, 16384, plain.hashes, plain.midstates, 4, 2, parity)
        made.store.add_chunks(data, 16384)
        blob = made.store.add_blob(bytes(16384))
        made.store.table.put_chunk(manifest.hash_of(n + 1), blob, 0, 16384)
        made.store.add_manifest(manifest)
        made.store.table.put_file(manifest.file_hash, manifest.manifest_hash)
        made.publish()
        answer = swarm(made, manifest, f"?m={manifest.manifest_hash.hex()}")
        assert "all" not in answer
        assert bits(answer["have"], manifest.n_total) == {*range(n), n + 1}
        assert next_chunk(made, 0, manifest)[0] == 200  # parity is not needed for NEXT


def test_unknown_file_is_404_and_malformed_parameters_400(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        manifest = made.store.add_file(content(20_000))
        made.publish()
        path = f"/swarm/{manifest.file_hash.hex()}"
        for query in (
            "m=x", "m=" + "A" * 64, "m=" + "0" * 63, "m=" + "0" * 64 + "&m=" + "0" * 64, "since=-1", "since=x",
            "since=01", "since=99999999999", "since=1&since=1", "wait_ms=5001", "wait_ms=", "wait_ms=1e3",
            "wait_ms=%31", "port=0&id=" + CALLER, "port=65536&id=" + CALLER, "port=1", "id=" + CALLER,
            "port=1&id=x", "from=+1",
        ):  # fmt: skip
            with made.worker.connect() as sock:
                ask(sock, f"{path}?{query}")
                status, fields, body = read_response(sock)
                assert (query, status, fields["content-type"]) == (query, 400, "text/plain")
                assert body.count(b"\n") == 1
                ask(sock, "/health")  # a bad value is no syntax error: the connection goes on
                assert read_response(sock)[0] == 200
        with made.worker.connect() as sock:
            ask(sock, f"/swarm/{UNKNOWN}")
            assert read_response(sock)[0] == 404
            ask(sock, f"{path}/next")
            assert read_response(sock)[0] == 400
            ask(sock, f"{path}?color=blue", "HEAD")
            assert read_response(sock, head=True)[0] == 200


def test_partial_file_says_have_then_new(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        manifest = manifest_of(content(40 * 16384), 16384)
        made.publish()
        log = publish_log(made, manifest)
        for i in (3, 39):
            log.append(i)
        query = f"?m={manifest.manifest_hash.hex()}"
        answer = wait_until(lambda: swarm(made, manifest, query), "map")
        assert (answer["g"], bits(answer["have"], 40)) == (2, {3, 39})
        assert answer["manifests"] == [manifest.manifest_hash]
        log.append(7)
        assert swarm(made, manifest, query + "&since=2")["new"] == [7]
        assert swarm(made, manifest, query + "&since=3")["new"] == []
        assert bits(swarm(made, manifest, query + "&since=9")["have"], 40) == {3, 7, 39}  # not of this log
        assert next_chunk(made, 0, manifest)[0] == 404
        made.worker.channel.send({"op": "have_end", "manifest_hash": manifest.manifest_hash})

        def is_forgotten() -> bool:
            with made.worker.connect() as sock:
                ask(sock, f"/swarm/{manifest.file_hash.hex()}")
                return read_response(sock)[0] == 404

        wait_until(is_forgotten, "forgotten")
        log.close()


def test_long_poll_wakes_up_when_there_is_news(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        manifest = manifest_of(content(40 * 16384), 16384)
        made.publish()
        log = publish_log(made, manifest)
        query = f"?m={manifest.manifest_hash.hex()}"
        wait_until(lambda: swarm(made, manifest, query), "map")
        with contextlib.ExitStack() as stack:
            polls = [stack.enter_context(made.worker.connect()) for _ in range(30)]
            for sock in polls:
                ask(sock, f"/swarm/{manifest.file_hash.hex()}{query}&since=0&wait_ms=5000")
            assert swarm(made, manifest, query)["g"] == 0  # waiting ones block nobody
            log.append(11)
            for sock in polls:
                assert msgpack.unpackb(read_response(sock)[2])["new"] == [11]
        log.close()


def test_long_poll_ends_without_news(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        manifest = made.store.add_file(content(20_000))
        made.publish()
        query = f"?m={manifest.manifest_hash.hex()}&since={manifest.n_total}&wait_ms=100"
        assert swarm(made, manifest, query)["all"] is True


def test_long_poll_sees_the_file_become_complete(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        data = content(200_000)
        manifest = manifest_of(data, 16384)
        made.publish()
        log = publish_log(made, manifest)
        query = f"?m={manifest.manifest_hash.hex()}"
        wait_until(lambda: swarm(made, manifest, query), "map")
        with made.worker.connect() as sock:
            ask(sock, f"/swarm/{manifest.file_hash.hex()}{query}&since=0&wait_ms=5000")
            made.store.add_file(data)
            assert msgpack.unpackb(read_response(sock)[2])["all"] is True
        log.close()


def test_dead_and_draining_long_polls_are_let_go(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        manifest = made.store.add_file(content(20_000))
        made.publish()
        target = f"/swarm/{manifest.file_hash.hex()}?m={manifest.manifest_hash.hex()}&since=2&wait_ms=5000"
        for _ in range(20):
            with made.worker.connect() as sock:
                ask(sock, target)
        wait_until(lambda: made.worker.count("active") == 0, "dead ones gone")
        with made.worker.connect() as sock:
            ask(sock, target)
            wait_until(lambda: made.worker.count("accepted") == 21, "waiting")
            made.worker.channel.send({"op": "drain"})
            status, fields, _ = read_response(sock)
            assert (status, fields["connection"]) == (200, "close")
        made.worker.wait_message("drained")


def test_peers_and_manifests_come_from_the_snapshot(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        manifest = made.store.add_file(content(20_000))
        made.publish()
        other = bytes(32)
        peers = [(f"{i:040x}", "10.0.0.1", 9000 + i) for i in range(60)]
        fd = write_swarm({manifest.file_hash: {"peers": peers, "manifests": [other, manifest.manifest_hash]}})
        with open(fd, "rb"):
            made.worker.channel.send({"op": "swarm"}, [fd])
        answer = wait_until(lambda: (a := swarm(made, manifest))["peers"] and a, "peers")
        assert [tuple(peer) for peer in answer["peers"]] == peers[:50]
        assert answer["manifests"] == [manifest.manifest_hash, other]


def test_caller_is_reported_once_per_file(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        one, two = made.store.add_file(content(20_000, 1)), made.store.add_file(content(20_000, 2))
        made.publish()
        for manifest in (one, one, two, one):
            swarm(made, manifest, f"?port=9001&id={CALLER}")
        swarm(made, one)
        seen = made.worker.events("peer")
        assert seen == [
            {"op": "peer", "file_hash": m.file_hash, "node_id": CALLER, "ip": "127.0.0.1", "port": 9001}
            for m in (one, two)
        ]


def test_next_hands_out_every_chunk_once_over_two_workers(tmp_path: Path) -> None:
    with rig(tmp_path, workers=2) as made:
        data = content(100 * 16384 - 5)
        manifest = made.store.add_file(data)
        made.publish()
        prove(made, manifest, [(CALLER, "127.0.0.1", 9001)])
        given: list[list[int]] = [[], []]
        wrong: list[object] = []

        def take(side: int) -> None:
            with made.workers[side].connect() as sock:
                while True:
                    ask(sock, f"/swarm/{manifest.file_hash.hex()}/next?m={manifest.manifest_hash.hex()}"
                              f"&port=9001&id={CALLER}")  # fmt: skip
                    status, fields, body = read_response(sock)
                    if status == 204:
                        return
                    index = int(fields["x-fastcas-chunk"])
                    digest = hashlib.sha256(body).digest()
                    if digest != manifest.hash_of(index) or fields["content-location"] != f"/chunks/{digest.hex()}":
                        wrong.append((status, fields))
                    given[side].append(index)

        threads = [threading.Thread(target=take, args=(side,)) for side in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(BUDGET_S)
        assert wrong == []
        assert sorted(given[0] + given[1]) == list(range(100))
        assert given[0] + given[1] != sorted(given[0] + given[1])  # chosen at random
        wait_until(lambda: sum(w.count("next_given") for w in made.workers) == 100, "counted")


def test_next_from_respects_its_first_chunk(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        manifest = made.store.add_file(content(10 * 16384))
        made.publish()
        caller = f"&port=9001&id={CALLER}"
        got = {int(next_chunk(made, 0, manifest, f"&from=7{caller}")[1]["x-fastcas-chunk"]) for _ in range(3)}
        assert got == {7, 8, 9}
        assert next_chunk(made, 0, manifest, f"&from=7{caller}")[0] == 204
        assert next_chunk(made, 0, manifest, f"&from=10{caller}")[0] == 204
        assert next_chunk(made, 0, manifest, caller)[0] == 200


def test_next_marks_few_chunks_for_a_caller_that_has_not_answered_yet(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        manifest = made.store.add_file(content(40 * 16384))
        made.publish()
        for _ in range(30):
            assert next_chunk(made, 0, manifest, f"&port=9001&id={CALLER}")[0] == 200

        def n_marked() -> int:
            return sum(made.board.is_given(manifest.manifest_hash, i) for i in range(40))

        assert n_marked() <= NEXT_TRIALS_PER_SOURCE
        wait_until(lambda: n_marked() == 0, "its trial is over")
        assert made.worker.count("next_lost") <= NEXT_TRIALS_PER_SOURCE


def test_marks_of_a_taker_that_is_gone_are_taken_back(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        manifest = made.store.add_file(content(10 * 16384))
        made.publish()
        prove(made, manifest, [(CALLER, "127.0.0.1", 9001), ("ee" * 20, "127.0.0.1", 9002)])
        for port, node_id in ((9001, CALLER), (9002, "ee" * 20)) * 5:
            assert next_chunk(made, 0, manifest, f"&port={port}&id={node_id}")[0] == 200
        assert next_chunk(made, 0, manifest, f"&port=9001&id={CALLER}")[0] == 204
        prove(made, manifest, [("ee" * 20, "127.0.0.1", 9002)])
        wait_until(lambda: made.worker.count("next_lost") == 5, "marks taken back")
        for _ in range(5):
            assert next_chunk(made, 0, manifest, f"&port=9002&id={'ee' * 20}")[0] == 200
        assert next_chunk(made, 0, manifest, f"&port=9002&id={'ee' * 20}")[0] == 204


def test_next_leaves_the_chunk_unmarked_without_a_caller(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        manifest = made.store.add_file(content(2 * 16384))
        made.publish()
        for _ in range(10):
            assert next_chunk(made, 0, manifest)[0] == 200
        assert not any(made.board.is_given(manifest.manifest_hash, i) for i in range(2))


def test_next_that_never_arrives_is_given_again(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        manifest = made.store.add_file(content(16 << 20), 16 << 20)
        made.publish()
        with made.worker.connect() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            ask(sock, f"/swarm/{manifest.file_hash.hex()}/next?m={manifest.manifest_hash.hex()}&port=9001&id={CALLER}")
            wait_until(lambda: made.board.is_given(manifest.manifest_hash, 0), "claimed")
        wait_until(lambda: not made.board.is_given(manifest.manifest_hash, 0), "given back")
        assert next_chunk(made, 0, manifest, f"&port=9001&id={CALLER}")[0] == 200


def test_next_of_another_manifest_or_head_is_refused(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        manifest = made.store.add_file(content(20_000))
        made.publish()
        path = f"/swarm/{manifest.file_hash.hex()}/next?m="
        with made.worker.connect() as sock:
            ask(sock, path + UNKNOWN)
            assert read_response(sock)[0] == 404
            ask(sock, path + manifest.manifest_hash.hex(), "HEAD")
            assert read_response(sock, head=True)[0] == 405

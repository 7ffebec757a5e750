"""Real DHT processes on loopback: channel messages, rings, finding, clean and unclean ends."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from fastcas.errors import NetworkError
from fastcas.peers.dht_process import DhtProcess
from fastcas.peers.discovery import PeerHint
from fastcas.peers.manager import P2PPeerManager
from fastcas.peers.ring_discovery import RingDiscovery
from fastcas.table import Channel, Ring, write_keys

BUDGET_S = 15.0


def digests(n: int, tag: str = "chunk") -> list[bytes]:
    return sorted(hashlib.sha256(f"{tag} {i}".encode()).digest() for i in range(n))


class Child:
    """A DHT process with the owner's end of everything."""

    def __init__(self) -> None:
        self.channel, theirs = Channel.pair()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fastcas.dht", "--channel", str(theirs.fileno())], pass_fds=[theirs.fileno()]
        )
        theirs.close()
        self.messages: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self.channel.attach_to(
            asyncio.get_running_loop(),
            lambda message, fds: self.messages.put_nowait(message),
            lambda: self.messages.put_nowait(None),
        )
        requests, answers = Ring.create(), Ring.create()
        self.fds = [requests.memfd, requests.eventfd, answers.memfd, answers.eventfd]
        self.discovery = RingDiscovery(requests, answers)

    async def start(self, **options: Any) -> dict[str, Any]:
        message = {
            "op": "start", "host": "127.0.0.1", "port": 0, "port_required": False, "data_port": 0, "bootstrap": [],
            "seed": None, "state_path": None, "client": False, "network_key": None,
        }  # fmt: skip
        self.channel.send({**message, **options}, self.fds)
        async with asyncio.timeout(BUDGET_S):
            answer = await self.messages.get()
        assert answer is not None
        return answer

    async def wait(self) -> int:
        return await asyncio.to_thread(self.process.wait, BUDGET_S)

    async def end(self) -> None:
        await self.discovery.close()
        self.channel.close()
        if self.process.poll() is None:
            await self.wait()


@asynccontextmanager
async def children(n: int) -> AsyncIterator[list[Child]]:
    made = [Child() for _ in range(n)]
    try:
        yield made
    finally:
        for child in made:
            if child.process.poll() is None:
                child.channel.close()
        await asyncio.gather(*(child.end() for child in made))


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(BUDGET_S):
        while not await condition():  # noqa: ASYNC110 - the condition lives in another process
            await asyncio.sleep(0.02)


async def file_peers(discovery: RingDiscovery, file_hash: bytes, deadline_s: float = 5.0) -> set[PeerHint]:
    return {hint async for hint in discovery.find_file_peers(file_hash, 16, deadline_s)}


async def _three_nodes_and_a_client() -> None:
    file_hash = hashlib.sha256(b"file").digest()
    manifest_hash = hashlib.sha256(b"manifest").digest()
    chunks = digests(3000)
    async with children(3) as nodes:
        first = await nodes[0].start(data_port=9000)
        assert first["op"] == "ready"
        bootstrap = [["127.0.0.1", first["port"]]]
        ready = [first, *[await nodes[i].start(data_port=9000 + i, bootstrap=bootstrap) for i in (1, 2)]]

        async def is_joined() -> bool:
            return all([len(await node.discovery.routing()) == 2 for node in nodes])

        await until(is_joined)
        assert {n.node_id for n in await nodes[0].discovery.routing()} == {r["node_id"] for r in ready[1:]}

        keys_fd = write_keys(chunks)
        nodes[1].channel.send({"op": "keys"}, [keys_fd])
        os.close(keys_fd)
        assert await nodes[1].discovery.announce_files([(file_hash, 1000)]) == 1
        assert await nodes[2].discovery.announce_files([(file_hash, 250)]) == 1
        assert await nodes[1].discovery.put_metadata(file_hash, "näme.bin", 12345, manifest_hash) >= 2

        async with DhtProcess([("127.0.0.1", first["port"])]) as client:
            client.require_contacts()
            assert client.contacts >= 1
            found = await file_peers(client.discovery, file_hash)
            assert found == {PeerHint(ready[i]["node_id"], "127.0.0.1", 9000 + i, "dht") for i in (1, 2)}
            hints = await client.discovery.get_metadata(file_hash, 5.0)
            assert [(h.name, h.size, h.manifest_hash) for h in hints] == [("näme.bin", 12345, manifest_hash)]

            async def has_all_chunks() -> bool:
                pairs = {pair async for pair in client.discovery.find_chunk_peers(chunks, 4, 5.0)}
                return {digest for digest, _ in pairs} == set(chunks) and {h.port for _, h in pairs} == {9001}

            await until(has_all_chunks)

            nodes[1].channel.close()
            assert await nodes[1].wait() == 0

            async def is_withdrawn() -> bool:
                return {hint.port for hint in await file_peers(client.discovery, file_hash)} == {9002}

            await until(is_withdrawn)


@pytest.mark.slow
def test_three_processes_and_a_client_find_each_other_and_forget_who_left() -> None:
    asyncio.run(_three_nodes_and_a_client())


@pytest.mark.slow
@pytest.mark.parametrize(("announce", "n_announced"), [("off", 0), ("rare", 1), ("all", 3)])
def test_process_announces_chunks_as_it_is_told(announce: str, n_announced: int) -> None:
    async def body() -> None:
        chunks = digests(3)
        async with children(2) as (holder, node):
            first = await holder.start(data_port=9000)
            bootstrap = [["127.0.0.1", first["port"]]]
            await node.start(data_port=9001, bootstrap=bootstrap, announce=announce, announce_rate_Bps=1000)
            keys_fd = write_keys(chunks)
            node.channel.send({"op": "keys"}, [keys_fd])
            os.close(keys_fd)

            async def is_joined() -> bool:
                stats = await node.discovery.stats()
                return bool(stats["contacts"] == 1 and stats["chunks_offered"] == 3)

            await until(is_joined)
            assert await node.discovery.announce_chunks(chunks[:1]) == min(n_announced, 1)
            assert (await node.discovery.stats())["announce"] == announce

            async def is_announced() -> bool:
                return bool((await holder.discovery.stats())["hints_held"] == n_announced)

            await until(is_announced)

    asyncio.run(body())


def test_port_in_use_when_required_fails_with_exit_10() -> None:
    async def body() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
            async with children(2) as (strict, lenient):
                answer = await strict.start(port=port, port_required=True)
                assert (answer["op"], answer["error"]) == ("failed", "port_in_use")
                assert str(port) in answer["message"]
                assert await strict.wait() == 10
                answer = await lenient.start(port=port)
                assert answer["op"] == "ready"
                assert answer["port"] not in (0, port)

    asyncio.run(body())


def test_end_of_channel_ends_process_even_when_holders_are_dead() -> None:
    async def body() -> None:
        async with children(2) as (a, b):
            first = await a.start(data_port=9000)
            await b.start(data_port=9001, bootstrap=[["127.0.0.1", first["port"]]])

            async def is_joined() -> bool:
                return len(await b.discovery.routing()) == 1

            await until(is_joined)
            await b.discovery.announce_files([(bytes(32), 1000)])
            a.process.send_signal(signal.SIGKILL)
            await a.wait()
            b.channel.close()
            assert await b.wait() == 0

    asyncio.run(body())


@pytest.mark.parametrize("is_killed", [False, True])
def test_saved_contacts_bring_a_node_back_without_bootstrap(tmp_path: Path, is_killed: bool) -> None:
    state = tmp_path / "dht.state"

    async def is_saved() -> bool:
        return state.exists()

    async def body() -> None:
        async with children(3) as (a, b, again):
            first = await a.start(data_port=9000)
            await b.start(data_port=9001, bootstrap=[["127.0.0.1", first["port"]]], state_path=str(state))

            async def is_joined() -> bool:
                return len(await b.discovery.routing()) == 1

            await until(is_joined)
            if is_killed:  # contacts are on disk soon after joining, not only after a farewell
                await until(is_saved)
                b.process.send_signal(signal.SIGKILL)
                await b.wait()
            else:
                b.channel.close()
                assert await b.wait() == 0
            assert state.stat().st_mode & 0o777 == 0o600
            await again.start(data_port=9001, state_path=str(state))

            async def is_back() -> bool:
                return {node.node_id for node in await again.discovery.routing()} == {first["node_id"]}

            await until(is_back)

    asyncio.run(body())


@pytest.mark.slow
def test_killed_process_is_back_in_the_network_with_the_same_key_and_port(tmp_path: Path) -> None:
    state, seed, file_hash = str(tmp_path / "dht.state"), bytes(range(32)), hashlib.sha256(b"kill").digest()

    async def body() -> None:
        async with children(3) as (a, b, again):
            first = await a.start(data_port=9000)
            bootstrap = [["127.0.0.1", first["port"]]]
            before = await b.start(data_port=9001, bootstrap=bootstrap, seed=seed, state_path=state)

            async def is_joined() -> bool:
                return len(await a.discovery.routing()) == 1

            await until(is_joined)
            await a.discovery.announce_files([(file_hash, 1000)])
            b.process.send_signal(signal.SIGKILL)
            await b.wait()
            after = await again.start(
                port=before["port"],
                port_required=True,
                data_port=9001,
                bootstrap=bootstrap,
                seed=seed,
                state_path=state,
            )
            assert (after["port"], after["node_id"]) == (before["port"], before["node_id"])

            async def is_back() -> bool:
                return {hint.port for hint in await file_peers(again.discovery, file_hash)} == {9000}

            await until(is_back)
            await again.discovery.announce_files([(file_hash, 500)])
            assert {hint.port for hint in await file_peers(a.discovery, file_hash)} == {9001}

    asyncio.run(body())


def test_dead_bootstrap_is_reported_by_require_contacts() -> None:
    async def body() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
            silent.bind(("127.0.0.1", 0))
            port = silent.getsockname()[1]
            async with DhtProcess([("127.0.0.1", port)]) as client:
                assert client.contacts == 0
                with pytest.raises(NetworkError, match=f"DHT bootstrap failed.*127.0.0.1:{port}"):
                    client.require_contacts()
                assert not await file_peers(client.discovery, bytes(32), deadline_s=0.5)

    asyncio.run(body())


def test_outstanding_requests_are_asked_again_on_new_rings() -> None:
    async def body() -> None:
        async with children(2) as (a, b):
            lost = Ring.create(), Ring.create()
            discovery = RingDiscovery(*lost)
            asking = asyncio.ensure_future(discovery.routing())
            await asyncio.sleep(0)
            requests, answers = Ring.create(), Ring.create()
            a.fds = [requests.memfd, requests.eventfd, answers.memfd, answers.eventfd]
            discovery.replace_rings(requests, answers)
            await a.start()
            assert await asyncio.wait_for(asking, BUDGET_S) == []
            await discovery.close()
            await b.start(network_key=b"secret")

    asyncio.run(body())


def test_chunks_registered_by_name_are_announced_again_after_the_process_died() -> None:
    async def body() -> None:
        async with children(2) as (first, second):
            manager = P2PPeerManager(first.discovery)
            await first.start(data_port=9000)
            await manager.register_chunks_in_dht([digest.hex() for digest in digests(300)])
            assert (await manager.discovery.stats())["chunks_offered"] == 300
            first.process.kill()
            await first.wait()
            requests, answers = Ring.create(), Ring.create()
            second.fds = [requests.memfd, requests.eventfd, answers.memfd, answers.eventfd]
            first.discovery.replace_rings(requests, answers)
            await second.start(data_port=9000)

            async def is_offered() -> bool:
                return bool((await manager.discovery.stats())["chunks_offered"] == 300)

            await until(is_offered)

    asyncio.run(body())


@pytest.mark.parametrize("options", [{"announce": "some"}, {"announce_rate_Bps": 0}, {"seed": b"short"}])
def test_start_with_settings_that_cannot_work_fails_with_exit_1(options: dict[str, Any]) -> None:
    async def body() -> None:
        async with children(1) as (child,):
            assert (await child.start(**options))["op"] == "failed"
            assert await child.wait() == 1

    asyncio.run(body())


@pytest.mark.parametrize("message", [{"op": "start"}, {"op": "keys"}, {"op": "nonsense"}])
def test_malformed_first_message_fails_with_exit_1(message: dict[str, Any]) -> None:
    async def body() -> None:
        async with children(1) as (child,):
            child.channel.send(message)
            async with asyncio.timeout(BUDGET_S):
                answer = await child.messages.get()
            assert answer is not None
            assert answer["op"] == "failed"
            assert await child.wait() == 1

    asyncio.run(body())

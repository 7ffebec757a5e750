"""The parts of a node by themselves: frames, published messages, back-off, the swarm book, announcing, settings."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fastcas.config import SETTINGS, NodeConfig, default_storage, storage_root
from fastcas.errors import (
    ConfigError,
    FastCASError,
    LocalProtocolError,
    NodeUnavailable,
    NoPeers,
    PortInUse,
    UsageError,
)
from fastcas.node import wire
from fastcas.node.announcer import Announcement, Announcer
from fastcas.node.child import BackOff
from fastcas.node.control import ControlServer, Request
from fastcas.node.control_client import AsyncControlClient, ControlClient
from fastcas.node.listeners import open_listeners, reachable_host
from fastcas.node.relay import Relay
from fastcas.node.swarmbook import SwarmBook
from fastcas.peers.discovery import MemoryDiscovery, MemoryNetwork, PeerHint

FILE = b"f" * 32
ME = "1" * 40
OTHER = "2" * 40


# ---- frames and errors ----


def test_frames_survive_every_way_of_being_cut() -> None:
    messages: list[dict[str, Any]] = [{"id": 1, "op": "x"}, {}, {"data": b"\0" * 1000}]
    messages.append({"nested": {"a": [1, "b", None]}})
    stream = b"".join(wire.pack_frame(message) for message in messages)
    for step in (1, 3, 7, len(stream)):
        reader = wire.FrameReader()
        got = [message for at in range(0, len(stream), step) for message in reader.feed(stream[at : at + step])]
        assert got == messages


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\x01\0\0\0\xc1", b"\x01\0\0\0\x01", b"\x02\0\0\0\x92\x01"])
def test_frames_that_are_no_maps_are_refused(data: bytes) -> None:
    with pytest.raises(LocalProtocolError):
        wire.FrameReader().feed(data)


@pytest.mark.parametrize("error", [PortInUse("taken"), NoPeers("none"), UsageError("bad"), FastCASError("other")])
def test_errors_cross_a_process_border_unchanged(error: FastCASError) -> None:
    again = wire.error_from_map(wire.error_to_map(error))
    assert (type(again), str(again), again.exit_code) == (type(error), str(error), error.exit_code)


def test_unknown_errors_keep_their_name() -> None:
    again = wire.error_from_map(wire.error_to_map(KeyError("x")))
    assert (type(again), again.exit_code) == (FastCASError, 1)
    assert "KeyError" in str(again)
    assert isinstance(wire.error_from_map({"error": "port_in_use", "message": "UDP"}), PortInUse)


# ---- settings ----


def test_every_setting_is_described_and_survives_the_way_to_a_child() -> None:
    config = NodeConfig(workers=3, port=0, storage_dir="/tmp/x/hashed_files", bootstrap=["a:1"], max_upload="10M")
    config.check()
    assert set(SETTINGS) | {"dht_port_required"} == set(vars(config))
    assert NodeConfig.from_json(config.to_json()) == config
    assert config.root == Path("/tmp/x")
    assert config.max_upload_rate() == 10 << 20


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"workers": 257}, "--workers"),
        ({"port": -1}, "--port"),
        ({"dht_port": 70000}, "--dht-port"),
        ({"send_path": "fast"}, "--send-path"),
        ({"max_upload": "much"}, "--max-upload"),
        ({"announce": "some"}, "--announce"),
        ({"max_announce": "0"}, "--max-announce"),
        ({"max_announce": ""}, "--max-announce"),
        ({"bootstrap": ["nowhere"]}, "--bootstrap"),
        ({"peer": ["1.2.3.4"]}, "--peer"),
        ({"host": ""}, "--host"),
        ({"node_id": "a b"}, "--node-id"),
        ({"node_id": "\x1b"}, "--node-id"),
    ],
)
def test_settings_that_cannot_work_are_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        NodeConfig(**settings).check()


def test_network_key_comes_from_a_file_of_16_to_4096_bytes(tmp_path: Path) -> None:
    path = tmp_path / "key"
    assert NodeConfig().check().read_network_key() is None
    config = NodeConfig(network_key=str(path)).check()
    for content in (b"", b"k" * 15, b"k" * 4097):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"--network-key: .*key: expected 16\.\.4096 B"):
            config.read_network_key()
    path.write_bytes(b"\0" * 16)
    assert config.read_network_key() == b"\0" * 16
    for bad in (tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match="--network-key: "):
            NodeConfig(network_key=str(bad)).check().read_network_key()


@pytest.mark.parametrize("text", ["", "[]", '{"unknown": 1}'])
def test_settings_from_elsewhere_are_checked(text: str) -> None:
    with pytest.raises(ConfigError):
        NodeConfig.from_json(text)


def test_storage_folder_defaults() -> None:
    assert default_storage({}) == Path("storage")
    assert default_storage({"FASTCAS_STORAGE": "/data"}) == Path("/data")
    assert storage_root("/data/hashed_files") == storage_root("/data") == Path("/data")


# ---- supervisor's parts ----


def test_back_off_grows_to_its_limit_and_forgets_after_service() -> None:
    back_off = BackOff(0.1, 5.0)
    delays = [back_off.after_exit(served=False) for _ in range(8)]
    assert delays == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    assert back_off.after_exit(served=True) == 0.0
    assert back_off.after_exit(served=False) == 0.1


class FakeChild:
    """Records what it is sent."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, Any], int]] = []

    def send(self, message: dict[str, Any], fds: list[int]) -> bool:
        self.got.append((message, len(fds)))
        return True


def test_relay_keeps_the_last_message_per_key_with_its_descriptors() -> None:
    relay, first, late = Relay(), FakeChild(), FakeChild()
    n_before = len(os.listdir("/proc/self/fd"))

    def publish(key: str, message: dict[str, Any] | None, forward: dict[str, Any] | None = None) -> None:
        fds = [os.open("/dev/null", os.O_RDONLY)] if message else []
        relay.publish([first], key, message, fds, forward)  # type: ignore[list-item]

    publish("table", {"number": 1})
    publish("have:a", {"op": "have"})
    publish("table", {"number": 2})
    publish("have:a", None, {"op": "have_end"})
    relay.replay(late)  # type: ignore[arg-type]
    assert first.got == [({"number": 1}, 1), ({"op": "have"}, 1), ({"number": 2}, 1), ({"op": "have_end"}, 0)]
    assert late.got == [({"number": 2}, 1)]
    relay.close()
    assert len(os.listdir("/proc/self/fd")) == n_before


def test_listeners_share_a_port_that_nobody_else_gets() -> None:
    listeners = open_listeners("127.0.0.1", 0, 3)
    try:
        ports = {sock.getsockname()[1] for sock in listeners}
        assert len(ports) == 1
        with pytest.raises(PortInUse, match=f"Port already in use: TCP port {min(ports)} of 127.0.0.1"):
            open_listeners("127.0.0.1", min(ports), 1)
    finally:
        for sock in listeners:
            sock.close()
    with pytest.raises(ConfigError, match="--host"):
        open_listeners("not an address", 0, 1)
    assert reachable_host("10.0.0.1") == "10.0.0.1"
    assert reachable_host("0.0.0.0") is None
    assert reachable_host("::") is None


# ---- control socket ----


@contextmanager
def control_loop(handler: Callable[[Request], Any], root: Path) -> Iterator[None]:
    """A control server in a loop of its own thread."""
    import threading

    started = threading.Event()
    loop = asyncio.new_event_loop()
    server = ControlServer(root, handler)

    async def serve() -> None:
        server.start()
        started.set()

    def run() -> None:
        loop.run_until_complete(serve())
        loop.run_forever()
        loop.run_until_complete(server.close())
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert started.wait(10)
        yield
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def test_control_socket_passes_descriptors_progress_results_and_errors(tmp_path: Path) -> None:
    root = tmp_path / ("deep" * 30)  # longer than a unix socket's path can be
    root.mkdir()

    async def handler(request: Request) -> dict[str, Any]:
        if request.op == "fail":
            raise NoPeers("nobody")
        if request.op == "break":
            raise KeyError("x")
        for number in range(3):
            request.progress({"n": number})
        return {"bytes": os.pread(request.fds[0], 5, 0), "args": request.args}

    with control_loop(handler, root), ControlClient(root) as client:
        assert (root / "node.sock").stat().st_mode & 0o777 == 0o600
        seen: list[dict[str, Any]] = []
        with (tmp_path / "file").open("w+b") as file:
            file.write(b"hello")
            file.flush()
            answer = client.call("read", {"a": 1}, [file.fileno()], seen.append)
        assert answer == {"bytes": b"hello", "args": {"a": 1}}
        assert seen == [{"n": 0}, {"n": 1}, {"n": 2}]
        with pytest.raises(NoPeers, match="nobody"):
            client.call("fail", {})
        with pytest.raises(LocalProtocolError, match="break"):
            client.call("break", {})
    assert not (root / "node.sock").exists()
    with pytest.raises(NodeUnavailable):
        ControlClient(root)
    with pytest.raises(NodeUnavailable):
        ControlClient(tmp_path / "nothing")


def test_callers_end_cancels_its_requests(tmp_path: Path) -> None:
    async def main() -> None:
        began, cancelled = asyncio.Event(), asyncio.Event()

        async def handler(request: Request) -> dict[str, Any]:
            began.set()
            try:
                await asyncio.Event().wait()
            finally:
                assert request.cancelled.is_set()
                cancelled.set()
            return {}

        server = ControlServer(tmp_path, handler)
        server.start()
        try:
            for ending in ("close", "cancel"):
                began.clear()
                cancelled.clear()
                client = await AsyncControlClient.connect(tmp_path)
                task = asyncio.create_task(client.call("wait", {}))
                async with asyncio.timeout(10):
                    await began.wait()
                    if ending == "close":
                        await client.close()
                        with pytest.raises(NodeUnavailable):
                            await task
                    else:
                        task.cancel()
                        await asyncio.gather(task, return_exceptions=True)
                    await cancelled.wait()
                await client.close()
        finally:
            await server.close()

    asyncio.run(main())


def test_malformed_requests_end_the_connection_only(tmp_path: Path) -> None:
    import socket

    async def handler(request: Request) -> dict[str, Any]:
        return {"pong": True}

    with control_loop(handler, tmp_path):
        for data in (b"\xff\xff\xff\xff", wire.pack_frame({"id": 1}), wire.pack_frame(
            {"id": 1, "op": "x", "args": {}, "n_fds": 3}
        )):  # fmt: skip
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(10)
                sock.connect(str(tmp_path / "node.sock"))
                sock.sendall(data)
                assert sock.recv(1) == b""
        with ControlClient(tmp_path) as client:
            assert client.call("ping", {}) == {"pong": True}


# ---- swarm book ----


async def health_server(answer: bytes) -> asyncio.Server:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    return await asyncio.start_server(serve, "127.0.0.1", 0)


def event(port: int, node_id: str = OTHER, ip: str = "127.0.0.1") -> dict[str, Any]:
    return {"op": "peer", "file_hash": FILE, "node_id": node_id, "ip": ip, "port": port}


def test_callers_are_told_about_once_they_answer_a_health_check() -> None:
    async def main() -> None:
        published: asyncio.Queue[dict[bytes, Any]] = asyncio.Queue()
        book = SwarmBook(ME, published.put_nowait)
        healthy = await health_server(b"HTTP/1.1 200 OK\r\n\r\n")
        sick = await health_server(b"HTTP/1.1 503 Busy\r\n\r\n")
        async with healthy, sick:
            port = healthy.sockets[0].getsockname()[1]
            book.on_peer(event(sick.sockets[0].getsockname()[1], "3" * 40))
            book.on_peer(event(port))
            async with asyncio.timeout(10):
                snapshot = await published.get()
            assert snapshot == {FILE: {"peers": [(OTHER, "127.0.0.1", port)], "manifests": []}}
            assert book.peers_of(FILE) == [(OTHER, "127.0.0.1", port)]
        await book.close()

    asyncio.run(main())


def test_malformed_or_own_callers_are_never_dialled() -> None:
    async def main() -> None:
        book = SwarmBook(ME, lambda files: None)
        for bad in (
            event(9000, ME), event(80), event(70000), event(9000, "x"), event(9000, ip="example.org"), {"op": "peer"},
            event(9000) | {"file_hash": b"short"},
        ):  # fmt: skip
            book.on_peer(bad)
        assert book._tasks == set()
        await book.close()

    asyncio.run(main())


# ---- announcer ----


def test_announcer_says_everything_once_and_withdraws_at_the_end() -> None:
    async def main() -> None:
        network = MemoryNetwork()
        me = PeerHint(ME, "127.0.0.1", 9000, "memory")
        discovery = MemoryDiscovery(network, me)
        announcer = Announcer(lambda: discovery)
        announcer.start()
        announcer.announce([Announcement(FILE, b"m" * 32, "name", 5), Announcement(b"p" * 32, b"q" * 32, "", 5, 1)])
        assert await announcer.wait_idle(10)
        assert network.files[FILE] == {me: 1000}
        assert network.files[b"p" * 32] == {me: 1}
        assert [hint.name for hint in network.metadata[FILE].values()] == ["name"]
        assert b"p" * 32 not in network.metadata  # its name is told once it is whole
        announcer.withdraw(FILE)
        assert await announcer.wait_idle(10)
        assert network.files[FILE] == {}
        await announcer.close()
        await announcer.close()
        assert not any(network.files.values())

    asyncio.run(main())


def test_announcer_tells_a_new_dht_process_everything_again_but_what_is_gone() -> None:
    async def main() -> None:
        me = PeerHint(ME, "127.0.0.1", 9000, "memory")
        networks = [MemoryNetwork(), MemoryNetwork()]
        discovery = MemoryDiscovery(networks[0], me)
        announcer = Announcer(lambda: discovery)
        announcer.start()
        announcer.announce([Announcement(FILE, b"m" * 32, "", 5, 1), Announcement(b"p" * 32, b"q" * 32, "", 5)])
        assert await announcer.wait_idle(10)
        announcer.withdraw(b"p" * 32)
        assert await announcer.wait_idle(10)
        discovery = MemoryDiscovery(networks[1], me)
        announcer.repeat()
        assert await announcer.wait_idle(10)
        assert networks[1].files == {FILE: {me: 1}}
        await announcer.close()

    asyncio.run(main())


def test_announcer_without_discovery_is_idle() -> None:
    async def main() -> None:
        announcer = Announcer(lambda: None)
        announcer.start()
        announcer.announce([Announcement(FILE, b"m" * 32, "name", 5)])
        assert await announcer.wait_idle(10)
        await announcer.close()

    asyncio.run(main())

"""Joining in virtual time: slow names, dead bootstrap nodes, saved contacts, what is on disk when a node is killed."""

from __future__ import annotations

import asyncio
import logging
import random
from pathlib import Path
from typing import Any

import pytest

from fastcas.dht.contacts import Contact
from fastcas.dht.state import MAGIC_BEFORE, load_state, save_state
from tests.support.virtual_net import VirtualNet, address_of, run


def far_contacts(n: int) -> list[Contact]:
    """Contacts at addresses where nobody is."""
    return [Contact(random.Random(i).randbytes(20), f"10.99.{i >> 8}.{i & 255}", 8468) for i in range(n)]


def test_slow_name_server_delays_nobody_and_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await net.grow(3)
        saved = await net.node(900)
        asked = []

        async def slow(host: str, port: int, **options: Any) -> Any:
            asked.append(host)
            await asyncio.sleep(30.0)

        net.loop.getaddrinfo = slow  # type: ignore[method-assign]
        node = await net.node(901)
        start = net.loop.time()
        node.joining.add_former([address_of(saved)])
        node.start([("slow.example", 8468), address_of(nodes[0])])
        await node.joined.wait()
        assert net.loop.time() - start < 0.5
        await asyncio.sleep(2.0)
        assert len(node.protocol.router) == 4
        await asyncio.sleep(300.0)
        assert len(asked) > 3  # it may come back

    run(body)
    assert caplog.text.count("'slow.example' cannot be resolved: no answer within 5 s") == 1


def test_dead_bootstrap_node_is_one_line_until_it_answers(caplog: pytest.LogCaptureFixture) -> None:
    async def body(net: VirtualNet) -> None:
        late, node = await net.node(1), await net.node(2)
        late.stop()
        node.start([address_of(late)])
        await asyncio.sleep(100.0)
        again = await net.node(1)
        again.start()
        await asyncio.sleep(100.0)
        assert len(node.protocol.router) == 1

    with caplog.at_level(logging.INFO):
        run(body)
    assert caplog.text.count("bootstrap node 10.0.0.1:8468 does not answer") == 1


@pytest.mark.slow
def test_all_saved_contacts_are_asked_at_once(tmp_path: Path) -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await net.grow(30)
        living = [Contact(n.identity.node_id, *address_of(n)) for n in nodes]
        save_state(tmp_path / "state", [*far_contacts(370), *living])
        back = await net.node(999, state_path=tmp_path / "state")
        back.start()
        await asyncio.sleep(1.5)
        assert len(back.protocol.router) >= 27

    run(body)


@pytest.mark.slow
def test_nine_tenths_of_the_table_are_on_disk_soon_after_every_change(tmp_path: Path) -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await net.grow(10)
        path = tmp_path / "state"
        node = await net.node(999, state_path=path)
        node.start([address_of(nodes[0])])
        for number in range(30):
            await asyncio.sleep(4.0)
            saved = set(load_state(path).addresses)
            table = {contact.address for contact in node.protocol.router}
            assert len(saved & table) >= 0.9 * len(table) > 0
            (await net.node(100 + number)).start([address_of(nodes[number % 10])])
        assert len(node.protocol.router) >= 30

    run(body)


def test_state_of_the_version_before_is_read(tmp_path: Path) -> None:
    path = tmp_path / "state"
    save_state(path, far_contacts(3))
    path.write_bytes(MAGIC_BEFORE + path.read_bytes()[8:])
    assert load_state(path).addresses == [contact.address for contact in far_contacts(3)]
    assert load_state(path).chunks is None


def test_lonely_node_asks_its_former_contacts_again() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await net.grow(5)
        carry = net.carry
        net.carry = lambda *datagram: None  # type: ignore[method-assign]
        await asyncio.sleep(200.0)
        assert [len(node.protocol.router) for node in nodes] == [0] * 5
        net.carry = carry  # type: ignore[method-assign]
        await asyncio.sleep(130.0)
        assert [len(node.protocol.router) for node in nodes] == [4] * 5

    run(body)

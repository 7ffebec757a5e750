"""Defects of the kademlia package in joining, publishing and leaving (numbers as in `test_dht_defects`)."""

from __future__ import annotations

import asyncio

import pytest

from fastcas.dht.identity import id_of
from fastcas.dht.provided import keys_of, metadata_key
from fastcas.errors import UsageError
from tests.support.sweep_net import full_network
from tests.support.virtual_net import VirtualNet, address_of, run

FILE = bytes(range(32))


@pytest.mark.slow
def test_defect_18_holders_republish_nothing_and_publishers_one_announcement_per_cycle() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await net.grow(4)
        await nodes[1].announcer.put_metadata(FILE, "name", 1, FILE)
        await nodes[1].announcer.announce_files([(FILE, 1000)])
        await asyncio.sleep(9 * 3600)
        assert [node.protocol.counters["rpc_pm"] for node in nodes if node is not nodes[1]] == [0] * 3
        assert [node.protocol.counters["rpc_as"] for node in nodes if node is not nodes[1]] == [0] * 3
        assert 2 * 3 <= nodes[1].protocol.counters["rpc_pm"] <= 3 * 3
        assert 9 * 3 <= nodes[1].protocol.counters["rpc_as"] <= 14 * 3

    run(body)


def test_defect_19_nodes_that_join_at_the_same_moment_all_get_full_tables() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = [await net.node(number + 1) for number in range(40)]
        nodes[0].start()
        for node in nodes[1:]:
            node.start([address_of(nodes[0])])
        await asyncio.sleep(20.0)
        assert min(len(node.protocol.router) for node in nodes) >= 20

    run(body)


def test_defects_20_and_21_publishing_says_how_many_hold_it_and_raises_when_nobody_does() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await full_network(net, 12)
        net.kill(nodes[6:])
        held = await nodes[0].announcer.put_metadata(FILE, "name", 1, FILE)
        assert held == 1 + sum(metadata_key(FILE) in node.protocol.metadata for node in nodes[1:]) == 6
        net.kill(nodes[1:6])
        assert await nodes[0].announcer.put_metadata(bytes(32), "name", 1, FILE) == 1
        assert await nodes[0].announcer.announce_files([(bytes(32), 1000)]) == 1  # ourselves
        client = await net.node(99, is_client=True, serves=False)
        client.start([address_of(nodes[3])])
        assert await client.announcer.put_metadata(bytes(32), "name", 1, FILE) == 0

    run(body)


def test_defect_33_closing_leaves_no_task_no_request_and_no_socket() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await net.grow(3)
        node = await net.node(99)
        node.start([address_of(nodes[0]), ("10.99.0.1", 8468)])
        node.announcer.set_snapshot(keys_of(FILE))
        await asyncio.sleep(0.1)  # in the middle of joining
        others = asyncio.all_tasks() - node._tasks
        await node.close()
        await node.close()
        left = {task for task in asyncio.all_tasks() - others if not task.done()}
        assert left == set()
        assert not node._tasks
        counters = dict(node.protocol.counters)
        await asyncio.sleep(60.0)
        assert node.protocol.counters == counters  # nothing is asked again, nothing times out
        assert ("10.0.0.99", 8468) not in net.hosts

    run(body)


def test_defect_34_the_id_is_the_hash_of_the_public_key() -> None:
    async def body(net: VirtualNet) -> None:
        node = await net.node(1)
        assert node.node.id == id_of(node.identity.public)

    run(body)


def test_defect_37_plain_get_and_set_are_refused() -> None:
    async def body(net: VirtualNet) -> None:
        node = await net.node(1)
        for call in (node.get("key"), node.set("key", b"value"), node.set_digest(bytes(20), b"value")):
            with pytest.raises(UsageError, match="switched off"):
                await call

    run(body)

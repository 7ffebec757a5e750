"""Many nodes in virtual time: joining, finding, announcing, dead nodes, loss, leaving, expiry."""

from __future__ import annotations

import asyncio
import random

import pytest

from fastcas.dht.contacts import Contact
from fastcas.dht.finder import Finder
from fastcas.dht.lookup import Lookup
from fastcas.dht.peerlist import Peer
from fastcas.dht.provided import keys_of, metadata_key
from fastcas.dht.records import MetadataStore
from fastcas.dht.server import FcServer
from fastcas.dht.wire import OK
from tests.support.virtual_net import DATA_PORT, VirtualNet, address_of, run, true_nearest

FILE = bytes(range(32))


async def find_file(node: FcServer, file_hash: bytes = FILE, deadline_s: float = 10.0) -> set[Peer]:
    found: set[Peer] = set()
    await node.finder.find_file(file_hash, 32, deadline_s, found.update)
    return found


async def found_chunks(finder: Finder, hashes: bytes) -> int:
    return await finder.find_chunks(hashes, 4, 60.0, lambda news: None)


@pytest.mark.slow
def test_announcing_10000_chunks_costs_few_requests_and_all_are_found() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await net.grow(80)
        publisher, seeker = nodes[3], nodes[40]
        hashes = random.Random(7).randbytes(32 * 10_000)
        before = publisher.protocol.counters["requests"]
        assert await publisher.announcer.announce_chunks(keys_of(hashes)) == 10_000
        report = publisher.announcer.last_report
        assert report is not None
        assert report.copies >= 0.98 * 8 * (10_000 - 1_000)  # what the publisher is nearest to itself is not sent
        assert publisher.protocol.counters["requests"] - before < 1_600
        assert await found_chunks(seeker.finder, hashes[: 32 * 1000]) == 1000
        assert net.largest <= 1200

    run(body)


@pytest.mark.slow
def test_lookups_and_chunks_survive_30_percent_dead_and_5_percent_loss() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await net.grow(80)
        publisher, seeker = nodes[3], nodes[40]
        hashes = random.Random(7).randbytes(32 * 2_000)
        assert await publisher.announcer.announce_chunks(keys_of(hashes)) == 2_000
        others = [node for node in nodes if node not in (publisher, seeker)]
        net.kill(others[::3])
        net.loss = 0.05
        assert await found_chunks(seeker.finder, hashes) >= 0.999 * 2_000
        alive = [node for node in nodes if not node.is_closed and node is not seeker]
        recall = 0.0
        for number in range(20):
            target = random.Random(number).getrandbits(160)
            result = await Lookup(seeker.protocol, target).run()
            assert result.n_asked <= 120
            recall += len({c.id for c in result.nodes} & set(true_nearest(alive, target, 20))) / 20
        assert recall / 20 >= 0.95

    run(body)


def test_node_that_leaves_is_in_nobodys_table_any_more_and_lookups_do_not_wait_for_it() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await net.grow(8)
        leaving, liar = nodes[3], await net.node(99)
        liar.identity.node_id = leaving.identity.node_id
        others = [node for node in nodes if node is not leaving]
        assert all(node.protocol.router.get(leaving.identity.node_id) for node in others)
        for node in others:
            at = Contact(node.identity.node_id, *address_of(node))
            reply = await liar.protocol.write(at, "wd", [0, b""], hard_s=1.0)
            assert reply is not None and reply.status == OK  # it has a token, but not that address
        assert all(node.protocol.router.get(leaving.identity.node_id) for node in others)
        liar.stop()
        await asyncio.sleep(2)  # what it set off is over
        await leaving.close()  # which has announced nothing to anybody
        for node in others:
            assert node.protocol.router.get(leaving.identity.node_id) is None
            timeouts = node.protocol.counters["timeouts"]
            await Lookup(node.protocol, int.from_bytes(leaving.identity.node_id)).run()
            assert node.protocol.counters["timeouts"] == timeouts

    run(body)


@pytest.mark.slow
def test_every_node_finds_every_other_in_a_network_of_30() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await net.grow(30)
        for node in nodes[::5]:
            target = node.identity.node_id
            for seeker in nodes[::7]:
                if seeker is not node:
                    result = await Lookup(seeker.protocol, int.from_bytes(target)).run()
                    assert result.nodes[0].id == target

    run(body)


def test_node_alone_stores_at_itself_and_first_comer_finds_it_by_the_self_marker() -> None:
    async def body(net: VirtualNet) -> None:
        first = await net.node(1)
        first.start()
        hashes = random.Random(1).randbytes(32 * 100)
        assert await first.announcer.announce_files([(FILE, 1000)]) == 1
        assert await first.announcer.announce_chunks(keys_of(hashes)) == 100
        second = await net.node(2)
        second.start([address_of(first)])
        await asyncio.wait_for(second.joined.wait(), 10)
        me = Peer(first.identity.node_id, address_of(first)[0], DATA_PORT)
        assert await find_file(second) == {me}
        assert await found_chunks(second.finder, hashes) == 100
        await asyncio.sleep(5)  # the network grew from one node to two: everything is announced again
        assert second.protocol.hints.n_hints == 100
        assert second.protocol.swarms.n_records == 1

    run(body)


def test_node_that_serves_nothing_announces_nothing() -> None:
    async def body(net: VirtualNet) -> None:
        node = await net.node(1, serves=False)
        node.start()
        assert await node.announcer.announce_files([(FILE, 1000)]) == 0
        assert await node.announcer.announce_chunks(keys_of(FILE)) == 0

    run(body)


def test_snapshot_is_announced_by_itself_and_only_what_is_new_is_sent() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await net.grow(5)
        first = keys_of(random.Random(1).randbytes(32 * 1000))
        both = keys_of(random.Random(1).randbytes(32 * 1000) + random.Random(2).randbytes(32 * 130))
        nodes[1].announcer.set_snapshot(first)
        await asyncio.sleep(5)
        assert all(node.protocol.hints.n_hints == 1000 for node in nodes if node is not nodes[1])
        sent = nodes[1].protocol.counters["rpc_ap"]
        nodes[1].announcer.set_snapshot(both)
        await asyncio.sleep(5)
        assert all(node.protocol.hints.n_hints == 1130 for node in nodes if node is not nodes[1])
        assert nodes[1].protocol.counters["rpc_ap"] - sent == 4
        nodes[1].announcer.set_snapshot(first)
        await asyncio.sleep(5)
        assert nodes[1].protocol.counters["rpc_ap"] - sent == 4
        nodes[1].announcer.set_snapshot(both)
        await asyncio.sleep(5)
        assert nodes[1].protocol.counters["rpc_ap"] - sent == 8

    run(body)


def test_leaving_withdraws_from_all_holders() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await net.grow(6)
        await nodes[1].announcer.announce_files([(FILE, 1000)])
        await nodes[2].announcer.announce_files([(FILE, 500)])
        await nodes[1].announcer.announce_chunks(keys_of(FILE))
        assert {peer.node_id for peer in await find_file(nodes[5])} == {n.identity.node_id for n in nodes[1:3]}
        await nodes[1].close()
        assert {peer.node_id for peer in await find_file(nodes[5])} == {nodes[2].identity.node_id}
        assert await found_chunks(nodes[5].finder, FILE) == 0

    run(body)


def test_withdrawing_one_file_leaves_the_others() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await net.grow(4)
        other = bytes(32)
        await nodes[1].announcer.announce_files([(FILE, 1000), (other, 1000)])
        for file_hash in (FILE, other):
            await nodes[1].announcer.put_metadata(file_hash, "name", 1, FILE)
        await nodes[1].announcer.withdraw([FILE])
        assert await find_file(nodes[3]) == set()
        assert list(nodes[1].protocol.provided.metadata) == [metadata_key(other)]
        assert list(nodes[1].announcer._names) == [metadata_key(other)]
        assert len(await find_file(nodes[3], other)) == 1

    run(body)


@pytest.mark.slow
def test_records_expire_after_a_silent_death_and_stay_while_the_publisher_lives() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await net.grow(5)
        await nodes[1].announcer.announce_files([(FILE, 1000)])
        await nodes[2].announcer.announce_files([(FILE, 1000)])
        await nodes[1].announcer.announce_chunks(keys_of(FILE))
        net.kill([nodes[1]])
        await nodes[2].announcer.announce_chunks(keys_of(bytes(32)))
        await asyncio.sleep(2.1 * 3600)
        assert {peer.node_id for peer in await find_file(nodes[4])} == {nodes[2].identity.node_id}
        assert all(nodes[1].identity.node_id != c.id for node in nodes[2:] for c in node.protocol.router)
        assert await found_chunks(nodes[4].finder, FILE) == 1
        await asyncio.sleep(0.3 * 3600)
        assert await found_chunks(nodes[4].finder, FILE) == 0
        await asyncio.sleep(22 * 3600)
        assert await found_chunks(nodes[4].finder, bytes(32)) == 1
        assert {peer.node_id for peer in await find_file(nodes[4])} == {nodes[2].identity.node_id}

    run(body)


def test_client_finds_but_enters_no_table_and_answers_nobody() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await net.grow(4)
        await nodes[1].announcer.announce_files([(FILE, 1000)])
        client = await net.node(99, serves=False, is_client=True)
        client.start([address_of(nodes[0])])
        assert await client.bootstrap([address_of(nodes[0])]) >= 1
        assert len(await find_file(client)) == 1
        assert await client.announcer.put_metadata(FILE, "x", 1, FILE) == 4
        assert all(client.identity.node_id != c.id for node in nodes for c in node.protocol.router)
        assert await nodes[0].protocol.ping(address_of(client)) is None

    run(body)


def test_metadata_of_several_publishers_comes_back_once_each_and_newest() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await net.grow(6)
        for number, node in enumerate(nodes[:4]):
            await node.announcer.put_metadata(FILE, f"old {number}", number, FILE)
        await nodes[0].announcer.put_metadata(FILE, "new 0" + "x" * 200, 0, FILE)
        records = await nodes[5].finder.get_metadata(FILE, 10.0)
        assert {r.public for r in records} == {node.identity.public for node in nodes[:4]}
        newest = next(r for r in records if r.public == nodes[0].identity.public)
        assert b"new 0" in newest.value

    run(body)


def test_node_whose_bootstrap_is_down_joins_when_it_comes_up() -> None:
    async def body(net: VirtualNet) -> None:
        late, early = await net.node(1), await net.node(2)
        address = address_of(late)
        late.stop()
        early.start([address])
        assert await early.bootstrap([address]) == 0
        await asyncio.sleep(20)
        again = await net.node(1)
        again.start()
        async with asyncio.timeout(40):
            await early.joined.wait()
        assert [c.address for c in early.protocol.router] == [address]

    run(body)


def test_restarted_node_at_another_address_replaces_its_old_entry() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await net.grow(4)
        moved_id = nodes[2].identity.node_id
        net.kill([nodes[2]])
        moved = await net.node(999, key=3, ip="10.9.9.9")
        assert moved.identity.node_id == moved_id
        moved.start([address_of(nodes[0])])
        await asyncio.sleep(10)
        known = nodes[0].protocol.router.get(moved_id)
        assert known is not None
        assert known.address == ("10.9.9.9", 8468)

    run(body)


def test_network_key_separates_networks() -> None:
    async def body(net: VirtualNet) -> None:
        a, b = [await net.node(i, network_key=b"one") for i in (1, 2)]
        c, d = await net.node(3, network_key=b"two"), await net.node(4)
        a.start()
        for node in (b, c, d):
            node.start([address_of(a)])
        await asyncio.sleep(10)
        assert [len(node.protocol.router) for node in (a, b, c, d)] == [1, 1, 0, 0]
        await a.announcer.announce_files([(FILE, 1000)])
        assert len(await find_file(b)) == 1
        assert net.largest <= 1200

    run(body)


def test_peers_are_told_and_used_only_as_the_address_policy_allows() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await net.grow(3)
        nodes[1].announcer.set_data_port(22)
        await nodes[1].announcer.announce_files([(FILE, 1000)])
        assert await find_file(nodes[2]) == set()

    run(body)


def test_node_that_came_back_with_a_new_key_replaces_its_old_entry() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await net.grow(4)
        old_id = nodes[2].identity.node_id
        net.kill([nodes[2]])
        reborn = await net.node(3, key=77)
        reborn.start([address_of(nodes[0])])
        await asyncio.sleep(60)
        for node in (nodes[0], nodes[1], nodes[3]):
            assert node.protocol.router.get(old_id) is None
            assert node.protocol.router.get(reborn.identity.node_id) is not None

    run(body)


def test_ipv6_nodes_find_each_other() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = [await net.node(number, ip=f"fd00::{number}") for number in range(1, 5)]
        nodes[0].start()
        for node in nodes[1:]:
            node.start([("fd00:0::1", 8468)])
        await asyncio.sleep(10)
        assert [len(node.protocol.router) for node in nodes] == [3, 3, 3, 3]
        await nodes[1].announcer.announce_files([(FILE, 1000)])
        await nodes[1].announcer.announce_chunks(keys_of(FILE))
        assert await find_file(nodes[3]) == {Peer(nodes[1].identity.node_id, "fd00::2", DATA_PORT)}
        assert await found_chunks(nodes[3].finder, FILE) == 1

    run(body)


def test_lookup_in_a_network_that_splits_and_heals_finds_everybody_again() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await net.grow(12)
        left = {address_of(node) for node in nodes[:6]}
        carry = net.carry
        net.carry = lambda source, target, data: (  # type: ignore[method-assign]
            carry(source, target, data) if (source in left) == (target in left) else None
        )
        await asyncio.sleep(600)
        assert all(len(node.protocol.router) == 5 for node in nodes)
        net.carry = carry  # type: ignore[method-assign]
        await asyncio.sleep(600)
        assert all(len(node.protocol.router) == 11 for node in nodes)

    run(body)


def test_requests_with_more_elements_than_known_are_answered() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await net.grow(2)
        await nodes[0].announcer.put_metadata(FILE, "x", 1, FILE)
        asker, holder = nodes[1].protocol, nodes[0].protocol
        contact = asker.router.get(nodes[0].identity.node_id)
        assert contact is not None
        await asker.ask(contact, "fn", [FILE[:20], 1])
        requests: list[tuple[str, list[object]]] = [
            ("ping", [bytes(16)]),
            ("fn", [bytes(20), 20]),
            ("gp", [b"", bytes(8), 1]),
            ("gs", [bytes(20), 1]),
            ("gm", [bytes(20), 0]),
            ("ap", [DATA_PORT, 60, bytes(8)]),
            ("as", [DATA_PORT, 60, bytes(22)]),
            ("pm", [bytes(20), bytes(32), 1, 1, b"x", bytes(64)]),
            ("wd", [0, b""]),
        ]
        for name, args in requests:
            assert await asker.ask(contact, name, [*args, b"padding"]) is not None, name
        assert holder.counters["drop_malformed"] == 0

    run(body)


def test_metadata_is_found_by_who_has_never_asked_its_holders_before() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await net.grow(3)
        await nodes[0].announcer.put_metadata(FILE, "x", 1, FILE)
        asker = nodes[1].protocol
        asker.metadata = MetadataStore(asker._clock, lambda: 0.0)  # its own copy is no answer
        asker._calls._paths.clear()
        assert len(await nodes[1].finder.get_metadata(FILE, 10.0)) == 1

    run(body)

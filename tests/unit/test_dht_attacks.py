"""Attackers: nodes planted next to a key, and ordinary nodes that lie. What was published is found all the same.

`FASTCAS_DHT_KEYS` sets how many keys of each kind are tried (make dht-attacks: 20, as in the targets).
"""

from __future__ import annotations

import os
import random

import pytest

from tests.support.dht_attack import contact_of, corrupt, drop, ever_closer, is_found, key_of, lie, plant, remove
from tests.support.dht_attack import swallow as swallowing
from tests.support.dht_sim import ideal_network
from tests.support.virtual_net import VirtualNet, run

KEYS = int(os.environ.get("FASTCAS_DHT_KEYS", "4"))
KINDS = ("file", "chunk", "metadata")
WHOLE = KEYS >= 20
HONEST = 500 if WHOLE else 200


@pytest.mark.slow
@pytest.mark.parametrize("poisons", [False, True])
@pytest.mark.parametrize("planted", [8, 20, 40] if WHOLE else [20])
def test_provider_is_found_although_nodes_are_planted_next_to_the_key(planted: int, poisons: bool) -> None:
    async def body(net: VirtualNet) -> dict[str, int]:
        nodes = await ideal_network(net, HONEST)
        found = dict.fromkeys(KINDS, 0)
        for number in range(KEYS):
            content = random.Random(f"content {number}").randbytes(32)
            for kind in KINDS:
                publisher, seeker = net.rng.sample(nodes, 2)
                bad = await plant(net, nodes, key_of(kind, content), planted, poisons=poisons)
                found[kind] += await is_found(publisher, seeker, kind, content)
                remove(bad, nodes)
        return found

    found = run(body)
    print(f"\n{planted} planted among {HONEST}, poison {poisons}: found {found} of {KEYS}")
    assert all(count >= 0.95 * KEYS for count in found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.1, 0.2] if WHOLE else [0.2])
@pytest.mark.parametrize("how", ["drop", "lie", "ever closer", "swallow"])
def test_provider_is_found_although_many_nodes_lie(how: str, share: float) -> None:
    async def body(net: VirtualNet) -> dict[str, int]:
        nodes = await ideal_network(net, HONEST)
        bad = net.rng.sample(nodes, round(share * HONEST))
        allies = [contact_of(node) for node in bad]
        for number, node in enumerate(bad):
            rng = random.Random(number)
            behaviours = {
                "drop": drop,
                "lie": lie(rng),
                "ever closer": ever_closer(rng, allies),
                "swallow": swallowing(allies),
            }
            corrupt(node, behaviours[how])
        honest = [node for node in nodes if node not in set(bad)]
        found = dict.fromkeys(KINDS, 0)
        for number in range(KEYS):
            content = random.Random(f"content {number}").randbytes(32)
            for kind in KINDS:
                publisher, seeker = net.rng.sample(honest, 2)
                found[kind] += await is_found(publisher, seeker, kind, content)
        return found

    found = run(body)
    print(f"\n{share:.0%} of {HONEST} {how}: found {found} of {KEYS}")
    assert all(count >= 0.95 * KEYS for count in found.values()), found

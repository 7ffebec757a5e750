"""The main job on 64 MiB of real files: three nodes, one killed half-way, every byte right."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import demo


@pytest.mark.slow
def test_demo_with_one_of_three_nodes_killed_half_way(tmp_path: Path) -> None:
    outcome = demo.run(64 * demo.MIB, tmp_path)
    assert outcome.identical
    assert outcome.size >= 64 * demo.MIB
    assert outcome.killed_at >= 0.5, "the download ended before the node could be killed"
    assert outcome.killed in outcome.bytes_by_peer
    assert len(outcome.bytes_by_peer) == 3, "not every peer was used"
    assert sum(outcome.bytes_by_peer.values()) >= outcome.size

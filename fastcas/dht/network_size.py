"""How many nodes the network has, judged by how near the nodes around a target are. Pure: no clock, no network.

Ids are spread evenly, so the i-th nearest of N nodes lies about i * 2^160 / N away from any target. One lookup's 20
nearest nodes tell N within about 23 %, the median over many targets much better, and the median does not care about a
few targets around which somebody has planted nodes. What lookups heard from others counts only within a factor of
what our own table says, whose contacts have all proved their ids. Of it those count whose distances are the largest
at which we know everybody: nodes planted close to us are not among them.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from statistics import median

__all__ = ["NetworkSize", "crowds", "expected_distance", "from_table", "is_crowded"]

SPACE = 1 << 160
SAMPLES_MAX = 32
NODES_MIN = 8  # fewer are no sample
CLAMP = 1.5  # how far the estimate may be from what our own table says
# How few nodes' worth of expected distance may hold 8 or 20 nodes before somebody must have planted some. By chance:
# 8 where 1.6 are expected happens around one target in 4,000, 20 where 8 are expected around one in 4,000.
CROWDS = ((8, 1.6), (20, 8.0))


class NetworkSize:
    """Collects the results of lookups. Memory: one number per target, the last 32 targets.

    Attributes:
        version: Differs whenever the samples differ.
    """

    def __init__(self) -> None:
        """Know nothing yet."""
        self.version = 0
        self._samples: OrderedDict[int, float] = OrderedDict()

    @property
    def n_samples(self) -> int:
        """Distinct targets that have been looked at."""
        return len(self._samples)

    @property
    def latest(self) -> float:
        """How many nodes the last lookup alone speaks of; 0 before the first."""
        return next(reversed(self._samples.values()), 0.0)

    def forget(self) -> None:
        """Start anew: the network is not what it was."""
        self.version += 1
        self._samples.clear()

    def note(self, target: int, distances: Sequence[int], *, is_all: bool) -> None:
        """Take the result of a complete lookup; a further one of the same target replaces the earlier.

        Args:
            target: The 160-bit number looked up.
            distances: XOR distances of the nearest live nodes, ascending, without ourselves.
            is_all: These are all the nodes that there are.
        """
        if is_all:
            sample = float(len(distances))
        elif len(distances) >= NODES_MIN:
            sample = _of(distances)
        else:
            return
        self.version += 1
        self._samples.pop(target, None)
        self._samples[target] = sample
        if len(self._samples) > SAMPLES_MAX:
            self._samples.popitem(last=False)

    def estimate(self, own: tuple[float, float]) -> int:
        """Return about how many other nodes there are, `own` being what `from_table` says."""
        least, most = own
        middle = median(self._samples.values()) if self._samples else least
        if most < NODES_MIN:
            return round(max(middle, most))
        return round(min(max(middle, least / CLAMP), most * CLAMP))


def from_table(own_id: int, ids: Iterable[int], full: int) -> tuple[float, float]:
    """Return the least and the most other nodes that a routing table speaks of. Cost: O(table).

    The least comes from the largest distances of which we should know everybody, where nodes planted close to us do
    not count; a young table knows too few there, so that the most comes from nearer ones.

    Args:
        own_id: 160-bit.
        ids: Its verified contacts.
        full: From so many contacts with the same number of leading bits as ours there may be others.
    """
    shells = Counter(160 - (number ^ own_id).bit_length() for number in ids)
    total = float(shells.total())
    if total < NODES_MIN:
        return total, total
    shared = next(bits for bits in range(161) if shells[bits] < full)
    told = [(shells[bits] + shells[bits + 1], bits) for bits in range(shared, max(shells) + 1)]
    sizes = [count * float(1 << bits + 2) / 3.0 for count, bits in told if count >= NODES_MIN or bits == shared]
    return sizes[0] if sizes else total, max([*sizes, total])


def _of(distances: Sequence[int]) -> float:
    """Return the number of nodes at which this farthest distance is the median one."""
    return (len(distances) - 1 / 3) * SPACE / max(distances[-1], 1)


def expected_distance(rank: float, n_nodes: int) -> int:
    """Return how far the `rank`-th nearest of `n_nodes` is from a target on average; all of the space if fewer."""
    return SPACE if rank >= n_nodes else int(rank / n_nodes * SPACE)


def crowds(n_nodes: int) -> list[tuple[int, int]]:
    """Return (count, distance): so many nodes nearer to a target than that have been planted, or are made up."""
    return [(count, expected_distance(normal, n_nodes)) for count, normal in CROWDS if count < n_nodes]


def is_crowded(distances: Sequence[int], n_nodes: int) -> bool:
    """Whether so many nodes lie so near to a target that somebody must have planted some.

    Args:
        distances: Ascending; those of the nearest nodes.
        n_nodes: The estimated size of the network.
    """
    return any(count <= len(distances) and distances[count - 1] < limit for count, limit in crowds(n_nodes))

"""The wire: what a datagram looks like, and the only decoder for it.

    offset  size  field
    0       16    keyed BLAKE3 of the rest; only in a network with a key
    0|16    1     0 request, 1 reply
    1|17    20    message id, chosen by the asker at random
    21|37   ...   msgpack array, no maps, bounded strings and arrays

A request is [name, [version, flags, id20, token, ...]] with an optional padding element at its end; a reply is
[status, observed address (6 or 18 bytes), token8, ...]. `observed` is how the replier sees the asker.

    name  request after token                             reply after token
    ping  nonce16                                         id20, pub32, sig64
    fn    target20, k                                     nodes4, nodes6
    gp    target20|"", keys8*n, want                      peers4, peers6, index, answered, nodes4, nodes6
    gs    key20, want                                     peers4, peers6, have2*n, nodes4, nodes6
    gm    key20, skip                                     total, [[pub32, seq, exp, value, sig64]...], nodes4, nodes6
    ap    data_port, ttl_s, keys8*n                       accepted, retry_after_s
    as    data_port, ttl_s, (key20 have2)*n               accepted, retry_after_s
    pm    key20, pub32, seq, exp, value, sig64            accepted
    wd    what (0 all: farewell, 1 listed swarm keys), key20*n   removed

`index` of gp: for each answered key one count byte and that many bytes, each a position in peers4 then peers6.
A peer is id20, ip, data port like a contact; ip zero with the replier's own id means "at the address that this
reply came from". `have` is thousandths, big-endian. Numbers in msgpack are unsigned.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgpack

from fastcas.dht.budgets import DATAGRAM_MAX
from fastcas.dht.contacts import pack_address

__all__ = [
    "BAD_TOKEN",
    "FULL",
    "MALFORMED",
    "OK",
    "REPLY",
    "REQUEST",
    "Field",
    "check",
    "decode",
    "encode",
    "pack_observed",
]

REQUEST = 0
REPLY = 1
KINDS = (b"\x00", b"\x01")
HEAD = 21
OK, BAD_TOKEN, FULL, MALFORMED = 0, 1, 2, 3
DECODE_ERRORS = (ValueError, msgpack.UnpackException)
_pack = msgpack.Packer(use_bin_type=True).pack  # one for all: each packer comes with a buffer of 256 KiB


class Field(NamedTuple):
    """What one element must be.

    Attributes:
        kind: bytes, int or list.
        low, high: Smallest and largest length, or value for int.
        step: Lengths must be multiples of it.
    """

    kind: type
    low: int
    high: int
    step: int = 1


def check(values: list[Any], fields: tuple[Field, ...]) -> bool:
    """Whether `values` begins with elements as described; elements beyond them are padding or newer."""
    if len(values) < len(fields):
        return False
    for value, (kind, low, high, step) in zip(values, fields, strict=False):
        found = type(value)
        if found is not kind:
            return False
        measure: int = value if kind is int else len(value)
        if not low <= measure <= high or (step > 1 and measure % step):
            return False
    return True


def encode(kind: int, message_id: bytes, body: list[Any]) -> bytes:
    """Return a datagram without MAC."""
    packed: bytes = _pack(body)
    return KINDS[kind] + message_id + packed


def decode(datagram: bytes) -> list[Any] | None:
    """Return the array of a datagram without MAC, or None for anything malformed. Never raises."""
    try:
        body = msgpack.unpackb(
            datagram[HEAD:],
            raw=False,
            use_list=True,
            max_str_len=16,
            max_bin_len=DATAGRAM_MAX,
            max_array_len=64,
            max_map_len=0,
            max_ext_len=0,
        )
    except DECODE_ERRORS:
        return None
    return body if isinstance(body, list) else None


def pack_observed(ip: str, port: int) -> bytes:
    """Return an address as it stands in replies: 6 or 18 bytes."""
    return (pack_address(ip) or b"") + port.to_bytes(2, "big")

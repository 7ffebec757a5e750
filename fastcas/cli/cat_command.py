"""`fastcas cat`: a file's proven bytes, in order, on stdout."""

from __future__ import annotations

import math
import os
import re
import sys

import click

from fastcas.cli.options import check_fetch, check_network, fetch_options, network_options, storage_option
from fastcas.cli.render import output_failed
from fastcas.config import storage_root
from fastcas.errors import UsageError
from fastcas.ids import escape_for_terminal, parse_member
from fastcas.limits import MIB, STALL_TIMEOUT_S

__all__ = ["cat_command"]

_RANGE = re.compile(r"([0-9]{1,18})-([0-9]{0,18})", re.ASCII)


def parse_range(text: str) -> tuple[int, int | None]:
    """Return (first, last) byte of `A-B`, both included; `A-`: to the end, last is None.

    Raises:
        UsageError: Any other text.
    """
    match = _RANGE.fullmatch(text)
    if match is None or (match[2] and int(match[2]) < int(match[1])):
        raise UsageError(f"--range: expected A-B with A <= B, or A-, got '{escape_for_terminal(text[:60])}'")
    return int(match[1]), int(match[2]) if match[2] else None


@click.command("cat")
@click.argument("ref", metavar="REF[/PATH]")
@click.option("--range", "text", metavar="A-B", help="bytes A to B only, both included, from 0; A-: to the end")
@storage_option
@network_options
@fetch_options
@click.option("--stall-timeout", type=click.FloatRange(min=0.001), default=STALL_TIMEOUT_S, show_default=True,
              metavar="SECONDS", help="give up after next to nothing has come from anybody for so long")  # fmt: skip
def cat_command(
    ref: str, text: str | None, storage_dir: str, peers: tuple[str, ...], bootstrap: tuple[str, ...], timeout: float,
    network_key: str | None, origins: tuple[str, ...], max_download: str | None, stall_timeout: float,
) -> None:  # fmt: skip
    """Write a file to stdout, in order, every byte proven; by link at once, by hash when all that follows is here.

    REF/PATH is one file of a directory.
    """
    link = parse_member(ref)
    check_network(peers, bootstrap, timeout)
    if not math.isfinite(stall_timeout):
        raise UsageError(f"--stall-timeout: expected a number of seconds, got {stall_timeout}")
    first, last = parse_range(text) if text is not None else (0, None)
    args = {
        "ref": str(link), "peers": list(peers), "bootstrap": list(bootstrap), "timeout_s": timeout,
        "stall_timeout_s": stall_timeout, "network_key": network_key, **check_fetch(origins, max_download),
    }  # fmt: skip
    from fastcas.node.reading import open_raw

    with open_raw(args, storage_root(storage_dir), keeps=False) as file:
        end = file.size if last is None else last + 1
        if text is not None and not first < end <= file.size:
            raise UsageError(f"--range: {text} is outside the file, which has {file.size} B; nothing was written")
        file.seek(first)
        buffer = memoryview(bytearray(MIB))
        sys.stdout.flush()
        while first < end:
            n = file.readinto(buffer[: min(MIB, end - first)])
            first += n
            at = 0
            while at < n:
                at += _write(buffer[at:n])


def _write(data: memoryview) -> int:
    try:
        return os.write(1, data)
    except BrokenPipeError:
        raise
    except OSError as exc:
        raise output_failed(exc) from exc
